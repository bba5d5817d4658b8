"""The configuration of a VQGAN under open-muse's names, validated on construction."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from EasyLM.errors import UserError, prefix_errors
from EasyLM.storage import check_schema
from EasyLM.vocab import CODEBOOK_SIZE, MOST_CODES

_MOST, _MOST_LEVELS = 2**16, 12
_MOST_DIMENSIONS = 16  # of a grid: two values in each give the most codes
_PIXEL_RANGES = ((0, 1), (-1, 1))
QUANTIZERS = ("vq", "fsq", "lfq")


@dataclasses.dataclass(frozen=True)
class VQGANConfig:
    """Architecture of a VQGAN; the defaults are those of the released tokenizer.

    `dropout` and `commitment_cost` describe how a model was trained and do not affect inference. `norm_groups` is not
    part of open-muse, which always uses 32. With one channel per group, group normalization removes each channel's
    mean and thus the overall colour of an image, so narrow models use fewer groups.

    Three settings state what other projects do differently from open-muse. `pixel_range` is the range of the network's
    pixels. With `normalize_codes`, vectors and codes have length 1. With `skip_single_attention`, a level with a single
    residual block ignores its attention.

    `quantizer` maps vectors to codes (see `tokenizer.vqgan.quantizers`): vq has a learned codebook; fsq has a grid with
    `fsq_levels` values in each dimension; lfq has the signs of each dimension, two values.

    Raises:
      UserError: naming field, value and rule.
    """

    resolution: int = 256
    num_channels: int = 3
    hidden_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = ()
    no_attn_mid_block: bool = True
    z_channels: int = 64
    num_embeddings: int = CODEBOOK_SIZE
    quantized_embed_dim: int = 64
    dropout: float = 0.0
    resample_with_conv: bool = True
    commitment_cost: float = 0.25
    norm_groups: int = 32
    pixel_range: tuple[int, int] = (0, 1)
    normalize_codes: bool = False
    skip_single_attention: bool = True
    quantizer: str = "vq"
    fsq_levels: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("channel_mult", "attn_resolutions", "pixel_range", "fsq_levels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        counts = ["resolution", "hidden_channels", "num_res_blocks", "z_channels", "quantized_embed_dim", "norm_groups"]
        factor = 2 ** max(len(self.channel_mult) - 1, 0)
        groups = f"times channel_mult={self.channel_mult} must be divisible by norm_groups={self.norm_groups}"
        rules = [
            ("channel_mult", len(self.channel_mult) <= _MOST_LEVELS, f"must have at most {_MOST_LEVELS} levels"),
            *((name, 1 <= getattr(self, name) <= _MOST, f"must be 1..{_MOST}") for name in counts),
            *self._quantizer_rules(),
            ("num_channels", self.num_channels == 3, "must be 3: images are RGB"),
            ("channel_mult", self.channel_mult and min(self.channel_mult) >= 1, "must be one or more numbers >= 1"),
            (
                "channel_mult",
                max(self.level_widths, default=0) <= _MOST,
                f"gives more than {_MOST} channels",
            ),
            ("num_embeddings", 1 <= self.num_embeddings <= MOST_CODES, f"must be 1..{MOST_CODES}"),
            ("pixel_range", self.pixel_range in _PIXEL_RANGES, "must be [0, 1] or [-1, 1]"),
            ("resolution", self.resolution % factor == 0, f"must be divisible by {factor}, 2^(levels - 1)"),
            ("hidden_channels", all(width % max(self.norm_groups, 1) == 0 for width in self.level_widths), groups),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise UserError(f"{name}={getattr(self, name)!r}: {rule}")

    def _quantizer_rules(self) -> list[tuple[str, bool, str]]:
        """Returns fields, whether they suit the quantizer, and the rule."""
        is_grid, is_fsq, levels = self.quantizer in ("fsq", "lfq"), self.quantizer == "fsq", self.grid_levels
        kind = "the product of fsq_levels" if is_fsq else "two to the power of quantized_embed_dim"
        dimension, size = self.quantized_embed_dim, math.prod(levels[:_MOST_DIMENSIONS])
        return [
            ("quantizer", self.quantizer in QUANTIZERS, f"must be one of {', '.join(QUANTIZERS)}"),
            ("fsq_levels", is_fsq or not self.fsq_levels, "is for quantizer=fsq"),
            ("fsq_levels", not is_fsq or len(levels) > 0, "quantizer=fsq needs levels, such as 8,5,5,5"),
            ("fsq_levels", min(levels, default=2) >= 2, "must be numbers of at least 2"),
            ("normalize_codes", not (is_grid and self.normalize_codes), "is for quantizer=vq"),
            (
                "quantized_embed_dim",
                not is_grid or dimension <= _MOST_DIMENSIONS,
                f"must be at most {_MOST_DIMENSIONS} with quantizer={self.quantizer}",
            ),
            ("quantized_embed_dim", not is_grid or dimension == len(levels), f"must be {len(levels)}, as fsq_levels"),
            ("num_embeddings", not is_grid or self.num_embeddings == size, f"must be {size}, {kind}"),
        ]

    @property
    def grid_levels(self) -> tuple[int, ...]:
        """Values in each dimension of a grid of codes; empty if the codebook is learned."""
        return (2,) * min(self.quantized_embed_dim, _MOST_DIMENSIONS) if self.quantizer == "lfq" else self.fsq_levels

    @property
    def level_widths(self) -> list[int]:
        """Channels of each level, finest first."""
        return [self.hidden_channels * mult for mult in self.channel_mult]

    @property
    def side(self) -> int:
        """Codes along one side of an image."""
        return self.resolution // 2 ** (len(self.channel_mult) - 1)

    @property
    def tokens_per_image(self) -> int:
        """Codes of an image."""
        return self.side**2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> "VQGANConfig":
        """Builds a config from the contents of config.json. Keys that start with `_` are ignored.

        Raises:
          UserError: naming `source` and the unknown key with the valid ones, or the field that fails validation.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        values = {key: value for key, value in values.items() if not key.startswith("_")}
        unknown = sorted(values.keys() - fields)
        if unknown:
            raise UserError(f"{source}: unknown key {unknown[0]!r}: valid are {', '.join(sorted(fields))}")
        with prefix_errors(source):
            check_schema(values, _SCHEMA)
            return cls(**values)


# JSON types of the fields; a default that is a tuple stands for a list of integers.
_SCHEMA = {
    f"{field.name}?": [int] if isinstance(field.default, tuple) else type(field.default)
    for field in dataclasses.fields(VQGANConfig)
}
