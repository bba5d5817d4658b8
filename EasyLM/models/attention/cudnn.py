"""Attention with the fused kernel of cuDNN, on NVIDIA GPUs."""

import jax
import jax.numpy as jnp

from EasyLM.models.attention.mask import AttentionMask

_DTYPES = (jnp.bfloat16, jnp.float16)  # the types that the kernel supports


def cudnn_applies(dtype: jnp.dtype, mask: AttentionMask) -> bool:
    """Whether the kernel supports this backend, dtype and mask."""
    return dtype in _DTYPES and mask.dropout_key is None and jax.default_backend() == "gpu"


def cudnn_attention(q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, mask: AttentionMask) -> jax.Array:
    """Returns the attention's output [B, T, H, K] in q's dtype."""
    batch, length, _, head_dim = q_BTHK.shape
    if mask.valid_BS is None and mask.forget_key is None:
        allowed_B1TS = None
    else:
        positions = jnp.arange(length)
        allowed_BTS = jnp.broadcast_to(mask.allowed(batch, positions, positions), (batch, length, length))
        allowed_B1TS = allowed_BTS[:, None]
    # The kernel needs a head dimension that is a multiple of 8. Padding with zeros does not change the scores. The
    # scale uses the unpadded dimension.
    padding = ((0, 0), (0, 0), (0, 0), (0, -head_dim % 8))
    q, k, v = (jnp.pad(x, padding) for x in (q_BTHK, k_BSHK, v_BSHK))
    scale = head_dim**-0.5
    out = jax.nn.dot_product_attention(q, k, v, mask=allowed_B1TS, is_causal=True, scale=scale, implementation="cudnn")
    return out[..., :head_dim]
