"""Settings of a network from the names and shapes of its tensors, for files that do not state them."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from EasyLM.errors import UserError

DEFAULT_RESOLUTION = 256  # of files that state none
GROUPS = 32  # of the group normalizations of taming-transformers and LlamaGen


class Translated(NamedTuple):
    """A tokenizer in the format of this project.

    Attributes:
      settings: keys and values of config.json.
      tensors: by the names of open-muse.
      weights: the name of the weight file or files, for errors.
      config: the name of the file of settings, for errors.
    """

    settings: dict[str, Any]
    tensors: dict[str, np.ndarray]
    weights: str
    config: str


def settings_from_tensors(source: str, tensors: Mapping[str, np.ndarray], resolution: int) -> dict[str, Any]:
    """Returns the settings that the tensors show.

    Args:
      source: the name of the file, for errors.
      tensors: by the names of open-muse.
      resolution: side of an image in pixels.

    Raises:
      UserError: naming the file and the missing tensor, or widths that this network cannot have.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != dimensions:
            raise UserError(f"{source}: not the tensors of a VQGAN: {name} with {dimensions} dimensions is missing")
        return tensors[name].shape

    num_levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    widths = [shape(f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(num_levels)]
    hidden = shape("encoder.conv_in.weight", 4)[0]
    if not hidden or any(width % hidden for width in widths):
        raise UserError(
            f"{source}: the levels have {widths} channels; only multiples of the {hidden} channels of encoder.conv_in "
            "are supported"
        )
    num_codes, length = shape("quantize.embedding.weight", 2)
    attends = [f"encoder.down.{level}.attn.0.norm.weight" in tensors for level in range(num_levels)]
    return {
        "resolution": resolution,
        "hidden_channels": hidden,
        "channel_mult": [width // hidden for width in widths],
        "num_res_blocks": _count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "attn_resolutions": [resolution // 2**level for level in range(num_levels) if attends[level]],
        "no_attn_mid_block": "encoder.mid.attn_1.norm.weight" not in tensors,
        "z_channels": shape("encoder.conv_out.weight", 4)[0],
        "num_embeddings": num_codes,
        "quantized_embed_dim": length,
        "resample_with_conv": num_levels < 2 or "encoder.down.0.downsample.conv.weight" in tensors,
    }


def _count(tensors: Mapping[str, np.ndarray], pattern: str) -> int:
    """Returns one more than the largest number in the names that begin with the pattern."""
    numbers = [int(match[1]) for name in tensors if (match := re.match(pattern, name))]
    return max(numbers, default=-1) + 1


def at_resolution(settings: Mapping[str, Any], resolution: int) -> dict[str, Any]:
    """Returns settings for images of another side. The same levels have attention."""
    old = settings.get("resolution", DEFAULT_RESOLUTION)
    attends = [side * resolution // old for side in settings.get("attn_resolutions", ())]
    return {**settings, "resolution": resolution, "attn_resolutions": attends}


def check_equal(source: str, stated: Mapping[str, Any], shown: Mapping[str, Any]) -> None:
    """Checks the settings that a file states against those that the tensors show.

    Raises:
      UserError: naming the file and the setting.
    """
    for name, value in stated.items():
        if value != shown[name]:
            raise UserError(f"{source}: {name}={value}, but the tensors of the weight file have {shown[name]}")


def renamed(
    tensors: Mapping[str, np.ndarray], rules: list[tuple[str, str]], reversed_levels: str
) -> dict[str, np.ndarray]:
    """Renames tensors by regular expressions, each applied once to each name, in order.

    The levels `decoder.up.N` are then numbered from the finest. `reversed_levels` is the pattern of the new names of
    levels, with the number as its group, that the project numbers from the coarsest.
    """
    names = {}
    for old in tensors:
        new = old
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        names[old] = new
    last = _count(dict.fromkeys(names.values(), np.zeros(0)), reversed_levels) - 1
    result = {}
    for old, new in names.items():
        match = re.match(reversed_levels, new)
        if match:
            new = f"{new[: match.start(1)]}{last - int(match[1])}{new[match.end(1) :]}"
        result[new] = tensors[old]
    return result
