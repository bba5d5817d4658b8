"""Causal self-attention: one function, three implementations of the same numbers.

Shapes: B batch, T queries, S keys (as many), H heads, K head dimension.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from EasyLM.errors import UserError

_LOWEST = -1e30  # instead of -inf, whose differences are NaN
_CPU_CHUNK = 128  # a chunk's scores stay in the cache: forward and backward take 0.84 of the time that 256 take
_CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("valid_BS", "forget_key", "dropout_key"),
    meta_fields=("forget_ratios", "dropout_rate"),
)
@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which keys a query sees besides the causal rule, as a function of indices: however it is chunked, it is the same.

    A query always sees its own key, so that no row is empty.

    Attributes:
      valid_BS: 1 for a token, 0 for padding; None: all are tokens.
      forget_key: PRNG key of the forgetful causal mask (FCM, arXiv 2210.13432), or None: each query drops a random
        share, uniform between the two `forget_ratios`, of its past keys, but never key 0.
      dropout_key: PRNG key of the dropout on the attention weights, with `dropout_rate`, or None.
    """

    valid_BS: jax.Array | None = None  # noqa: N815
    forget_key: jax.Array | None = None
    forget_ratios: tuple[float, float] = (0.0, 0.0)
    dropout_key: jax.Array | None = None
    dropout_rate: float = 0.0

    def with_dropout(self, key: jax.Array | None, rate: float) -> "Pattern":
        """The same pattern with dropout, if there is a key and a rate."""
        return self if key is None or rate == 0 else dataclasses.replace(self, dropout_key=key, dropout_rate=rate)

    def sees_BTS(self, batch: int, t_T: jax.Array, s_S: jax.Array) -> jax.Array:
        """Whether queries at positions `t_T` see keys at positions `s_S`; the batch dimension may be 1."""
        t, s = t_T[None, :, None], s_S[None, None, :]
        past = s < t
        if self.valid_BS is not None:
            past &= jnp.take(self.valid_BS, s_S, axis=1, mode="clip")[:, None, :] != 0
        if self.forget_key is not None:
            low, high = self.forget_ratios
            b = jnp.arange(batch)[:, None, None]
            ratio_BT1 = low + (high - low) * _uniform(jax.random.fold_in(self.forget_key, 0), b, t)
            past &= (_uniform(jax.random.fold_in(self.forget_key, 1), b, t, s) >= ratio_BT1) | (s == 0)
        return past | (s == t)

    def keeps_BHTS(self, batch: int, heads: int, t_T: jax.Array, s_S: jax.Array) -> jax.Array | None:
        """The factors of the weights under dropout, 0 or 1 / (1 - rate); None without dropout."""
        if self.dropout_key is None:
            return None
        b, h = jnp.arange(batch)[:, None, None, None], jnp.arange(heads)[None, :, None, None]
        u_BHTS = _uniform(self.dropout_key, b, h, t_T[None, None, :, None], s_S[None, None, None, :])
        return (u_BHTS >= self.dropout_rate) / (1 - self.dropout_rate)


def attention(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    pattern: Pattern = Pattern(),
    *,
    implementation: str = "auto",
    query_chunk: int = 1024,
    key_chunk: int = 1024,
) -> jax.Array:
    """Causal attention of each query to the keys at its position and before, with float32 softmax.

    Args:
      implementation: "xla" forms all T x S weights; "blockwise" walks over chunks (of any size) in linear memory;
        "cudnn" is NVIDIA's kernel, for bf16 and fp16; "auto" is cudnn on a GPU where it applies, blockwise
        in small chunks on a CPU, else xla.

    Returns:
      [B, T, H, K] in q's dtype.

    Raises:
      UserError: where cudnn is asked for and does not apply.
    """
    assert q_BTHK.shape == k_BSHK.shape == v_BSHK.shape
    kernel_applies = q_BTHK.dtype in _CUDNN_DTYPES and pattern.dropout_key is None and jax.default_backend() == "gpu"
    if implementation == "auto" and jax.default_backend() == "cpu":
        implementation, query_chunk, key_chunk = "blockwise", _CPU_CHUNK, _CPU_CHUNK
    elif implementation == "auto":
        implementation = "cudnn" if kernel_applies and pattern.forget_key is None else "xla"
    if implementation == "cudnn":
        if not kernel_applies:
            raise UserError(
                "llama.attention_implementation='cudnn': needs a GPU, --dtype=bf16 or fp16, and attn_pdrop=0; here are "
                f"{jax.default_backend()}, {q_BTHK.dtype}, attn_pdrop={pattern.dropout_rate}; choose 'auto' or 'xla'"
            )
        return _cudnn(q_BTHK, k_BSHK, v_BSHK, pattern)
    if implementation == "xla":
        return checkpoint_name(_xla(q_BTHK, k_BSHK, v_BSHK, pattern), "attention")
    assert implementation == "blockwise"
    length = q_BTHK.shape[1]
    return _blockwise(q_BTHK, k_BSHK, v_BSHK, pattern, min(query_chunk, length), min(key_chunk, length))


def _xla(q_BTHK, k_BSHK, v_BSHK, pattern):
    batch, length, heads, head_dim = q_BTHK.shape
    positions = jnp.arange(length)
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK, preferred_element_type=jnp.float32) * head_dim**-0.5
    sees_BTS = pattern.sees_BTS(batch, positions, positions)
    weights_BHTS = jax.nn.softmax(jnp.where(sees_BTS[:, None], scores_BHTS, _LOWEST), axis=-1)
    keeps_BHTS = pattern.keeps_BHTS(batch, heads, positions, positions)
    if keeps_BHTS is not None:
        weights_BHTS = weights_BHTS * keeps_BHTS
    return jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS.astype(q_BTHK.dtype), v_BSHK)


def _cudnn(q_BTHK, k_BSHK, v_BSHK, pattern):
    batch, length, _, head_dim = q_BTHK.shape
    if pattern.valid_BS is None and pattern.forget_key is None:
        mask = None
    else:
        positions = jnp.arange(length)
        mask = jnp.broadcast_to(pattern.sees_BTS(batch, positions, positions), (batch, length, length))[:, None]
    # The kernel takes head dimensions that are multiples of 8. Zeros change no score, and the scale is the true one.
    padding = ((0, 0), (0, 0), (0, 0), (0, -head_dim % 8))
    q, k, v = (jnp.pad(x, padding) for x in (q_BTHK, k_BSHK, v_BSHK))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, scale=head_dim**-0.5, implementation="cudnn")
    return out[..., :head_dim]


# The blockwise implementation is FlashAttention-2 (arXiv 2307.08691) in plain JAX. Chunks that lie wholly in the future
# are never visited. Padded keys lie in the future of every true query; padded queries are cut off, their gradients 0.
# Shapes: t queries of a chunk, s keys of a chunk, i and j count chunks of queries and keys.


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _blockwise(q_BTHK, k_BSHK, v_BSHK, pattern, query_chunk, key_chunk):
    return _blockwise_forward(q_BTHK, k_BSHK, v_BSHK, pattern, query_chunk, key_chunk)[0]


def _blockwise_forward(q_BTHK, k_BSHK, v_BSHK, pattern, query_chunk, key_chunk):
    batch, length, heads, head_dim = q_BTHK.shape
    q_BHTK, k_BHSK, v_BHSK = _heads_first(q_BTHK, query_chunk), *(_heads_first(x, key_chunk) for x in (k_BSHK, v_BSHK))
    num_keys = k_BHSK.shape[2] // key_chunk

    def attend(i):
        q_BHtK, t = _chunk(q_BHTK, i, query_chunk), _positions(i, query_chunk)

        def add_keys(j, carry):
            sum_BHtK, norm_BHt, top_BHt = carry
            k_BHsK, v_BHsK, s = _chunk(k_BHSK, j, key_chunk), _chunk(v_BHSK, j, key_chunk), _positions(j, key_chunk)
            scores_BHts = _einsum("BHtK,BHsK->BHts", q_BHtK, k_BHsK) * head_dim**-0.5
            scores_BHts = jnp.where(pattern.sees_BTS(batch, t, s)[:, None], scores_BHts, _LOWEST)
            new_top_BHt = jnp.maximum(top_BHt, scores_BHts.max(-1))
            fade_BHt = jnp.exp(top_BHt - new_top_BHt)
            weights_BHts = jnp.exp(scores_BHts - new_top_BHt[..., None])
            norm_BHt = norm_BHt * fade_BHt + weights_BHts.sum(-1)
            keeps_BHts = pattern.keeps_BHTS(batch, heads, t, s)
            weights_BHts = weights_BHts if keeps_BHts is None else weights_BHts * keeps_BHts
            added_BHtK = _einsum("BHts,BHsK->BHtK", weights_BHts.astype(v_BHsK.dtype), v_BHsK)
            return sum_BHtK * fade_BHt[..., None] + added_BHtK, norm_BHt, new_top_BHt

        shape = (batch, heads, query_chunk)
        start = jnp.zeros((*shape, head_dim)), jnp.zeros(shape), jnp.full(shape, _LOWEST)
        keys_end = jnp.minimum(((i + 1) * query_chunk - 1) // key_chunk + 1, num_keys)  # the last query's own key is in
        sum_BHtK, norm_BHt, top_BHt = jax.lax.fori_loop(0, keys_end, add_keys, start)
        return (sum_BHtK / norm_BHt[..., None]).astype(q_BTHK.dtype), top_BHt + jnp.log(norm_BHt)

    out_iBHtK, lse_iBHt = jax.lax.map(attend, jnp.arange(q_BHTK.shape[2] // query_chunk))
    return _tokens_first(out_iBHtK, length), lse_iBHt


def _blockwise_vjp_forward(q_BTHK, k_BSHK, v_BSHK, pattern, query_chunk, key_chunk):
    out_BTHK, lse_iBHt = _blockwise_forward(q_BTHK, k_BSHK, v_BSHK, pattern, query_chunk, key_chunk)
    out_BTHK, lse_iBHt = checkpoint_name(out_BTHK, "attention"), checkpoint_name(lse_iBHt, "attention")
    return out_BTHK, (q_BTHK, k_BSHK, v_BSHK, pattern, out_BTHK, lse_iBHt)


def _blockwise_vjp_backward(query_chunk, key_chunk, residuals, dout_BTHK):
    q_BTHK, k_BSHK, v_BSHK, pattern, out_BTHK, lse_iBHt = residuals
    batch, length, heads, head_dim = q_BTHK.shape
    dtype, scale = q_BTHK.dtype, head_dim**-0.5
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
            # Keys before queries: then the products for dk and dv, two of three, contract a last axis with a first.
            scores_BHst = _einsum("BHsK,BHtK->BHst", k_BHsK, q_BHtK) * scale
            sees_BHst = pattern.sees_BTS(batch, t, s).swapaxes(1, 2)[:, None]
            weights_BHst = jnp.exp(jnp.where(sees_BHst, scores_BHst, _LOWEST) - lse_iBHt[i][:, :, None])
            dweights_BHst = _einsum("BHsK,BHtK->BHst", v_BHsK, dout_BHtK)
            keeps_BHts, kept_BHst = pattern.keeps_BHTS(batch, heads, t, s), weights_BHst
            if keeps_BHts is not None:
                kept_BHst, dweights_BHst = (x * keeps_BHts.swapaxes(2, 3) for x in (weights_BHst, dweights_BHst))
            dscores_BHst = (weights_BHst * (dweights_BHst - delta_BHt[:, :, None]) * scale).astype(dtype)
            dv_BHsK += _einsum("BHst,BHtK->BHsK", kept_BHst.astype(dtype), dout_BHtK)
            dk_BHsK += _einsum("BHst,BHtK->BHsK", dscores_BHst, q_BHtK)
            dq_BHtK = _chunk(dq_BHTK, i, query_chunk) + _einsum("BHst,BHsK->BHtK", dscores_BHst, k_BHsK)
            return jax.lax.dynamic_update_slice_in_dim(dq_BHTK, dq_BHtK, i * query_chunk, 2), dk_BHsK, dv_BHsK

        zeros_BHsK = jnp.zeros(k_BHsK.shape)
        first = jnp.minimum(j * key_chunk // query_chunk, num_queries)
        start = dq_BHTK, zeros_BHsK, zeros_BHsK
        dq_BHTK, dk_BHsK, dv_BHsK = jax.lax.fori_loop(first, num_queries, add_queries, start)
        return dq_BHTK, (dk_BHsK.astype(dtype), dv_BHsK.astype(dtype))

    key_chunks = jnp.arange(k_BHSK.shape[2] // key_chunk)
    dq_BHTK, (dk_jBHsK, dv_jBHsK) = jax.lax.scan(key_step, jnp.zeros(q_BHTK.shape), key_chunks)
    dq_BTHK = dq_BHTK.swapaxes(1, 2)[:, :length].astype(dtype)
    return dq_BTHK, _tokens_first(dk_jBHsK, length), _tokens_first(dv_jBHsK, length), None


_blockwise.defvjp(_blockwise_vjp_forward, _blockwise_vjp_backward)

_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _heads_first(x_BTH: jax.Array, chunk: int) -> jax.Array:
    """[B, T, H, ...] as [B, H, T, ...], with T filled up by zeros to whole chunks."""
    x_BHT = x_BTH.swapaxes(1, 2)
    return jnp.pad(x_BHT, ((0, 0), (0, 0), (0, -x_BHT.shape[2] % chunk)) + ((0, 0),) * (x_BHT.ndim - 3))


def _tokens_first(x_iBHtK: jax.Array, length: int) -> jax.Array:
    """The chunks of [i, B, H, t, K] joined to [B, T, H, K], without what filled them up."""
    _, batch, heads, _, head_dim = x_iBHtK.shape
    return x_iBHtK.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, head_dim)[:, :length]


def _chunk(x_BHT: jax.Array, i, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_BHT, i * size, size, 2)


def _positions(i, size: int) -> jax.Array:
    return i * size + jnp.arange(size)


def _uniform(key: jax.Array, *indices: jax.Array) -> jax.Array:
    """Uniform float32 in [0, 1), a function of the key and the (broadcast) indices: computed in place, never stored.

    Each index is stirred in by a 32-bit hash with low bias (Wellons, "Prospecting for hash functions", 2018).
    """
    x = jax.random.bits(key, (), jnp.uint32)
    x = jnp.reshape(x, (1,) * indices[0].ndim)
    for index in indices:
        x = x + index.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return (x >> 8).astype(jnp.float32) * 2.0**-24
