"""Samples tokens from logits with temperature, top-k and top-p."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp

from EasyLM.errors import UserError

_MIN_TEMPERATURE = 1e-6  # logits divided by a smaller value may overflow
_MAX_TOP_K = 2**31 - 1  # the largest int32; it exceeds every vocabulary


@partial(jax.tree_util.register_dataclass, data_fields=("temperature", "top_k", "top_p"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings for sampling. All values are traced: one compiled program serves all settings.

    Attributes:
      temperature: divides the logits; at least 1e-6. 0 means greedy sampling.
      top_k: keeps the k most likely ids, and all ids that tie with the least likely of these. The default keeps all.
      top_p: among these, keeps the smallest set of most likely ids with this total probability (arXiv 1904.09751).
        The default keeps all. It is not 1, because a sum of float32 probabilities can reach 1 before the last id.
    """

    temperature: float = 0.0
    top_k: int = _MAX_TOP_K
    top_p: float = math.inf


def check_sampling(temperature: float, top_k: int, top_p: float) -> Sampling:
    """Validates user settings and converts them. Values 0, 0 and 1 disable the respective settings.

    Raises:
      UserError: if a setting is out of range. The message names the setting, its value and its range.
    """
    if temperature != 0 and not _MIN_TEMPERATURE <= temperature < math.inf:
        raise UserError(
            f"temperature={temperature}: must be 0 (the most likely token), or finite and at least {_MIN_TEMPERATURE}"
        )
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must be above 0 and at most 1 (off)")
    if top_k < 0:
        raise UserError(f"top_k={top_k}: must be 0 (off) or above")
    return Sampling(float(temperature), min(top_k or _MAX_TOP_K, _MAX_TOP_K), float(top_p) if top_p < 1 else math.inf)


def check_seed(seed: int) -> None:
    """Checks the seed of a user. All programs accept the same range.

    Raises:
      UserError: if the seed is out of range. The message names the range.
    """
    if not 0 <= seed < 2**31:
        raise UserError(f"seed={seed}: must be 0..{2**31 - 1}")


def sample(logits_V: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Samples one token id from logits [V].

    A program with a branch for each kind of sampling serves all settings. Under `vmap` over logits and keys it still
    runs only one branch, so that sampling without top_k and top_p does not sort.
    """
    has_limits = (sampling.top_k < len(logits_V)) | (sampling.top_p < 1)
    branch = jnp.where(sampling.temperature == 0, 0, jnp.where(has_limits, 2, 1))
    return jax.lax.switch(branch, (_most_likely, _from_all, _from_kept), logits_V, sampling, key)


def _most_likely(logits_V, sampling: Sampling, key):
    return logits_V.argmax().astype(jnp.int32)


def _from_all(logits_V, sampling: Sampling, key):
    return jax.random.categorical(key, logits_V.astype(jnp.float32) / sampling.temperature).astype(jnp.int32)


def _from_kept(logits_V, sampling: Sampling, key):
    logits_V = logits_V.astype(jnp.float32) / sampling.temperature
    logits_V = jnp.where(logits_V >= _lowest_kept(logits_V, sampling), logits_V, -jnp.inf)
    return jax.random.categorical(key, logits_V).astype(jnp.int32)


def _lowest_kept(logits_V, sampling: Sampling):
    """Returns the smallest logit that top_k and top_p keep."""
    sorted_V = jnp.sort(logits_V, descending=True)
    sorted_V = jnp.where(jnp.arange(len(sorted_V)) < sampling.top_k, sorted_V, -jnp.inf)
    probabilities_V = jax.nn.softmax(sorted_V)
    kept_V = (sorted_V > -jnp.inf) & (jnp.cumsum(probabilities_V) - probabilities_V < sampling.top_p)
    kept_V = kept_V.at[0].set(True)  # keeps the first id even if top_p underflows in float32
    return jnp.where(kept_V, sorted_V, jnp.inf).min()
