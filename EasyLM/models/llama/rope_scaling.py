"""Llama 3's scaling of the rotary embedding, with which a model reads sequences longer than those it was trained on."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from EasyLM.errors import UserError, choose
from EasyLM.models.llama.dict_literal import parse_dict


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Makes the long wavelengths of the rotary embedding longer (Llama 3, arXiv 2407.21783; `llama3` in transformers).

    A wavelength, in tokens, is multiplied by `factor` if it is above `original_max_position_embeddings /
    low_freq_factor`. It is unchanged if it is below `original_max_position_embeddings / high_freq_factor`. The
    frequencies between these limits are interpolated.

    Attributes:
      factor: ratio of the new and the original context length.
      low_freq_factor, high_freq_factor: see above.
      original_max_position_embeddings: length of the sequences on which the model was trained, in tokens.

    Raises:
      UserError: if a value is invalid. The message names it.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    rope_type: str = "llama3"

    def __post_init__(self) -> None:
        choose("rope_type", self.rope_type, ("llama3",))
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < 2**63:
                raise UserError(f"{name}={value!r}: must be a number above 0")
        if self.factor < 1:
            raise UserError(f"factor={self.factor}: must be at least 1")
        if self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"low_freq_factor={self.low_freq_factor}: must be below high_freq_factor={self.high_freq_factor}"
            )
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            object.__setattr__(self, name, float(getattr(self, name)))  # JAX would take an int for an int32

    def scaled(self, frequencies_k: jax.Array) -> jax.Array:
        """Returns the scaled frequencies of the pairs, in radians per token."""
        low, high = self.low_freq_factor, self.high_freq_factor
        length = float(self.original_max_position_embeddings)
        waves_k = length * frequencies_k / (2 * math.pi)  # in the original context
        unscaled_k = jnp.clip((waves_k - low) / (high - low), 0, 1)
        return (1 - unscaled_k) * frequencies_k / self.factor + unscaled_k * frequencies_k


def as_rope_scaling(value: Any) -> RopeScaling | None:
    """Returns the scaling that a setting specifies, or None for no scaling.

    Args:
      value: None, a `RopeScaling`, a mapping with the keys of a Hugging Face `rope_scaling`, or the Python literal of
        one. An empty text and the type "default" select no scaling.

    Raises:
      UserError: if the type is not llama3, or a value is invalid, unknown or missing.
    """
    if value is None or isinstance(value, RopeScaling):
        return value
    if isinstance(value, str):
        value = parse_dict(value) if value else {}
    if not isinstance(value, Mapping):
        raise UserError(f"must be a dict, not {value!r}")
    kind = value.get("rope_type", value.get("type", "default"))
    if kind == "default":
        return None
    choose("rope_type", kind, ("default", "llama3"))
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    # `type` is an older name of rope_type. The theta is a setting of its own.
    values = {name: number for name, number in value.items() if name not in ("type", "rope_type", "rope_theta")}
    if unknown := [str(name) for name in values if name not in names]:
        raise UserError(f"unknown key {', '.join(unknown)}; choose from {', '.join(names)}")
    if "factor" not in values:
        raise UserError("lacks the key 'factor'")
    return RopeScaling(**values)
