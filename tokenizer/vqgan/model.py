"""The VQGAN network, which maps an image to codes and codes to an image, in the layout of open-muse's `taming` models.

Modules are named like the parameters in the files (`encoder.down.0.block.1.conv1`), so weights.py needs no table.
Shapes: see `tokenizer.vqgan`.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from tokenizer.vqgan import fast_ops
from tokenizer.vqgan.config import VQGANConfig
from tokenizer.vqgan.layers import AttnBlock, Downsample, LayerFactory, ResnetBlock, Upsample
from tokenizer.vqgan.quantizers import Codebook


class VQGAN(nnx.Module):
    """Encoder, codebook and decoder. Parameters are float32; `dtype` is the type of the computation.

    In float32, convolutions use full precision on accelerators too, because rounding changes codes near a boundary.
    """

    def __init__(self, config: VQGANConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        layers = LayerFactory(config, dtype, rngs)
        self.encoder = Encoder(config, layers)
        self.decoder = Decoder(config, layers)
        self.quantize = Codebook(config, rngs)
        self.quant_conv = layers.conv(config.z_channels, config.quantized_embed_dim, 1)
        self.post_quant_conv = layers.conv(config.quantized_embed_dim, config.z_channels, 1)

    def encode(self, pixels_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encodes pixels in [0, 1] to (vectors before quantization [B,h,w,Z], codes [B,N] int32, row by row)."""
        low, high = self.config.pixel_range
        if (low, high) != (0, 1):
            pixels_BHWC = low + (high - low) * pixels_BHWC
        hidden_BhwZ = self.quant_conv(self.encoder(pixels_BHWC))
        return hidden_BhwZ, self.quantize.nearest(hidden_BhwZ)

    def decode(self, codes_BN: jax.Array) -> jax.Array:
        """Decodes codes to float32 pixels [B,H,W,3], not clipped to [0, 1]."""
        vectors_BhwZ = rearrange(self.quantize(codes_BN), "B (h w) Z -> B h w Z", h=self.config.side)
        return self.decode_vectors(vectors_BhwZ)

    def decode_vectors(self, vectors_BhwZ: jax.Array) -> jax.Array:
        """Decodes code vectors, or vectors in their space, to float32 pixels [B,H,W,3], not clipped to [0, 1]."""
        pixels_BHWC = self.decoder(self.post_quant_conv(vectors_BhwZ)).astype(jnp.float32)
        low, high = self.config.pixel_range
        return pixels_BHWC if (low, high) == (0, 1) else (pixels_BHWC - low) / (high - low)


class Encoder(nnx.Module):
    """Pixels [B,H,W,3] -> [B,h,w,C]. Each level but the last halves the side."""

    def __init__(self, config: VQGANConfig, layers: LayerFactory):
        widths = config.level_widths
        self.conv_in = layers.conv(config.num_channels, config.hidden_channels, 3)
        self.down = nnx.List()
        width = config.hidden_channels
        for level, out in enumerate(widths):
            resample = Downsample(out, layers) if level < len(widths) - 1 and config.resample_with_conv else None
            self.down.append(Level(config, layers, level, width, out, config.num_res_blocks, downsample=resample))
            width = out
        self.mid = Middle(config, width, layers)
        self.norm_out = layers.norm(width)
        self.conv_out = layers.conv(width, config.z_channels, 3)
        self.pools = not config.resample_with_conv  # levels but the last then end with a 2x2 mean

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        x = self.conv_in(x_BHWC)
        for i, level in enumerate(self.down):
            x = level(x, pool=self.pools and i < len(self.down) - 1)
        return self.conv_out(nnx.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """[B,h,w,C] -> pixels [B,H,W,3]. `up` is numbered as in the encoder, 0 the finest, and applied in reverse."""

    def __init__(self, config: VQGANConfig, layers: LayerFactory):
        widths = config.level_widths
        self.conv_in = layers.conv(config.z_channels, widths[-1], 3)
        self.mid = Middle(config, widths[-1], layers)
        self.up = nnx.List()
        for level, out in enumerate(widths):
            width = widths[min(level + 1, len(widths) - 1)]
            resample = Upsample(out, layers) if level > 0 and config.resample_with_conv else None
            self.up.append(Level(config, layers, level, width, out, config.num_res_blocks + 1, upsample=resample))
        self.norm_out = layers.norm(widths[0])
        self.conv_out = layers.conv(widths[0], config.num_channels, 3)
        self.upsamples = not config.resample_with_conv  # levels but the first then begin with upsampling

    def __call__(self, z_BhwC: jax.Array) -> jax.Array:
        return self.conv_out(self.features(z_BhwC))

    def features(self, z_BhwC: jax.Array) -> jax.Array:
        """Returns the input of the last layer, [B,H,W,C]."""
        x = self.mid(self.conv_in(z_BhwC))
        for i, level in enumerate(reversed(self.up)):
            x = level(x, upsample=self.upsamples and i > 0)
        return nnx.silu(self.norm_out(x))


class Level(nnx.Module):
    """Residual blocks at one resolution, each followed by attention if the config says so, then a change of size.

    With `upsample` the first block upsamples its input; with `pool` the output is averaged over 2x2 positions.
    """

    def __init__(
        self,
        config: VQGANConfig,
        layers: LayerFactory,
        level: int,
        width: int,
        out: int,
        num_blocks: int,
        downsample: Downsample | None = None,
        upsample: Upsample | None = None,
    ):
        attends = config.resolution // 2**level in config.attn_resolutions
        self.block = nnx.List([ResnetBlock(width if i == 0 else out, out, layers) for i in range(num_blocks)])
        self.attn = nnx.List([AttnBlock(out, layers) for _ in range(num_blocks if attends else 0)])
        if downsample is not None:
            self.downsample = downsample
        if upsample is not None:
            self.upsample = upsample
        self.least_attention = 2 if config.skip_single_attention else 1

    def __call__(self, x: jax.Array, upsample: bool = False, pool: bool = False) -> jax.Array:
        attends = len(self.attn) >= self.least_attention  # open-muse trains without the only block of a level
        for i, block in enumerate(self.block):
            pool_in_block = pool and not attends and i == len(self.block) - 1
            x = block(x, upsample=upsample and i == 0, pool=pool_in_block)
            x = self.attn[i](x) if attends else x
        if pool and attends:
            return fast_ops.pool(x)
        resample = getattr(self, "downsample", None) or getattr(self, "upsample", None)
        return resample(x) if resample else x


class Middle(nnx.Module):
    """Two residual blocks at the coarsest level, with attention between them if the config says so."""

    def __init__(self, config: VQGANConfig, width: int, layers: LayerFactory):
        self.block_1 = ResnetBlock(width, width, layers)
        if not config.no_attn_mid_block:
            self.attn_1 = AttnBlock(width, layers)
        self.block_2 = ResnetBlock(width, width, layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.block_1(x)
        if hasattr(self, "attn_1"):
            x = self.attn_1(x)
        return self.block_2(x)
