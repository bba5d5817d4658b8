"""Operations in forms that are faster on certain hardware, with the measured gains."""

import jax
import jax.numpy as jnp

# Attention chunk size on a CPU. The scores of a chunk fit in the CPU cache. Forward and backward passes take 0.84 times
# as long as with chunks of 256.
CPU_ATTENTION_CHUNK = 128
# In half precision, fast matrix kernels need dimensions that are multiples of this number. A vocabulary of 8292 is not
# a multiple of 8.
LANES = 128
_ROW_COPIES = 8  # the smallest number of rows of NVIDIA's matrix units


def flat_matmul(x_BTD: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    """Returns `x_BTD @ kernel_DF`, computed with B and T merged into one axis.

    The gradient of the direct product contracts the two axes B and T. XLA's CPU backend copies and transposes an
    operand for this. With merged axes, a train step on a CPU (width 512, 4 layers, 4 x 512 tokens, float32) takes 0.79
    times as long and has 13 transposes instead of 24.
    """
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    y_NF = x_ND @ kernel_DF if len(x_ND) > 1 else row_matmul(x_ND, kernel_DF)
    return y_NF.reshape(*x_BTD.shape[:-1], -1)


def row_matmul(x_1D: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    """Returns `x_1D @ kernel_DF`. On NVIDIA GPUs it multiplies several copies of the row.

    XLA's GPU backend expands a product with a single row: it writes the elementwise products to memory, reads them
    again and sums them. With copies it is a matrix product. A decoding step of vqlm_1b for one prompt of 1,000 tokens
    then has 496 kernels instead of 648, which write 96 MB instead of 1,017 MB (the weights have 2,290 MB).
    """
    return jax.lax.platform_dependent(x_1D, kernel_DF, cuda=_matmul_of_copies, default=jnp.matmul)


def _matmul_of_copies(x_1D, kernel_DF):
    return (jnp.repeat(x_1D, _ROW_COPIES, axis=0) @ kernel_DF)[:1]


def after(index: jax.Array | int, array: jax.Array) -> jax.Array:
    """Returns `index`, with a data dependency on `array`.

    XLA updates a buffer in place only if the update depends on every read of the buffer. `minimum` returns `index` even
    if the array has a NaN. `lax.optimization_barrier` is not sufficient, because the CPU backend removes it too early.
    A decoding step of a model with 8 layers then copies 32 cache arrays instead of none.
    """
    return jnp.minimum(index, index + jnp.isnan(array[(0,) * array.ndim]).astype(jnp.int32))


def converted_late(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """Returns an integer kernel, with a data dependency on `x`, the array that it multiplies.

    Without the dependency, XLA may convert the kernels of all layers before a loop over tokens: the memory is then that
    of the compute type. The CPU backend does so, and removes `lax.optimization_barrier` too early (see `after`).
    """

    def with_addition(kernel, x):
        return kernel + after(0, x).astype(kernel.dtype)

    def with_barrier(kernel, x):
        return jax.lax.optimization_barrier((kernel, x))[0]

    return jax.lax.platform_dependent(kernel, x, cpu=with_addition, default=with_barrier)
