"""Keys and values of the tokens so far, for decoding: the prompt's, shared by all candidates, and each candidate's own.

Shapes: P prompts, N candidates of each, S prompt tokens, M places for new tokens, H heads, K head dimension.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

_LOWEST = -1e30  # instead of -inf, whose differences are NaN


@partial(jax.tree_util.register_dataclass, data_fields=("prompt_PHSK", "new_PHNMK"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's (keys, values). Buffers of their own: a stack of layers would be copied to write one token."""

    prompt_PHSK: tuple[jax.Array, jax.Array]  # noqa: N815
    new_PHNMK: tuple[jax.Array, jax.Array]  # noqa: N815


def start(k_PSHK: jax.Array, v_PSHK: jax.Array, num_candidates: int, length: int) -> LayerCache:
    """The cache after a prompt, with `length` places for each candidate's new tokens."""
    prompts, _, heads, head_dim = k_PSHK.shape
    empty = jnp.zeros((prompts, heads, num_candidates, length, head_dim), k_PSHK.dtype)
    return LayerCache((k_PSHK.swapaxes(1, 2), v_PSHK.swapaxes(1, 2)), (empty, empty))


def grown(cache: LayerCache, length: int) -> LayerCache:
    """The same with `length` places for new tokens."""
    padding = ((0, 0), (0, 0), (0, 0), (0, length - cache.new_PHNMK[0].shape[3]), (0, 0))
    return dataclasses.replace(cache, new_PHNMK=tuple(jnp.pad(x, padding) for x in cache.new_PHNMK))


def attend(
    cache: LayerCache, q_PNHK: jax.Array, k_PNHK: jax.Array, v_PNHK: jax.Array, valid_PS: jax.Array, index: jax.Array
) -> tuple[jax.Array, LayerCache]:
    """Stores the keys and values of new token `index` (from 0) and attends to all tokens up to it.

    Args:
      valid_PS: 1 for a token of the prompt, 0 for padding.

    Returns:
      ([P, N, H, K] in q's dtype, the cache with the token).
    """
    new_k_PHNMK, new_v_PHNMK = (
        jax.lax.dynamic_update_slice_in_dim(new, x_PNHK.swapaxes(1, 2)[:, :, :, None], index, 3)
        for new, x_PNHK in zip(cache.new_PHNMK, (k_PNHK, v_PNHK), strict=True)
    )
    prompt_k_PHSK, prompt_v_PHSK = cache.prompt_PHSK
    q_PHNK = q_PNHK.swapaxes(1, 2)
    to_prompt_PHNS = jnp.einsum("PHNK,PHSK->PHNS", q_PHNK, prompt_k_PHSK, preferred_element_type=jnp.float32)
    to_new_PHNM = jnp.einsum("PHNK,PHNMK->PHNM", q_PHNK, new_k_PHNMK, preferred_element_type=jnp.float32)
    written_M = jnp.arange(new_k_PHNMK.shape[3]) <= index
    scores = jnp.concatenate(
        (
            jnp.where(valid_PS[:, None, None, :] != 0, to_prompt_PHNS, _LOWEST),
            jnp.where(written_M[None, None, None, :], to_new_PHNM, _LOWEST),
        ),
        axis=-1,
    )
    weights = jax.nn.softmax(scores * q_PNHK.shape[-1] ** -0.5, axis=-1).astype(q_PNHK.dtype)
    on_prompt_PHNS, on_new_PHNM = jnp.split(weights, (valid_PS.shape[1],), axis=-1)
    out_PHNK = jnp.einsum("PHNS,PHSK->PHNK", on_prompt_PHNS, prompt_v_PHSK)
    out_PHNK += jnp.einsum("PHNM,PHNMK->PHNK", on_new_PHNM, new_v_PHNMK)
    return out_PHNK.swapaxes(1, 2), dataclasses.replace(cache, new_PHNMK=(new_k_PHNMK, new_v_PHNMK))
