"""Measures the rates of the device that the other sections compare with: copy, matmul, attention."""

from functools import partial

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from EasyLM.flags import Flag, run
from EasyLM.models.attention import AttentionMask, attention
from gpu_day.measure import emit, seconds_per_call

FLAGS = {"tiny": Flag(False, "Use small sizes, for a test on a CPU.")}
HEAD_DIMS = (64, 100, 128)  # of vqlm_100m, of vqlm_3b, of the other presets


def main(config: ConfigDict) -> None:
    """Measures with random data, because some operations are faster on zeros."""
    device = jax.devices()[0]
    emit(
        "machine",
        "device",
        kind=device.device_kind,
        platform=device.platform,
        jax=jax.__version__,
        bytes_limit=(device.memory_stats() or {}).get("bytes_limit"),
    )
    elements, side, length = (2**20, 256, 128) if config.tiny else (2**30, 8192, 4096)
    emit("machine", "copy", bytes_per_second=copy_rate(elements))
    for dtype in (jnp.bfloat16, jnp.float32):
        emit("machine", f"matmul, {jnp.dtype(dtype).name}", flops_per_second=matmul_rate(side, dtype))
    for head_dim in HEAD_DIMS[:1] if config.tiny else HEAD_DIMS:
        emit("machine", f"attention, head dimension {head_dim}", **attention_rates(head_dim, length))


def copy_rate(elements: int) -> float:
    """Returns bytes per second, read and written, of a pass over bf16 numbers."""
    array = jax.random.normal(jax.random.key(0), (elements,), jnp.bfloat16)
    double = jax.jit(lambda x: x * 2)
    return 2 * array.nbytes / seconds_per_call(lambda: double(array))


def matmul_rate(side: int, dtype: jnp.dtype) -> float:
    """Returns FLOP/s of a product of two square matrices; float32 without TF32."""
    a, b = (jax.random.normal(key, (side, side), dtype) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(partial(jnp.matmul, precision="highest" if dtype == jnp.float32 else None))
    return 2 * side**3 / seconds_per_call(lambda: product(a, b))


def attention_rates(head_dim: int, length: int) -> dict[str, float]:
    """Returns FLOP/s of attention as the model calls it: forward, and forward with backward. Causal counts half."""
    batch, heads = 2, 16
    shape = batch, length, heads, head_dim
    q, k, v, weight = (jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4))
    attend = partial(attention, mask=AttentionMask())
    forward = jax.jit(attend)
    both = jax.jit(lambda q, k, v: jax.vjp(attend, q, k, v)[1](weight))
    flops = 2 * batch * heads * length**2 * head_dim
    return {
        "forward_flops_per_second": flops / seconds_per_call(lambda: forward(q, k, v)),
        "both_flops_per_second": 3 * flops / seconds_per_call(lambda: both(q, k, v)),
    }


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
