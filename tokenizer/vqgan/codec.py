"""Encodes images to codes and decodes codes to images, in batches over all devices.

Shapes: n images, S the resolution, N tokens of an image.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from EasyLM.errors import UserError, prefix_errors
from EasyLM.flags import Flag
from tokenizer.vqgan import weights
from tokenizer.vqgan.device_batches import DeviceBatches

# The small tokenizer that ships with the package.
PRETRAINED = os.path.join(os.path.dirname(os.path.dirname(__file__)), "pretrained")
COMPUTE_DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}

MAX_CHUNK_PIXELS = 2**15  # more pixels do not fit into a core's caches at the finest level
MIN_CHUNK_IMAGES = 2  # XLA rounds a batch of one image differently, which changes some codes

CODEC_FLAGS = {
    "vqgan": Flag(
        PRETRAINED,
        "The tokenizer: a folder of this project, of open-muse, or of diffusers' VQModel (config.json and weights), of "
        "taming-transformers (model.yaml and *.ckpt), or a file of LlamaGen (*.pt); or the name of one on the Hub.",
        reads_local_disk=True,
    ),
    "resolution": Flag(
        0,
        "Side of the tokenizer's images in pixels; 0: as its files say, or 256 if they do not (LlamaGen).",
        least=0,
    ),
    "dtype": Flag("fp32", "Data type of the tokenizer's computation.", choices=tuple(COMPUTE_DTYPES)),
    "batch_size": Flag(32, "Images per batch, over all devices; on CPUs it does not affect the codes.", least=1),
}


class Codec:
    """An `ImageTokenizer` loaded from files. Inputs of any length are split into batches, the last one padded.

    The device computes a batch while the host prepares the next one and handles the result of the previous one.

    Attributes:
      config: the VQGANConfig.
      batch_size: images of a batch.
      digest: the name of the tokenizer in records and checkpoints; see `weights.digest`.
    """

    def __init__(
        self,
        directory: str = PRETRAINED,
        dtype: str = "fp32",
        batch_size: int = 32,
        devices: Sequence[jax.Device] | None = None,
        resolution: int = 0,
    ):
        """Loads a model onto `devices` (default: all). Rounds `batch_size` up to a multiple of their number.

        Args:
          directory: a folder or file of any format of `tokenizer.formats`.
          dtype: a key of COMPUTE_DTYPES.
          batch_size: images of a batch, over all devices.
          devices: default: all.
          resolution: side of an image in pixels; 0: as the files say, or 256.

        Raises:
          UserError: naming --vqgan and the file that is missing or invalid.
        """
        with prefix_errors(f"--vqgan={directory}"):
            model = weights.load(directory, COMPUTE_DTYPES[dtype], resolution)
        self.config, self.digest = model.config, weights.digest(model)
        max_chunk = max(MAX_CHUNK_PIXELS // self.config.resolution**2, 1)
        self._batches = DeviceBatches(batch_size, devices, max_chunk, MIN_CHUNK_IMAGES)
        self.batch_size = self._batches.batch_size
        self._graphdef, state = nnx.split(model)
        self._state = self._batches.replicate(state)

    @classmethod
    def from_flags(cls, config: Any) -> "Codec":
        """Loads the tokenizer that the flags CODEC_FLAGS name, onto all devices."""
        return cls(config.vqgan or PRETRAINED, config.dtype, config.batch_size, resolution=config.resolution)

    @property
    def resolution(self) -> int:
        """Side of an image in pixels."""
        return self.config.resolution

    @property
    def num_codes(self) -> int:
        """Codes in the codebook."""
        return self.config.num_embeddings

    @property
    def tokens_per_image(self) -> int:
        """Codes of an image."""
        return self.config.tokens_per_image

    @property
    def pixel_range(self) -> tuple[int, int]:
        """Range of the pixels inside the network."""
        return self.config.pixel_range

    def encode(self, pixels_nSS3: np.ndarray) -> np.ndarray:
        """Encodes pixels [n,S,S,3] in [0, 1] to codes [n,N] int32.

        Raises:
          UserError: if the pixels are integers, such as those of 0 to 255 in image files, or have another shape.
        """
        codes = self.encode_batches(self._batches.split(pixels_nSS3))
        return np.concatenate([np.zeros((0, self.config.tokens_per_image), np.int32), *codes])

    def decode(self, codes_nN: np.ndarray) -> np.ndarray:
        """Decodes codes [n,N] to pixels [n,S,S,3] float32, clipped to [0, 1].

        Raises:
          UserError: if an id is not a code of the tokenizer, or the codes have another shape.
        """
        side = self.config.resolution
        pixels = self.decode_batches(self._batches.split(codes_nN))
        return np.concatenate([np.zeros((0, side, side, 3), np.float32), *pixels])

    def encode_batches(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields the codes [n,N] of each batch of pixels [n,S,S,3], n at most `batch_size`.

        Fetches and dispatches a batch before it waits for the previous result. Reading files in the iterator and
        handling results therefore overlap with the computation.
        """
        side = self.config.resolution
        return self._map(_encode, self._floating(batches), (side, side, 3), np.float32)

    def decode_batches(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields the pixels [n,S,S,3] in [0, 1] of each batch of codes [n,N]; prefetches as `encode_batches`."""
        shape = (self.config.tokens_per_image,)
        for pixels_nSS3 in self._map(_decode, self._in_range(batches), shape, np.int32):
            yield np.clip(pixels_nSS3, 0, 1)

    def _floating(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for pixels_nSS3 in batches:
            if not np.issubdtype(pixels_nSS3.dtype, np.floating):
                raise UserError(f"pixels of type {pixels_nSS3.dtype}: must be floating point, in [0, 1]")
            yield pixels_nSS3

    def _in_range(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for codes_nN in batches:
            if codes_nN.size and not 0 <= codes_nN.min() <= codes_nN.max() < self.num_codes:
                raise UserError(
                    f"codes from {codes_nN.min()} to {codes_nN.max()}: must be from 0 to {self.num_codes - 1}, the "
                    "codes of this tokenizer"
                )
            yield codes_nN

    def _map(self, function, batches, shape: tuple[int, ...], dtype) -> Iterator[np.ndarray]:
        return self._batches.map(partial(function, self._graphdef, self._state), batches, shape, dtype)


@partial(jax.jit, static_argnums=0)  # compiled once per architecture, not per Codec
def _encode(graphdef, state, pixels_BHWC):
    return nnx.merge(graphdef, state).encode(pixels_BHWC)[1]


@partial(jax.jit, static_argnums=0)
def _decode(graphdef, state, codes_BN):
    return nnx.merge(graphdef, state).decode(codes_BN)
