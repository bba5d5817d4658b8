"""The image tokenizer: a VQGAN, its files, and the codec that converts images to codes and back in batches.

May import: EasyLM.storage, EasyLM.checkpoints, tokenizer.formats. Requires JAX.

    config          VQGANConfig: architecture and its validation
    model           the network: Encoder and Decoder
    quantizers      Codebook: vectors <-> codes; VQ, FSQ, LFQ
    layers          its layers: convolution, normalization, residual block, attention, change of size
    fast_ops        operations rewritten for CPUs, each beside its plain version
    weights         loads the files of any format; writes config.json and weights under open-muse's names
    device_batches  applies a function to inputs of any length, in batches over all devices
    codec           Codec: images <-> codes; the flags of every command that needs a tokenizer

Vocabulary: a code is an index into the codebook, 0..num_embeddings - 1; an image has `tokens_per_image` codes, row by
row. A level is a resolution of the network, 0 the finest. The released tokenizer is that of the LVM release; the
shipped one is in tokenizer/pretrained.

Shapes: n images, B images of a batch, H W pixels, S the resolution (H = W = S), C channels, h w positions at a coarser
level, N codes of an image (h w at the coarsest), M vectors or positions, Z length of a code's vector, Y = Z + 1, K
codes in the codebook, G groups of a normalization, D channels of a group.
"""

from tokenizer.vqgan.codec import CODEC_FLAGS, COMPUTE_DTYPES, PRETRAINED, Codec
from tokenizer.vqgan.config import QUANTIZERS, VQGANConfig
from tokenizer.vqgan.device_batches import DeviceBatches
from tokenizer.vqgan.layers import GroupNorm
from tokenizer.vqgan.model import VQGAN
from tokenizer.vqgan.quantizers import grid_vectors

__all__ = [
    "CODEC_FLAGS",
    "COMPUTE_DTYPES",
    "PRETRAINED",
    "QUANTIZERS",
    "VQGAN",
    "Codec",
    "DeviceBatches",
    "GroupNorm",
    "VQGANConfig",
    "grid_vectors",
]
