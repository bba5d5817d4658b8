"""Samples tokens from logits with temperature, top-k and top-p."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from EasyLM.errors import UserError

_MIN_TEMPERATURE = 1e-6  # logits divided by a smaller value may overflow
_MAX_TOP_K = 2**31 - 1  # the largest int32; it exceeds every vocabulary


@partial(jax.tree_util.register_dataclass, data_fields=("temperature", "top_k", "top_p"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings for sampling. None disables a setting. Values are traced, but whether a value is None is static.

    Attributes:
      temperature: divides the logits; at least 1e-6. None means greedy sampling.
      top_k: keeps the k most likely ids, and all ids that tie with the least likely of these.
      top_p: among these, keeps the smallest set of most likely ids with this total probability (arXiv 1904.09751).
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


def check_sampling(temperature: float, top_k: int, top_p: float) -> Sampling:
    """Validates user settings and converts them. Values 0, 0 and 1 disable the respective settings.

    Raises:
      UserError: if a setting is out of range. The message names the setting, its value and its range.
    """
    if temperature != 0 and not _MIN_TEMPERATURE <= temperature < np.inf:
        raise UserError(
            f"temperature={temperature}: must be 0 (the most likely token), or finite and at least {_MIN_TEMPERATURE}"
        )
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must be above 0 and at most 1 (off)")
    if top_k < 0:
        raise UserError(f"top_k={top_k}: must be 0 (off) or above")
    if temperature == 0:
        return Sampling()
    return Sampling(float(temperature), min(top_k, _MAX_TOP_K) or None, float(top_p) if top_p < 1 else None)


def check_seed(seed: int) -> None:
    """Checks the seed of a user. All programs accept the same range.

    Raises:
      UserError: if the seed is out of range. The message names the range.
    """
    if not 0 <= seed < 2**31:
        raise UserError(f"seed={seed}: must be 0..{2**31 - 1}")


def sample(logits_V: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Samples one token id from logits [V]."""
    if sampling.temperature is None:
        return logits_V.argmax().astype(jnp.int32)
    logits_V = logits_V.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None or sampling.top_p is not None:
        logits_V = jnp.where(logits_V >= _lowest_kept(logits_V, sampling), logits_V, -jnp.inf)
    return jax.random.categorical(key, logits_V).astype(jnp.int32)


def _lowest_kept(logits_V, sampling: Sampling):
    """Returns the smallest logit that top_k and top_p keep."""
    sorted_V = jnp.sort(logits_V, descending=True)
    if sampling.top_k is not None:
        sorted_V = jnp.where(jnp.arange(len(sorted_V)) < sampling.top_k, sorted_V, -jnp.inf)
    kept_V = sorted_V > -jnp.inf
    if sampling.top_p is not None:
        probabilities_V = jax.nn.softmax(sorted_V)
        kept_V &= jnp.cumsum(probabilities_V) - probabilities_V < sampling.top_p
        kept_V = kept_V.at[0].set(True)  # keeps the first id even if top_p underflows in float32
    return jnp.where(kept_V, sorted_V, jnp.inf).min()
