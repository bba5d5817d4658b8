"""Attention with all T x S weights in memory."""

import jax
import jax.numpy as jnp

from EasyLM.models.attention.mask import MASKED_SCORE, AttentionMask


def xla_attention(q_BTGK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: AttentionMask) -> jax.Array:
    """Returns the attention's output in the shape and dtype of q. T is a multiple of S, the number of tokens."""
    batch, queries, heads, head_dim = q_BTGK.shape
    keys = k_BSGK.shape[1]
    t, s = jnp.arange(queries), jnp.arange(keys)
    scores_BGTS = jnp.einsum("BTGK,BSGK->BGTS", q_BTGK, k_BSGK, preferred_element_type=jnp.float32) * head_dim**-0.5
    allowed_BTS = mask.allowed(batch, t // (queries // keys), s)
    weights_BGTS = jax.nn.softmax(jnp.where(allowed_BTS[:, None], scores_BGTS, MASKED_SCORE), axis=-1)
    factor_BGTS = mask.dropout_factor(batch, heads, t, s)
    if factor_BGTS is not None:
        weights_BGTS = weights_BGTS * factor_BGTS
    return jnp.einsum("BGTS,BSGK->BTGK", weights_BGTS.astype(q_BTGK.dtype), v_BSGK)
