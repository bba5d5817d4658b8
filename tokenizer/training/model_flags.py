"""Command-line flags for the architecture of a VQGAN."""

from typing import Any

from EasyLM.errors import UserError
from EasyLM.flags import Flag
from tokenizer.vqgan import VQGANConfig

_HELP = {
    "resolution": "Side of an image in pixels.",
    "hidden_channels": "Channels of the finest level.",
    "channel_mult": "Channels of each level, in multiples of hidden_channels; each further level halves the side.",
    "num_res_blocks": "Residual blocks per level of the encoder; the decoder has one more.",
    "attn_resolutions": "Comma list of the sides, in positions, at which attention follows each residual block.",
    "no_attn_mid_block": "No attention at the coarsest level.",
    "z_channels": "Channels between the network and the projection to codes.",
    "num_embeddings": "Codes in the codebook.",
    "quantized_embed_dim": "Length of a code's vector.",
    "resample_with_conv": "Change the side by convolutions; otherwise by averaging and repeating pixels.",
    "commitment_cost": "Weight of the commitment loss, which moves the encoder's vectors towards their codes.",
    "norm_groups": "Groups of the group normalization: 32 in open-muse, fewer for a narrow model.",
}


def _text(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


# The defaults are the architecture of the released tokenizer.
MODEL_FLAGS = {name: Flag(_text(getattr(VQGANConfig(), name)), text) for name, text in _HELP.items()}


def config_from_flags(values: Any) -> VQGANConfig:
    """Returns the configuration that the flags describe.

    Args:
      values: values of MODEL_FLAGS, the group `vqgan`.

    Raises:
      UserError: naming the flag.
    """
    lists = {}
    for name in ("channel_mult", "attn_resolutions"):
        try:
            lists[name] = tuple(int(part) for part in values[name].split(",") if part)
        except ValueError:
            raise UserError(f"--vqgan.{name}={values[name]}: must be a comma list of integers, such as 1,2,4") from None
    try:
        return VQGANConfig(**{**values.to_dict(), **lists})
    except UserError as error:
        raise UserError(f"--vqgan.{error}") from None
