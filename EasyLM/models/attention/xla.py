"""Attention with all T x S weights in memory."""

import jax
import jax.numpy as jnp

from EasyLM.models.attention.mask import MASKED_SCORE, AttentionMask


def xla_attention(q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, mask: AttentionMask) -> jax.Array:
    """Returns the attention's output [B, T, H, K] in q's dtype."""
    batch, length, heads, head_dim = q_BTHK.shape
    positions = jnp.arange(length)
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK, preferred_element_type=jnp.float32) * head_dim**-0.5
    allowed_BTS = mask.allowed(batch, positions, positions)
    weights_BHTS = jax.nn.softmax(jnp.where(allowed_BTS[:, None], scores_BHTS, MASKED_SCORE), axis=-1)
    factor_BHTS = mask.dropout_factor(batch, heads, positions, positions)
    if factor_BHTS is not None:
        weights_BHTS = weights_BHTS * factor_BHTS
    return jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS.astype(q_BTHK.dtype), v_BSHK)
