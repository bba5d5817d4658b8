"""Selects the implementation of attention."""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from EasyLM.errors import UserError
from EasyLM.models.attention.blockwise import blockwise_attention
from EasyLM.models.attention.cudnn import cudnn_applies, cudnn_attention
from EasyLM.models.attention.mask import AttentionMask
from EasyLM.models.attention.sequence_split import heads_to_tokens, tokens_to_heads
from EasyLM.models.attention.splash import splash_applies, splash_attention
from EasyLM.models.attention.xla import xla_attention
from EasyLM.models.tuning import CPU_ATTENTION_CHUNK

IMPLEMENTATIONS = ("auto", "xla", "blockwise", "cudnn", "splash")


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: AttentionMask,
    *,
    platform: str | None = None,
    mesh: Mesh | None = None,
    implementation: str = "auto",
    query_chunk: int = 1024,
    key_chunk: int = 1024,
) -> jax.Array:
    """Computes causal attention with a float32 softmax.

    G divides H: the first H / G queries attend to the first head of keys and values, and so on (grouped queries).

    Args:
      platform: the platform of the devices that run the computation: "cpu", "gpu" or "tpu". None means JAX's default
        backend.
      mesh: the mesh of the arrays: rows are split over dp and fsdp, tokens over sp, heads over mp. If sp is not 1, it
        divides T, and sp x mp divides H and G.
      implementation: "xla" holds all T x S weights in memory. "blockwise" iterates over chunks in linear memory.
        "cudnn" is NVIDIA's kernel, for bf16 and fp16; "splash" is a kernel for TPUs. "auto" selects blockwise with
        small chunks on a CPU, cudnn on a GPU, and splash on a TPU, if the kernel supports the inputs; otherwise
        blockwise.
      query_chunk, key_chunk: chunk sizes of "blockwise". They need not divide the length.

    Returns:
      [B, T, H, K] in q's dtype.

    Raises:
      UserError: if a kernel is requested that does not support the inputs.
    """
    batch, length, heads, head_dim = q_BTHK.shape
    assert k_BSGK.shape == v_BSGK.shape == (batch, length, k_BSGK.shape[2], head_dim) and heads % k_BSGK.shape[2] == 0
    platform = platform or jax.default_backend()
    if implementation == "auto":
        implementation = _automatic(platform, q_BTHK.dtype, mask)
        if platform == "cpu":
            query_chunk = key_chunk = CPU_ATTENTION_CHUNK
    _check_kernel(implementation, platform, q_BTHK.dtype, mask)
    how = partial(
        _attend, mask=mask, mesh=mesh, implementation=implementation, query_chunk=query_chunk, key_chunk=key_chunk
    )
    if mesh is None or mesh.shape["sp"] == 1:
        return how(q_BTHK, k_BSGK, v_BSGK)
    return heads_to_tokens(how(*(tokens_to_heads(x, mesh) for x in (q_BTHK, k_BSGK, v_BSGK))), mesh)


def _attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: AttentionMask,
    mesh: Mesh | None,
    implementation: str,
    query_chunk: int,
    key_chunk: int,
) -> jax.Array:
    """Computes attention with an implementation that supports the inputs."""
    if implementation == "cudnn":
        return cudnn_attention(q_BTHK, k_BSGK, v_BSGK, mask)
    if implementation == "splash":
        return splash_attention(q_BTHK, k_BSGK, v_BSGK, mask, mesh)
    length, group = q_BTHK.shape[1], q_BTHK.shape[2] // k_BSGK.shape[2]
    # The queries of a group follow each other along time, so both implementations work on G heads.
    q_BTGK = rearrange(q_BTHK, "B T (G R) K -> B (T R) G K", R=group)
    if implementation == "xla":
        out_BTGK = checkpoint_name(xla_attention(q_BTGK, k_BSGK, v_BSGK, mask), "attention")
    else:
        assert implementation == "blockwise"
        chunks = min(query_chunk, length) * group, min(key_chunk, length)
        out_BTGK = blockwise_attention(q_BTGK, k_BSGK, v_BSGK, mask, *chunks)
    return rearrange(out_BTGK, "B (T R) G K -> B T (G R) K", R=group)


def _automatic(platform: str, dtype: jnp.dtype, mask: AttentionMask) -> str:
    """Returns the implementation that "auto" selects."""
    if cudnn_applies(platform, dtype, mask):
        return "cudnn"
    return "splash" if splash_applies(platform, mask) else "blockwise"


def _check_kernel(implementation: str, platform: str, dtype: jnp.dtype, mask: AttentionMask) -> None:
    """Raises UserError if a kernel does not support the inputs."""
    document_mask = "no document mask" if mask.first_BT is None else "a document mask"
    inputs = f"a dropout rate of {mask.dropout_rate}, forget ratios of {mask.forget_ratios} and {document_mask}"
    if implementation == "cudnn" and not cudnn_applies(platform, dtype, mask):
        raise UserError(
            "attention implementation 'cudnn' needs a GPU, bf16 or fp16, no dropout on the weights, no forgetful "
            f"causal mask and no document mask; here are {platform}, {dtype}, {inputs}; choose 'auto' or 'blockwise'"
        )
    if implementation == "splash" and not splash_applies(platform, mask):
        raise UserError(
            "attention implementation 'splash' needs a TPU, no dropout on the weights and no forgetful causal mask; "
            f"here are {platform}, {inputs}; choose 'auto' or 'blockwise'"
        )
