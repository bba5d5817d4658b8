"""Command-line flags for the architecture of a VQGAN."""

import math
from typing import Any

from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.vocab import MOST_CODES
from tokenizer.vqgan import QUANTIZERS, VQGANConfig

_HELP = {
    "resolution": "Side of an image in pixels.",
    "hidden_channels": "Channels of the finest level.",
    "channel_mult": "Channels of each level, in multiples of hidden_channels; each further level halves the side.",
    "num_res_blocks": "Residual blocks per level of the encoder; the decoder has one more.",
    "attn_resolutions": "Comma list of the sides, in positions, at which attention follows each residual block.",
    "no_attn_mid_block": "No attention at the coarsest level.",
    "z_channels": "Channels between the network and the projection to codes.",
    "quantizer": "vq: a learned codebook; fsq: a grid of --vqgan.fsq_levels (arXiv 2309.15505); lfq: the sign of each "
    "dimension (arXiv 2310.05737).",
    "fsq_levels": "fsq: comma list of the values in each dimension, such as 8,5,5,5 for 1,000 codes.",
    "normalize_codes": "vq: vectors and codes of length 1, as in ViT-VQGAN and LlamaGen.",
    "num_embeddings": "Codes in the codebook; 0: 8192, or with fsq the product of the levels.",
    "quantized_embed_dim": "Length of a code's vector; 0: 64, or with fsq and lfq as the codes require.",
    "resample_with_conv": "Change the side by convolutions; otherwise by averaging and repeating pixels.",
    "commitment_cost": "Weight of the commitment loss, which moves the encoder's vectors towards their codes.",
    "norm_groups": "Groups of the group normalization: 32 in open-muse, fewer for a narrow model.",
}


def _text(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


# The defaults are the architecture of the released tokenizer.
MODEL_FLAGS = {
    **{name: Flag(_text(getattr(VQGANConfig(), name)), text) for name, text in _HELP.items()},
    "quantizer": Flag("vq", _HELP["quantizer"], choices=QUANTIZERS),
    "num_embeddings": Flag(0, _HELP["num_embeddings"], least=0),
    "quantized_embed_dim": Flag(0, _HELP["quantized_embed_dim"], least=0),
}


def config_from_flags(values: Any) -> VQGANConfig:
    """Returns the configuration that the flags describe.

    Args:
      values: values of MODEL_FLAGS, the group `vqgan`.

    Raises:
      UserError: naming the flag.
    """
    lists = {}
    for name in ("channel_mult", "attn_resolutions", "fsq_levels"):
        try:
            lists[name] = tuple(int(part) for part in values[name].split(",") if part)
        except ValueError:
            raise UserError(f"--vqgan.{name}={values[name]}: must be a comma list of integers, such as 1,2,4") from None
    try:
        config = VQGANConfig(**{**values.to_dict(), **lists, **_codebook_size(values, lists["fsq_levels"])})
    except UserError as error:
        raise UserError(f"--vqgan.{error}") from None
    # Files of other projects list sides that no level has. Here it is a mistake: there would be no attention.
    sides = [config.resolution // 2**level for level in range(len(config.channel_mult))]
    if not set(config.attn_resolutions) <= set(sides):
        raise UserError(
            f"--vqgan.attn_resolutions={values.attn_resolutions}: the sides of the levels are "
            f"{', '.join(map(str, sides))}"
        )
    return config


def _codebook_size(values: Any, levels: tuple[int, ...]) -> dict[str, int]:
    """Returns the number of codes and their length. What is 0 follows from the other one and from the quantizer."""
    count, length, default = values.num_embeddings, values.quantized_embed_dim, VQGANConfig()
    if values.quantizer == "fsq":
        count, length = count or math.prod(levels), length or len(levels)
    elif values.quantizer == "lfq":
        count = count or (2 ** min(length, MOST_CODES.bit_length()) if length else default.num_embeddings)
        length = length or count.bit_length() - 1
    return {
        "num_embeddings": count or default.num_embeddings,
        "quantized_embed_dim": length or default.quantized_embed_dim,
    }
