"""The VQGAN of open-muse in torch, the reference of the tests and of `bench_vqgan.py`.

`load_state_dict` reads a state dict of open-muse. It is strict: every key must exist, with its shape.
Shapes: B images, H W pixels, N codes of an image.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer.vqgan.config import VQGANConfig


class TorchVQGAN(nn.Module):
    """The whole network. Pixels in and out are [B,H,W,3], as for the model in JAX."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(config.num_embeddings, config.quantized_embed_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.quantized_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.quantized_embed_dim, config.z_channels, 1)

    def encode(self, pixels_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the vectors before quantization [B,h,w,Z] and the codes [B,N]."""
        hidden_BhwZ = self.quant_conv(self.encoder(pixels_BHWC.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        table_KZ = self.quantize.embedding.weight
        flat_MZ = hidden_BhwZ.reshape(-1, table_KZ.shape[1])
        distance_MK = torch.addmm((table_KZ**2).sum(1), flat_MZ, table_KZ.T, alpha=-2)
        return hidden_BhwZ, distance_MK.argmin(1).reshape(len(pixels_BHWC), -1)

    def decode(self, codes_BN: Tensor) -> Tensor:
        """Returns pixels [B,H,W,3], not clipped."""
        side = self.config.side
        vectors = self.quantize.embedding(codes_BN).reshape(len(codes_BN), side, side, -1).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(vectors)).permute(0, 2, 3, 1)


class Encoder(nn.Module):
    """Pixels [B,3,H,W] to [B,C,h,w]."""

    def __init__(self, c: VQGANConfig):
        super().__init__()
        widths = [c.hidden_channels * mult for mult in c.channel_mult]
        self.conv_in = nn.Conv2d(3, c.hidden_channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, out in enumerate(widths):
            module = _level(c, level, widths[level - 1] if level else c.hidden_channels, out, c.num_res_blocks)
            if level < len(widths) - 1:
                module.downsample = Downsample(out, c.resample_with_conv)
            self.down.append(module)
        self.mid = _middle(c, widths[-1])
        self.norm_out = _norm(c, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], c.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = _run_level(level, x)
            x = level.downsample(x) if hasattr(level, "downsample") else x
        return self.conv_out(F.silu(self.norm_out(_run_middle(self.mid, x))))


class Decoder(nn.Module):
    """[B,C,h,w] to pixels [B,3,H,W]."""

    def __init__(self, c: VQGANConfig):
        super().__init__()
        widths = [c.hidden_channels * mult for mult in c.channel_mult]
        self.conv_in = nn.Conv2d(c.z_channels, widths[-1], 3, padding=1)
        self.mid = _middle(c, widths[-1])
        self.up = nn.ModuleList()
        for level, out in enumerate(widths):
            module = _level(c, level, (widths + widths[-1:])[level + 1], out, c.num_res_blocks + 1)
            if level:
                module.upsample = Upsample(out, c.resample_with_conv)
            self.up.append(module)
        self.norm_out = _norm(c, widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = _run_middle(self.mid, self.conv_in(x))
        for level in reversed(self.up):
            x = _run_level(level, x)
            x = level.upsample(x) if hasattr(level, "upsample") else x
        return self.conv_out(F.silu(self.norm_out(x)))


class ResnetBlock(nn.Module):
    """Two convolutions with a skip connection."""

    def __init__(self, c: VQGANConfig, width: int, out: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(c, width), nn.Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = _norm(c, out), nn.Conv2d(out, out, 3, padding=1)
        if width != out:
            self.nin_shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + y


class AttnBlock(nn.Module):
    """Self-attention with one head."""

    def __init__(self, c: VQGANConfig, width: int):
        super().__init__()
        self.norm = _norm(c, width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).mT for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(mixed.mT.reshape(x.shape))


class Downsample(nn.Module):
    """Halves the side."""

    def __init__(self, width: int, with_conv: bool):
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1))) if hasattr(self, "conv") else F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """Doubles the side."""

    def __init__(self, width: int, with_conv: bool):
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if hasattr(self, "conv") else x


def _norm(c, width):
    return nn.GroupNorm(c.norm_groups, width, eps=1e-6)


def _level(c, level, width, out, num_blocks):
    module = nn.Module()
    module.block = nn.ModuleList(ResnetBlock(c, out if i else width, out) for i in range(num_blocks))
    attends = c.resolution // 2**level in c.attn_resolutions
    module.attn = nn.ModuleList(AttnBlock(c, out) for _ in range(num_blocks if attends else 0))
    return module


def _run_level(module, x):
    for i, block in enumerate(module.block):
        x = block(x)
        x = module.attn[i](x) if len(module.attn) > 1 else x  # open-muse does not apply a single block
    return x


def _middle(c, width):
    module = nn.Module()
    module.block_1, module.block_2 = ResnetBlock(c, width, width), ResnetBlock(c, width, width)
    if not c.no_attn_mid_block:
        module.attn_1 = AttnBlock(c, width)
    return module


def _run_middle(module, x):
    x = module.block_1(x)
    x = module.attn_1(x) if hasattr(module, "attn_1") else x
    return module.block_2(x)
