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
        "cudnn" is NVIDIA's kernel, for bf16 and fp16; "auto" is cudnn on a GPU where it applies, else xla.

    Returns:
      [B, T, H, K] in q's dtype.

    Raises:
      UserError: where cudnn is asked for and does not apply.
    """
    assert q_BTHK.shape == k_BSHK.shape == v_BSHK.shape
    kernel_applies = q_BTHK.dtype in _CUDNN_DTYPES and pattern.dropout_key is None and jax.default_backend() == "gpu"
    if implementation == "auto":
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


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _blockwise(q_BTHK, k_BSHK, v_BSHK, pattern, query_chunk, key_chunk):
    return _blockwise_forward(q_BTHK, k_BSHK, v_BSHK, pattern, query_chunk, key_chunk)[0]


def _blockwise_forward(q_BTHK, k_BSHK, v_BSHK, pattern, query_chunk, key_chunk):
    batch, length, heads, head_dim = q_BTHK.shape
    q_BTHK, k_BSHK, v_BSHK = _padded(query_chunk, q_BTHK), _padded(key_chunk, k_BSHK), _padded(key_chunk, v_BSHK)

    def attend(i):
        q_BtHK, t = _chunk(q_BTHK, i, query_chunk)

        def add_keys(j, carry):
            sum_BHtK, norm_BHt, top_BHt = carry
            (k_BsHK, s), (v_BsHK, _) = _chunk(k_BSHK, j, key_chunk), _chunk(v_BSHK, j, key_chunk)
            scores_BHts = _scores(q_BtHK, k_BsHK, pattern, t, s)
            new_top_BHt = jnp.maximum(top_BHt, scores_BHts.max(-1))
            fade_BHt = jnp.exp(top_BHt - new_top_BHt)
            weights_BHts = jnp.exp(scores_BHts - new_top_BHt[..., None])
            norm_BHt = norm_BHt * fade_BHt + weights_BHts.sum(-1)
            keeps_BHts = pattern.keeps_BHTS(batch, heads, t, s)
            weights_BHts = weights_BHts if keeps_BHts is None else weights_BHts * keeps_BHts
            added = _einsum("BHts,BsHK->BHtK", weights_BHts.astype(v_BsHK.dtype), v_BsHK)
            return sum_BHtK * fade_BHt[..., None] + added, norm_BHt, new_top_BHt

        shape = (batch, heads, query_chunk)
        start = jnp.zeros((*shape, head_dim)), jnp.zeros(shape), jnp.full(shape, _LOWEST)
        keys_end = (i * query_chunk + query_chunk - 1) // key_chunk + 1  # chunks up to the last query's own position
        keys_end = jnp.minimum(keys_end, k_BSHK.shape[1] // key_chunk)
        sum_BHtK, norm_BHt, top_BHt = jax.lax.fori_loop(0, keys_end, add_keys, start)
        out_BtHK = (sum_BHtK / norm_BHt[..., None]).swapaxes(1, 2).astype(q_BTHK.dtype)
        return out_BtHK, top_BHt + jnp.log(norm_BHt)

    out_iBtHK, lse_iBHt = jax.lax.map(attend, jnp.arange(q_BTHK.shape[1] // query_chunk))
    out_BTHK = out_iBtHK.swapaxes(0, 1).reshape(batch, -1, heads, head_dim)[:, :length]
    return out_BTHK, lse_iBHt


def _blockwise_vjp_forward(q_BTHK, k_BSHK, v_BSHK, pattern, query_chunk, key_chunk):
    out_BTHK, lse_iBHt = _blockwise_forward(q_BTHK, k_BSHK, v_BSHK, pattern, query_chunk, key_chunk)
    out_BTHK, lse_iBHt = checkpoint_name(out_BTHK, "attention"), checkpoint_name(lse_iBHt, "attention")
    return out_BTHK, (q_BTHK, k_BSHK, v_BSHK, pattern, out_BTHK, lse_iBHt)


def _blockwise_vjp_backward(query_chunk, key_chunk, residuals, dout_BTHK):
    q_BTHK, k_BSHK, v_BSHK, pattern, out_BTHK, lse_iBHt = residuals
    batch, length, heads, head_dim = q_BTHK.shape
    scale = head_dim**-0.5
    delta_BTH = (dout_BTHK.astype(jnp.float32) * out_BTHK.astype(jnp.float32)).sum(-1)
    q_BTHK, dout_BTHK, delta_BTH = (_padded(query_chunk, x) for x in (q_BTHK, dout_BTHK, delta_BTH))
    k_BSHK, v_BSHK = _padded(key_chunk, k_BSHK), _padded(key_chunk, v_BSHK)
    num_queries = q_BTHK.shape[1] // query_chunk

    def key_step(dq_BTHK, j):
        (k_BsHK, s), (v_BsHK, _) = _chunk(k_BSHK, j, key_chunk), _chunk(v_BSHK, j, key_chunk)

        def add_queries(i, carry):
            dq_BTHK, dk_BsHK, dv_BsHK = carry
            (q_BtHK, t), (dout_BtHK, _) = _chunk(q_BTHK, i, query_chunk), _chunk(dout_BTHK, i, query_chunk)
            delta_BHt = _chunk(delta_BTH, i, query_chunk)[0].swapaxes(1, 2)
            weights_BHts = jnp.exp(_scores(q_BtHK, k_BsHK, pattern, t, s) - lse_iBHt[i][..., None])
            dweights_BHts = _einsum("BtHK,BsHK->BHts", dout_BtHK, v_BsHK)
            keeps_BHts = pattern.keeps_BHTS(batch, heads, t, s)
            kept_BHts = weights_BHts
            if keeps_BHts is not None:
                kept_BHts, dweights_BHts = weights_BHts * keeps_BHts, dweights_BHts * keeps_BHts
            dscores_BHts = (weights_BHts * (dweights_BHts - delta_BHt[..., None]) * scale).astype(q_BTHK.dtype)
            dv_BsHK += _einsum("BHts,BtHK->BsHK", kept_BHts.astype(q_BTHK.dtype), dout_BtHK)
            dk_BsHK += _einsum("BHts,BtHK->BsHK", dscores_BHts, q_BtHK)
            dq_BtHK = _chunk(dq_BTHK, i, query_chunk)[0] + _einsum("BHts,BsHK->BtHK", dscores_BHts, k_BsHK)
            return jax.lax.dynamic_update_slice_in_dim(dq_BTHK, dq_BtHK, i * query_chunk, 1), dk_BsHK, dv_BsHK

        zeros = jnp.zeros(k_BsHK.shape)
        first = jnp.minimum(j * key_chunk // query_chunk, num_queries)
        dq_BTHK, dk_BsHK, dv_BsHK = jax.lax.fori_loop(first, num_queries, add_queries, (dq_BTHK, zeros, zeros))
        return dq_BTHK, (dk_BsHK.astype(k_BSHK.dtype), dv_BsHK.astype(v_BSHK.dtype))

    key_chunks = jnp.arange(k_BSHK.shape[1] // key_chunk)
    dq_BTHK, (dk_jBsHK, dv_jBsHK) = jax.lax.scan(key_step, jnp.zeros(q_BTHK.shape), key_chunks)
    dk_BSHK, dv_BSHK = (x.swapaxes(0, 1).reshape(batch, -1, heads, head_dim)[:, :length] for x in (dk_jBsHK, dv_jBsHK))
    return dq_BTHK[:, :length].astype(q_BTHK.dtype), dk_BSHK, dv_BSHK, None


_blockwise.defvjp(_blockwise_vjp_forward, _blockwise_vjp_backward)


def _scores(q_BtHK, k_BsHK, pattern, t, s):
    batch, _, _, head_dim = q_BtHK.shape
    scores_BHts = _einsum("BtHK,BsHK->BHts", q_BtHK, k_BsHK) * head_dim**-0.5
    return jnp.where(pattern.sees_BTS(batch, t, s)[:, None], scores_BHts, _LOWEST)


_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _padded(chunk: int, x_BT: jax.Array) -> jax.Array:
    return jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % chunk)) + ((0, 0),) * (x_BT.ndim - 2))


def _chunk(x_BT: jax.Array, i, size: int) -> tuple[jax.Array, jax.Array]:
    """Chunk i along the sequence, and its positions."""
    return jax.lax.dynamic_slice_in_dim(x_BT, i * size, size, 1), i * size + jnp.arange(size)


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
