"""Operations of the VQGAN rewritten for speed on CPUs, each beside its plain version.

A plain version defines the result up to float32 rounding; the tests compare the two. The rewrites convolve at the
lower of two resolutions, and read and write large arrays fewer times. Each docstring states the gain: the CPU time of
encoding or decoding images with the plain version, divided by that with the fast one. The shipped tokenizer
(tokenizer/pretrained) was measured on 32 images of 32x32 pixels, the released layout on 8 images of 64x64.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

_CODE_BLOCK = 32  # codes per block of `nearest_code`


def plain_conv_pool(x_BHWC: jax.Array, conv: nnx.Conv) -> jax.Array:
    """Convolves, then averages 2x2 positions."""
    return pool(conv(x_BHWC))


def conv_pool(x_BHWC: jax.Array, conv: nnx.Conv) -> jax.Array:
    """`plain_conv_pool` of a 3x3 convolution as one 4x4 convolution of stride 2. Gain: shipped encoder 1.16.

    The 4x4 kernel is the mean of the 3x3 kernel at the four offsets.
    """
    offsets = [((i, 1 - i), (j, 1 - j), (0, 0), (0, 0)) for i in (0, 1) for j in (0, 1)]
    a, b, c, d = (jnp.pad(conv.kernel[...], offset) for offset in offsets)
    kernel = (a + b + c + d) / 4
    y_BhwC = _convolve(x_BHWC, kernel, conv, 2, ((1, 1), (1, 1)))
    return y_BhwC + conv.bias[...].astype(conv.dtype)[None, None, None]


def plain_upsample_conv(x_BhwC: jax.Array, conv: nnx.Conv) -> jax.Array:
    """Repeats every position to 2x2, then convolves."""
    return conv(upsample(x_BhwC))


def upsample_conv(x_BhwC: jax.Array, conv: nnx.Conv) -> jax.Array:
    """`plain_upsample_conv` of a 3x3 convolution with 4/9 of the products. Gain: decoders 1.15 (shipped), 1.10.

    Of three adjacent rows after upsampling, two are equal. An even output row is therefore a convolution of the
    previous and the current input row with the kernel rows (first, second + third), and an odd one of the current and
    the next input row with (first + second, third). The same holds for columns, so four 2x2 convolutions of the input
    give the four interleaved parts of the output.
    """

    def even_and_odd(kernel, axis):
        first, second, third = jnp.split(kernel, 3, axis)
        return (jnp.concatenate(pair, axis) for pair in ((first, second + third), (first + second, third)))

    def convolve(kernel, odd_row, odd_column):
        return _convolve(x_BhwC, kernel, conv, 1, ((1 - odd_row, odd_row), (1 - odd_column, odd_column)))

    rows = [
        jnp.stack([convolve(kernel, i, j) for j, kernel in enumerate(even_and_odd(row_kernel, 1))], axis=3)
        for i, row_kernel in enumerate(even_and_odd(conv.kernel[...], 0))
    ]
    y_BHWC = rearrange(jnp.stack(rows, axis=2), "B h i w j C -> B (h i) (w j) C")  # i, j: odd row, odd column
    return y_BHWC + conv.bias[...].astype(conv.dtype)[None, None, None]


def pool(x_BHWC: jax.Array) -> jax.Array:
    """Averages 2x2 positions."""
    a, b, c, d = (x_BHWC[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
    return (a + b + c + d) / 4


def upsample(x_BhwC: jax.Array) -> jax.Array:
    """Repeats every position to 2x2 (nearest-neighbour upsampling)."""
    B, h, w, C = x_BhwC.shape
    return jnp.broadcast_to(x_BhwC[:, :, None, :, None], (B, h, 2, w, 2, C)).reshape(B, 2 * h, 2 * w, C)


def plain_group_norm(
    x_BhwC: jax.Array, scale_C: jax.Array, bias_C: jax.Array, groups: int, epsilon: float
) -> jax.Array:
    """Group normalization (arXiv 1803.08494) over the positions and channels of each group, float32."""
    B, h, w, C = x_BhwC.shape
    x_BNGD = x_BhwC.astype(jnp.float32).reshape(B, h * w, groups, C // groups)
    centred_BNGD = x_BNGD - jnp.mean(x_BNGD, axis=(1, 3), keepdims=True)
    variance_B1G1 = jnp.mean(centred_BNGD**2, axis=(1, 3), keepdims=True)
    normal_BhwC = (centred_BNGD * jax.lax.rsqrt(variance_B1G1 + epsilon)).reshape(B, h, w, C)
    return normal_BhwC * scale_C[None, None, None] + bias_C[None, None, None]


def group_norm(x_BhwC: jax.Array, scale_C: jax.Array, bias_C: jax.Array, groups: int, epsilon: float) -> jax.Array:
    """`plain_group_norm` as x * a + b, with one a and b per channel. Gain: encoders 1.16 (shipped), 1.11.

    Products with the group membership matrix take means over groups and broadcast them back to channels. No array of
    the size of x is reshaped, so XLA fuses the one pass over x with the activation that follows.
    """
    _, h, w, C = x_BhwC.shape
    x_BhwC = x_BhwC.astype(jnp.float32)
    member_GC = jnp.repeat(jnp.eye(groups), C // groups, axis=1)
    share_CG = member_GC.T / (h * w * C // groups)
    mean_BG = _matmul(jnp.sum(x_BhwC, axis=(1, 2)), share_CG)
    centred_BhwC = x_BhwC - _matmul(mean_BG, member_GC)[:, None, None]
    variance_BG = _matmul(jnp.sum(centred_BhwC**2, axis=(1, 2)), share_CG)
    factor_BG = jax.lax.rsqrt(variance_BG + epsilon)
    a_BC = _matmul(factor_BG, member_GC) * scale_C[None]
    b_BC = bias_C[None] - _matmul(mean_BG, member_GC) * a_BC
    return x_BhwC * a_BC[:, None, None] + b_BC[:, None, None]


def plain_nearest_code(vectors_MZ: jax.Array, table_KZ: jax.Array) -> jax.Array:
    """Returns the index of the nearest table row to each vector, the lowest on a tie: int32 [M]."""
    product_MK = jnp.einsum("MZ,KZ->MK", vectors_MZ, table_KZ, precision="highest")
    return jnp.argmin(jnp.sum(table_KZ**2, axis=1)[None] - 2 * product_MK, axis=1).astype(jnp.int32)


def nearest_code(vectors_MZ: jax.Array, table_KZ: jax.Array) -> jax.Array:
    """`plain_nearest_code` as one product and plain minima, which XLA vectorizes on CPUs, unlike argmin.

    |x - code|^2 - |x|^2 is the product of (-2 x, 1) and (code, |code|^2). The distances are read once, for the minimum
    of each block of codes; then only the best block is searched. Gain: shipped encoder 1.21, and 1.06 by the blocks.
    """
    norm_K1 = jnp.sum(table_KZ**2, axis=1, keepdims=True)
    table_KY = jnp.concatenate([table_KZ, norm_K1], axis=1)  # Y = Z + 1
    # Rows that fill the last block are far away, but not at infinity: precise products on TPUs turn infinity into NaN.
    padding = -len(table_KY) % _CODE_BLOCK
    table_KY = jnp.pad(table_KY, ((0, padding), (0, 0))).at[len(table_KZ) :, -1].set(1e30)
    vectors_MY = jnp.pad(-2 * vectors_MZ, ((0, 0), (0, 1)), constant_values=1)
    distance_KM = jnp.einsum("KY,MY->KM", table_KY, vectors_MY, precision="highest")
    distance_JIM = rearrange(distance_KM, "(J I) M -> J I M", I=_CODE_BLOCK)  # J blocks of I codes
    block_M = _first_minimum(jnp.min(distance_JIM, axis=1))
    distance_IM = jnp.take_along_axis(distance_JIM, block_M[None, None], axis=0)[0]
    return jnp.minimum(block_M * _CODE_BLOCK + _first_minimum(distance_IM), len(table_KZ) - 1)


def _first_minimum(values_NM: jax.Array) -> jax.Array:
    """Returns the first index of the minimum along axis 0, int32 [M]; the last index if a value is NaN."""
    index_NM = jax.lax.broadcasted_iota(jnp.int32, values_NM.shape, 0)
    is_minimum_NM = values_NM == jnp.min(values_NM, axis=0, keepdims=True)
    return jnp.min(jnp.where(is_minimum_NM, index_NM, len(values_NM) - 1), axis=0)


def _convolve(x_BHWC: jax.Array, kernel: jax.Array, conv: nnx.Conv, stride: int, padding) -> jax.Array:
    """Convolves with another kernel in the dtype and precision of `conv`, without its bias."""
    return jax.lax.conv_general_dilated(
        x_BHWC.astype(conv.dtype),
        kernel.astype(conv.dtype),
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=conv.precision,
    )


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")
