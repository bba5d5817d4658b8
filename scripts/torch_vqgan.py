"""The tokenizer in torch. It needs torch and safetensors alone, and nothing of this project: copy this file.

    tokenizer = TorchVQGAN("VQGAN_DIR")  # a folder of this project, as tokenizer.convert writes it
    codes_BN = tokenizer.encode(pixels_B3HW)  # low + (high - low) * pixels in [0, 1], as in preprocessor_config.json
    pixels_B3HW = tokenizer.decode(codes_BN)  # in [0, 1]

The tests compare it with the model in JAX, and `bench_vqgan.py` their speeds.
Shapes: B images, H W pixels, h w positions of codes, N = h w codes of an image, C channels, K codes, Z their length.
"""

import json
import pathlib

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

DEFAULTS = {"norm_groups": 32, "pixel_range": (0, 1), "normalize_codes": False, "skip_single_attention": True}
DEFAULTS |= {"quantizer": "vq", "fsq_levels": ()}


class TorchVQGAN:
    """Encoder, codebook and decoder, in float32. `tensors` are the weights by their names in the file."""

    def __init__(self, folder: str, device: str = "cpu"):
        """Reads config.json and model.safetensors."""
        path = pathlib.Path(folder)
        self.config = DEFAULTS | json.loads((path / "config.json").read_text())
        tensors = safetensors.torch.load_file(path / "model.safetensors", device)
        self.tensors = {name: tensor.float() for name, tensor in tensors.items()}
        self.resolution, self.levels = self.config["resolution"], len(self.config["channel_mult"])
        self.low, self.high = self.config["pixel_range"]

    @torch.no_grad()
    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Returns the codes of pixels in the network's range, [B,N]: the nearest of the table to each vector."""
        vectors_MZ, table_KZ = self._projected(self.vectors(pixels_B3HW).flatten(0, 2)), self.table()
        distance_MK = torch.addmm((table_KZ**2).sum(1), vectors_MZ, table_KZ.T, alpha=-2)
        return distance_MK.argmin(1).reshape(len(pixels_B3HW), -1)

    @torch.no_grad()
    def decode(self, codes_BN: Tensor) -> Tensor:
        """Returns pixels in [0, 1], [B,3,H,W]."""
        side = self.resolution // 2 ** (self.levels - 1)
        x = self.table()[codes_BN].reshape(len(codes_BN), side, side, -1).permute(0, 3, 1, 2)
        x = self._middle("decoder.mid", self._conv("decoder.conv_in", self._conv("post_quant_conv", x)))
        for level in reversed(range(self.levels)):
            x = self._level("decoder.up", level, x)
            if level:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self._conv(f"decoder.up.{level}.upsample.conv", x) if self.config["resample_with_conv"] else x
        x = self._conv("decoder.conv_out", F.silu(self._norm("decoder.norm_out", x)))
        return ((x - self.low) / (self.high - self.low)).clamp(0, 1)

    @torch.no_grad()
    def vectors(self, pixels_B3HW: Tensor) -> Tensor:
        """Returns the vectors before quantization, [B,h,w,Z], of pixels in the network's range."""
        x = self._conv("encoder.conv_in", pixels_B3HW)
        for level in range(self.levels):
            x = self._level("encoder.down", level, x)
            if level < self.levels - 1 and self.config["resample_with_conv"]:
                x = self._conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
            elif level < self.levels - 1:
                x = F.avg_pool2d(x, 2)
        x = F.silu(self._norm("encoder.norm_out", self._middle("encoder.mid", x)))
        return self._conv("quant_conv", self._conv("encoder.conv_out", x)).permute(0, 2, 3, 1)

    def table(self) -> Tensor:
        """Returns the vectors of the codes, [K,Z]."""
        table_KZ = self.tensors["quantize.embedding.weight"]
        return F.normalize(table_KZ, dim=1) if self.config["normalize_codes"] else table_KZ

    def _projected(self, vectors_MZ: Tensor) -> Tensor:
        """Returns vectors in the space of the codes."""
        if self.config["quantizer"] == "fsq":  # arXiv 2309.15505, appendix A.1
            levels_Z = torch.tensor(self.config["fsq_levels"], device=vectors_MZ.device)
            half_Z, offset_Z = (levels_Z - 1) * 0.999 / 2, (levels_Z % 2 == 0) / 2
            bounded_MZ = torch.tanh(vectors_MZ + torch.tan(offset_Z / half_Z)) * half_Z - offset_Z
            return bounded_MZ / (levels_Z // 2)
        return F.normalize(vectors_MZ, dim=1) if self.config["normalize_codes"] else vectors_MZ

    def _level(self, name: str, level: int, x: Tensor) -> Tensor:
        """Applies the residual blocks of a resolution, each followed by attention if the settings say so."""
        blocks = self.config["num_res_blocks"] + (name == "decoder.up")
        attends = self.resolution // 2**level in self.config["attn_resolutions"]
        attends = attends and not (blocks == 1 and self.config["skip_single_attention"])  # as open-muse was trained
        for i in range(blocks):
            x = self._block(f"{name}.{level}.block.{i}", x)
            x = self._attention(f"{name}.{level}.attn.{i}", x) if attends else x
        return x

    def _middle(self, name: str, x: Tensor) -> Tensor:
        x = self._block(f"{name}.block_1", x)
        x = x if self.config["no_attn_mid_block"] else self._attention(f"{name}.attn_1", x)
        return self._block(f"{name}.block_2", x)

    def _block(self, name: str, x: Tensor) -> Tensor:
        """Applies two normalized convolutions with a shortcut."""
        y = self._conv(f"{name}.conv1", F.silu(self._norm(f"{name}.norm1", x)))
        y = self._conv(f"{name}.conv2", F.silu(self._norm(f"{name}.norm2", y)))
        return y + (self._conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.tensors else x)

    def _attention(self, name: str, x: Tensor) -> Tensor:
        """Applies self-attention with one head over the positions."""
        y = self._norm(f"{name}.norm", x)
        q, k, v = (self._conv(f"{name}.{part}", y).flatten(2).mT[:, None] for part in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape)
        return x + self._conv(f"{name}.proj_out", mixed)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.group_norm(x, self.config["norm_groups"], weight, bias, eps=1e-6)

    def _conv(self, name: str, x: Tensor, stride: int = 1, padding: str | int = "same") -> Tensor:
        return F.conv2d(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], stride, padding)
