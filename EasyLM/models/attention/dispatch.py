"""Selects the implementation of attention."""

import jax
from jax.ad_checkpoint import checkpoint_name

from EasyLM.errors import UserError
from EasyLM.models.attention.blockwise import blockwise_attention
from EasyLM.models.attention.cudnn import cudnn_applies, cudnn_attention
from EasyLM.models.attention.mask import AttentionMask
from EasyLM.models.attention.xla import xla_attention
from EasyLM.models.tuning import CPU_ATTENTION_CHUNK

IMPLEMENTATIONS = ("auto", "xla", "blockwise", "cudnn")


def attention(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    mask: AttentionMask,
    *,
    platform: str | None = None,
    implementation: str = "auto",
    query_chunk: int = 1024,
    key_chunk: int = 1024,
) -> jax.Array:
    """Computes causal attention with a float32 softmax.

    Args:
      platform: the platform of the devices that run the computation: "cpu", "gpu" or "tpu". None means JAX's default
        backend.
      implementation: "xla" holds all T x S weights in memory. "blockwise" iterates over chunks in linear memory.
        "cudnn" is NVIDIA's kernel, for bf16 and fp16. "auto" selects blockwise with small chunks on a CPU, xla on a
        TPU, and on a GPU cudnn if the kernel supports the inputs, otherwise blockwise.
      query_chunk, key_chunk: chunk sizes of "blockwise". They need not divide the length.

    Returns:
      [B, T, H, K] in q's dtype.

    Raises:
      UserError: if "cudnn" is requested and the kernel does not support the inputs.
    """
    assert q_BTHK.shape == k_BSHK.shape == v_BSHK.shape
    platform = platform or jax.default_backend()
    if implementation == "auto" and platform == "cpu":
        implementation, query_chunk, key_chunk = "blockwise", CPU_ATTENTION_CHUNK, CPU_ATTENTION_CHUNK
    elif implementation == "auto" and platform == "gpu":
        implementation = "cudnn" if cudnn_applies(platform, q_BTHK.dtype, mask) else "blockwise"
    elif implementation == "auto":
        implementation = "xla"
    if implementation == "cudnn":
        if not cudnn_applies(platform, q_BTHK.dtype, mask):
            raise UserError(
                "attention implementation 'cudnn' needs a GPU, bf16 or fp16, no dropout on the weights and no "
                f"forgetful causal mask; here are {platform}, {q_BTHK.dtype}, a dropout rate of {mask.dropout_rate} "
                f"and forget ratios of {mask.forget_ratios}; choose 'auto' or 'blockwise'"
            )
        return cudnn_attention(q_BTHK, k_BSHK, v_BSHK, mask)
    if implementation == "xla":
        return checkpoint_name(xla_attention(q_BTHK, k_BSHK, v_BSHK, mask), "attention")
    assert implementation == "blockwise"
    length = q_BTHK.shape[1]
    return blockwise_attention(q_BTHK, k_BSHK, v_BSHK, mask, min(query_chunk, length), min(key_chunk, length))
