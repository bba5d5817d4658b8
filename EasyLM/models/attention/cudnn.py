"""Attention with the fused kernel of cuDNN, on NVIDIA GPUs."""

import jax
import jax.numpy as jnp

from EasyLM.models.attention.mask import AttentionMask

_DTYPES = (jnp.bfloat16, jnp.float16)  # the types that the kernel supports


def cudnn_applies(platform: str, dtype: jnp.dtype, mask: AttentionMask) -> bool:
    """Whether the kernel supports this platform, dtype and mask, with memory that is linear in the length."""
    # JAX's public interface of the kernel has no argument for documents. The private one of JAX 0.10 packs them (its
    # `q_offsets`), but needs a Hopper GPU and a static limit of the documents in a row, keeps statistics for each of
    # them and all tokens, and takes the offsets of grouped keys in units of the queries' heads.
    unsupported = mask.dropout_key, mask.forget_key, mask.first_BT
    return platform == "gpu" and dtype in _DTYPES and all(value is None for value in unsupported)


def cudnn_attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: AttentionMask) -> jax.Array:
    """Returns the attention's output [B, T, H, K] in q's dtype. Padding must be on the left."""
    if mask.valid_BS is None:
        return _kernel(q_BTHK, k_BSGK, v_BSGK)
    # The kernel takes lengths of rows that are padded on the right; a mask would be an array [B, T, S].
    valid_BS11 = (mask.valid_BS != 0)[:, :, None, None]
    length_B = jnp.sum(mask.valid_BS != 0, axis=1, dtype=jnp.int32)
    shift_B = mask.valid_BS.shape[1] - length_B

    def to_right(x_BSHK):
        # The kernel may leave gradients at padded positions unwritten. `where` replaces them by zeros.
        return _rolled(jnp.where(valid_BS11, x_BSHK, 0), -shift_B)

    out_BTHK = _rolled(_kernel(to_right(q_BTHK), to_right(k_BSGK), to_right(v_BSGK), length_B), shift_B)
    v_BSHK = jnp.repeat(v_BSGK, q_BTHK.shape[2] // v_BSGK.shape[2], axis=2)
    return jnp.where(valid_BS11, out_BTHK, v_BSHK)  # a padded query attends to its own key only


def _kernel(q_BTHK, k_BSGK, v_BSGK, length_B=None):
    """Returns causal attention [B, T, H, K], of the first `length_B` tokens of each row if given."""
    head_dim = q_BTHK.shape[-1]
    # The kernel needs a head dimension that is a multiple of 8. Padding with zeros does not change the scores. The
    # scale uses the unpadded dimension.
    padding = ((0, 0), (0, 0), (0, 0), (0, -head_dim % 8))
    q, k, v = (jnp.pad(x, padding) for x in (q_BTHK, k_BSGK, v_BSGK))
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        scale=head_dim**-0.5,
        query_seq_lengths=length_B,
        key_value_seq_lengths=length_B,
        implementation="cudnn",
    )
    return out[..., :head_dim]


def _rolled(x_BTHK: jax.Array, shift_B: jax.Array) -> jax.Array:
    """Rolls each row along time by its own shift, to the right if positive."""
    length = x_BTHK.shape[1]
    index_BT = (jnp.arange(length)[None] - shift_B[:, None]) % length
    return jnp.take_along_axis(x_BTHK, index_BT[:, :, None, None], axis=1)
