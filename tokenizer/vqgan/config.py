"""The configuration of a VQGAN under open-muse's names, validated on construction."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from EasyLM.errors import UserError, prefix_errors
from EasyLM.storage import check_schema
from EasyLM.vocab import CODEBOOK_SIZE, MOST_CODES

_MOST, _MOST_LEVELS = 2**16, 12
_PIXEL_RANGES = ((0, 1), (-1, 1))


@dataclasses.dataclass(frozen=True)
class VQGANConfig:
    """Architecture of a VQGAN; the defaults are those of the released tokenizer.

    `dropout` and `commitment_cost` describe how a model was trained and do not affect inference. `norm_groups` is not
    part of open-muse, which always uses 32. With one channel per group, group normalization removes each channel's
    mean and thus the overall colour of an image, so narrow models use fewer groups.

    Three settings state what other projects do differently from open-muse. `pixel_range` is the range of the network's
    pixels. With `normalize_codes`, vectors and codes have length 1. With `skip_single_attention`, a level with a single
    residual block ignores its attention.

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

    def __post_init__(self):
        for name in ("channel_mult", "attn_resolutions", "pixel_range"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        counts = ["resolution", "hidden_channels", "num_res_blocks", "z_channels", "quantized_embed_dim", "norm_groups"]
        factor = 2 ** max(len(self.channel_mult) - 1, 0)
        groups = f"times channel_mult={self.channel_mult} must be divisible by norm_groups={self.norm_groups}"
        rules = [
            ("channel_mult", len(self.channel_mult) <= _MOST_LEVELS, f"must have at most {_MOST_LEVELS} levels"),
            *((name, 1 <= getattr(self, name) <= _MOST, f"must be 1..{_MOST}") for name in counts),
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
