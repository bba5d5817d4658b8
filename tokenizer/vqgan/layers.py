"""The layers of a VQGAN: convolution, group normalization, residual block, attention, change of size.

Shapes: see `tokenizer.vqgan`.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from tokenizer.vqgan import fast_ops
from tokenizer.vqgan.config import VQGANConfig


class LayerFactory:
    """Makes convolutions and normalizations with the config's groups and the model's dtype and precision."""

    def __init__(self, config: VQGANConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dtype, self.rngs, self.groups = dtype, rngs, config.norm_groups
        self.precision = "highest" if dtype == jnp.float32 else None

    def conv(self, width: int, out: int, size: int, strides: int = 1, padding: str | tuple = "SAME") -> nnx.Conv:
        """Returns a convolution over size x size positions."""
        return nnx.Conv(
            width,
            out,
            (size, size),
            strides=strides,
            padding=padding,
            dtype=self.dtype,
            precision=self.precision,
            rngs=self.rngs,
        )

    def norm(self, width: int) -> "GroupNorm":
        """Returns a group normalization."""
        return GroupNorm(width, self.groups, self.dtype)


class GroupNorm(nnx.Module):
    """Group normalization with statistics in float32; `dtype` is the type of the result."""

    def __init__(self, width: int, groups: int, dtype: jnp.dtype, epsilon: float = 1e-6):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.groups, self.dtype, self.epsilon = groups, dtype, epsilon

    def __call__(self, x_BhwC: jax.Array) -> jax.Array:
        y_BhwC = fast_ops.group_norm(x_BhwC, self.scale[...], self.bias[...], self.groups, self.epsilon)
        return y_BhwC.astype(self.dtype)


class ResnetBlock(nnx.Module):
    """Two normalized 3x3 convolutions with a shortcut."""

    def __init__(self, width: int, out: int, layers: LayerFactory):
        self.norm1 = layers.norm(width)
        self.conv1 = layers.conv(width, out, 3)
        self.norm2 = layers.norm(out)
        self.conv2 = layers.conv(out, out, 3)
        if width != out:
            self.nin_shortcut = layers.conv(width, out, 1)

    def __call__(self, x: jax.Array, upsample: bool = False, pool: bool = False) -> jax.Array:
        """Applies the block. `upsample` first upsamples `x`; `pool` averages 2x2 positions of the result.

        Changes of size commute with everything but the 3x3 convolutions, so the rest runs at the lower resolution.
        """
        y = nnx.silu(self.norm1(x))
        y = fast_ops.upsample_conv(y, self.conv1) if upsample else self.conv1(y)
        y = nnx.silu(self.norm2(y))
        y = fast_ops.conv_pool(y, self.conv2) if pool else self.conv2(y)
        x = fast_ops.pool(x) if pool else x
        x = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return (fast_ops.upsample(x) if upsample else x) + y


class AttnBlock(nnx.Module):
    """Single-head full attention over the positions of an image."""

    def __init__(self, width: int, layers: LayerFactory):
        self.norm = layers.norm(width)
        self.q, self.k, self.v, self.proj_out = (layers.conv(width, width, 1) for _ in range(4))

    def __call__(self, x_BhwC: jax.Array) -> jax.Array:
        _, h, w, C = x_BhwC.shape
        y_BhwC = self.norm(x_BhwC)
        q_BNC, k_BNC, v_BNC = (rearrange(layer(y_BhwC), "B h w C -> B (h w) C") for layer in (self.q, self.k, self.v))
        scores_BNM = jnp.einsum("BNC,BMC->BNM", q_BNC, k_BNC, precision=self.q.precision) * C**-0.5
        weights_BNM = jax.nn.softmax(scores_BNM.astype(jnp.float32), axis=-1).astype(v_BNC.dtype)
        mixed_BNC = jnp.einsum("BNM,BMC->BNC", weights_BNM, v_BNC, precision=self.q.precision)
        return x_BhwC + self.proj_out(rearrange(mixed_BNC, "B (h w) C -> B h w C", h=h, w=w))


class Downsample(nnx.Module):
    """A convolution of stride 2, padded at the right and the bottom, as in taming-transformers."""

    def __init__(self, width: int, layers: LayerFactory):
        self.conv = layers.conv(width, width, 3, strides=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour upsampling, then a convolution."""

    def __init__(self, width: int, layers: LayerFactory):
        self.conv = layers.conv(width, width, 3)

    def __call__(self, x: jax.Array) -> jax.Array:
        return fast_ops.upsample_conv(x, self.conv)
