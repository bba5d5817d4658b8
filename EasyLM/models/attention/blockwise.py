"""FlashAttention-2 (arXiv 2307.08691) in plain JAX. Memory is linear in the sequence length.

Chunks of keys that are later than every query of a chunk are skipped. Zeros pad the end of the
last chunk. The causal rule masks padded keys for every real query. Padded queries are removed from the output, and
their gradients are 0.
"""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from EasyLM.models.attention.mask import MASKED_SCORE, AttentionMask


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def blockwise_attention(
    q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, mask: AttentionMask, query_chunk: int, key_chunk: int
) -> jax.Array:
    """Returns the attention's output in the shape and dtype of q. The chunk sizes need not divide the lengths.

    T is a multiple of S: each token has T / S queries, and `query_chunk` is a multiple of this number.
    """
    return _forward(q_BTHK, k_BSHK, v_BSHK, mask, query_chunk, key_chunk)[0]


def _forward(q_BTHK, k_BSHK, v_BSHK, mask, query_chunk, key_chunk):
    """Returns the output [B, T, H, K] and the logarithm of the softmax denominator [i, B, H, t]."""
    batch, length, heads, head_dim = q_BTHK.shape
    group = length // k_BSHK.shape[1]
    q_BHTK = _heads_first(q_BTHK, query_chunk)
    k_BHSK, v_BHSK = (_heads_first(x, key_chunk) for x in (k_BSHK, v_BSHK))
    num_keys = k_BHSK.shape[2] // key_chunk

    def attend(i):
        q_BHtK, t = _chunk(q_BHTK, i, query_chunk), _positions(i, query_chunk)

        def add_keys(j, carry):
            sum_BHtK, norm_BHt, max_BHt = carry
            k_BHsK, v_BHsK, s = _chunk(k_BHSK, j, key_chunk), _chunk(v_BHSK, j, key_chunk), _positions(j, key_chunk)
            scores_BHts = _einsum("BHtK,BHsK->BHts", q_BHtK, k_BHsK) * head_dim**-0.5
            scores_BHts = jnp.where(mask.allowed(batch, t // group, s)[:, None], scores_BHts, MASKED_SCORE)
            new_max_BHt = jnp.maximum(max_BHt, scores_BHts.max(-1))
            rescale_BHt = jnp.exp(max_BHt - new_max_BHt)
            weights_BHts = jnp.exp(scores_BHts - new_max_BHt[..., None])
            norm_BHt = norm_BHt * rescale_BHt + weights_BHts.sum(-1)
            factor_BHts = mask.dropout_factor(batch, heads, t, s)
            weights_BHts = weights_BHts if factor_BHts is None else weights_BHts * factor_BHts
            added_BHtK = _einsum("BHts,BHsK->BHtK", weights_BHts.astype(v_BHsK.dtype), v_BHsK)
            return sum_BHtK * rescale_BHt[..., None] + added_BHtK, norm_BHt, new_max_BHt

        shape = (batch, heads, query_chunk)
        start = jnp.zeros((*shape, head_dim)), jnp.zeros(shape), jnp.full(shape, MASKED_SCORE)
        last_token = ((i + 1) * query_chunk - 1) // group
        keys_end = jnp.minimum(last_token // key_chunk + 1, num_keys)  # skips chunks of later keys
        sum_BHtK, norm_BHt, max_BHt = jax.lax.fori_loop(0, keys_end, add_keys, start)
        return (sum_BHtK / norm_BHt[..., None]).astype(q_BTHK.dtype), max_BHt + jnp.log(norm_BHt)

    out_iBHtK, lse_iBHt = jax.lax.map(attend, jnp.arange(q_BHTK.shape[2] // query_chunk))
    return _tokens_first(out_iBHtK, length), lse_iBHt


def _vjp_forward(q_BTHK, k_BSHK, v_BSHK, mask, query_chunk, key_chunk):
    out_BTHK, lse_iBHt = _forward(q_BTHK, k_BSHK, v_BSHK, mask, query_chunk, key_chunk)
    out_BTHK, lse_iBHt = checkpoint_name(out_BTHK, "attention"), checkpoint_name(lse_iBHt, "attention")
    return out_BTHK, (q_BTHK, k_BSHK, v_BSHK, mask, out_BTHK, lse_iBHt)


def _vjp_backward(query_chunk, key_chunk, residuals, dout_BTHK):
    q_BTHK, k_BSHK, v_BSHK, mask, out_BTHK, lse_iBHt = residuals
    batch, length, heads, head_dim = q_BTHK.shape
    dtype, scale, group = q_BTHK.dtype, head_dim**-0.5, length // k_BSHK.shape[1]
    delta_BTH = (dout_BTHK.astype(jnp.float32) * out_BTHK.astype(jnp.float32)).sum(-1)
    q_BHTK, dout_BHTK, delta_BHT = (_heads_first(x, query_chunk) for x in (q_BTHK, dout_BTHK, delta_BTH))
    k_BHSK, v_BHSK = (_heads_first(x, key_chunk) for x in (k_BSHK, v_BSHK))
    num_queries = q_BHTK.shape[2] // query_chunk

    def key_step(dq_BHTK, j):
        k_BHsK, v_BHsK, s = _chunk(k_BHSK, j, key_chunk), _chunk(v_BHSK, j, key_chunk), _positions(j, key_chunk)

        def add_queries(i, carry):
            dq_BHTK, dk_BHsK, dv_BHsK = carry
            q_BHtK, dout_BHtK, delta_BHt = (_chunk(x, i, query_chunk) for x in (q_BHTK, dout_BHTK, delta_BHT))
            t = _positions(i, query_chunk)
            # With this axis order, the products for dk and dv contract the last axis of these scores.
            scores_BHst = _einsum("BHsK,BHtK->BHst", k_BHsK, q_BHtK) * scale
            allowed_BHst = mask.allowed(batch, t // group, s).swapaxes(1, 2)[:, None]
            weights_BHst = jnp.exp(jnp.where(allowed_BHst, scores_BHst, MASKED_SCORE) - lse_iBHt[i][:, :, None])
            dweights_BHst = _einsum("BHsK,BHtK->BHst", v_BHsK, dout_BHtK)
            factor_BHts, dropped_BHst = mask.dropout_factor(batch, heads, t, s), weights_BHst
            if factor_BHts is not None:
                dropped_BHst, dweights_BHst = (x * factor_BHts.swapaxes(2, 3) for x in (weights_BHst, dweights_BHst))
            dscores_BHst = (weights_BHst * (dweights_BHst - delta_BHt[:, :, None]) * scale).astype(dtype)
            dv_BHsK += _einsum("BHst,BHtK->BHsK", dropped_BHst.astype(dtype), dout_BHtK)
            dk_BHsK += _einsum("BHst,BHtK->BHsK", dscores_BHst, q_BHtK)
            dq_BHtK = _chunk(dq_BHTK, i, query_chunk) + _einsum("BHst,BHsK->BHtK", dscores_BHst, k_BHsK)
            return jax.lax.dynamic_update_slice_in_dim(dq_BHTK, dq_BHtK, i * query_chunk, 2), dk_BHsK, dv_BHsK

        zeros_BHsK = jnp.zeros(k_BHsK.shape)
        first = jnp.minimum(j * key_chunk * group // query_chunk, num_queries)
        start = dq_BHTK, zeros_BHsK, zeros_BHsK
        dq_BHTK, dk_BHsK, dv_BHsK = jax.lax.fori_loop(first, num_queries, add_queries, start)
        return dq_BHTK, (dk_BHsK.astype(dtype), dv_BHsK.astype(dtype))

    key_chunks = jnp.arange(k_BHSK.shape[2] // key_chunk)
    dq_BHTK, (dk_jBHsK, dv_jBHsK) = jax.lax.scan(key_step, jnp.zeros(q_BHTK.shape), key_chunks)
    dq_BTHK = rearrange(dq_BHTK, "B H T K -> B T H K")[:, :length].astype(dtype)
    keys = k_BSHK.shape[1]
    return dq_BTHK, _tokens_first(dk_jBHsK, keys), _tokens_first(dv_jBHsK, keys), None


blockwise_attention.defvjp(_vjp_forward, _vjp_backward)

_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _heads_first(x_BTH: jax.Array, chunk: int) -> jax.Array:
    """Transposes [B, T, H, ...] to [B, H, T, ...] and pads T with zeros to a multiple of the chunk size."""
    x_BHT = rearrange(x_BTH, "B T H ... -> B H T ...")
    return jnp.pad(x_BHT, ((0, 0), (0, 0), (0, -x_BHT.shape[2] % chunk)) + ((0, 0),) * (x_BHT.ndim - 3))


def _tokens_first(x_iBHtK: jax.Array, length: int) -> jax.Array:
    """Joins the chunks of [i, B, H, t, K] to [B, T, H, K] and removes the padding."""
    return rearrange(x_iBHtK, "i B H t K -> B (i t) H K")[:, :length]


def _chunk(x_BHT: jax.Array, i, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_BHT, i * size, size, 2)


def _positions(i, size: int) -> jax.Array:
    return i * size + jnp.arange(size)
