"""Pictures to codes and back, in batches over all devices.

Shapes: n pictures, S the side in pixels, N tokens an image.
"""

import os
from collections.abc import Iterable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from EasyLM.flags import Flag
from tokenizer.vqgan import weights
from tokenizer.vqgan.device_batches import Spread

# The small tokenizer that ships with the package.
PRETRAINED = os.path.join(os.path.dirname(os.path.dirname(__file__)), "pretrained")
DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}

_PIXELS = 2**15  # of a piece: with more, the layers of the finest level no longer lie in a core's caches
_LEAST = 2  # pictures of a piece: XLA rounds a picture alone in another way than one of several, and so some codes

CODEC_FLAGS = {
    "vqgan": Flag(PRETRAINED, "Folder of the tokenizer: config.json with pytorch_model.bin or *.safetensors."),
    "dtype": Flag("fp32", "Type of the tokenizer's computation.", choices=tuple(DTYPES)),
    "batch_size": Flag(
        32, "Pictures that are computed at a time, over all devices; on CPUs it changes no code.", least=1
    ),
}


class Codec:
    """The tokenizer of a folder, ready to use. Inputs of any length are cut into batches, the last one padded.

    The device computes a batch while the host prepares the next and takes what came of the one before.
    """

    def __init__(self, directory: str = PRETRAINED, dtype: str = "fp32", batch_size: int = 32, devices=None):
        """Loads the model of a folder onto `devices` (default: all); `batch_size` grows to a multiple of their number.

        Raises:
          UserError: naming what is wrong with the folder or the setting.
        """
        self.config = weights.read_config(directory)
        self._spread = Spread(batch_size, devices, max(_PIXELS // self.config.resolution**2, 1), _LEAST)
        self.batch_size = self._spread.batch_size
        self._graphdef, state = nnx.split(weights.load(directory, DTYPES[dtype]))
        self._state = self._spread.copied(state)

    def encode(self, pixels_nSS3: np.ndarray) -> np.ndarray:
        """Pixels in [0, 1] at the tokenizer's resolution -> codes [n,N] int32."""
        parts = self.encode_batches(self._spread.cut(pixels_nSS3))
        return np.concatenate([np.zeros((0, self.config.tokens_per_image), np.int32), *parts])

    def decode(self, codes_nN: np.ndarray) -> np.ndarray:
        """Codes -> pixels [n,S,S,3] float32, clamped to [0, 1]."""
        side = self.config.resolution
        parts = self.decode_batches(self._spread.cut(codes_nN))
        return np.concatenate([np.zeros((0, side, side, 3), np.float32), *parts])

    def encode_batches(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Encodes an iterator of pixels [n,S,S,3], n at most `batch_size`, one array of codes [n,N] for each.

        A batch is asked for, and given to the device, before the result of the one before it is waited for: so what
        the iterator does (open files) and what the caller does with a result cost the device no time.
        """
        side = self.config.resolution
        return self._map(_encode, batches, (side, side, 3), np.float32)

    def decode_batches(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The same for codes [n,N]: pixels [n,S,S,3]."""
        for part in self._map(_decode, self._checked(batches), (self.config.tokens_per_image,), np.int32):
            yield np.clip(part, 0, 1)

    def _checked(self, batches):
        for codes_nN in batches:
            assert not codes_nN.size or (codes_nN.min() >= 0 and codes_nN.max() < self.config.num_embeddings)
            yield codes_nN

    def _map(self, function, batches, shape: tuple[int, ...], dtype) -> Iterator[np.ndarray]:
        return self._spread.map(partial(function, self._graphdef, self._state), batches, shape, dtype)


@partial(jax.jit, static_argnums=0)  # compiled once for all Codecs of one kind
def _encode(graphdef, state, pixels_BHWC):
    return nnx.merge(graphdef, state).encode(pixels_BHWC)[1]


@partial(jax.jit, static_argnums=0)
def _decode(graphdef, state, codes_BN):
    return nnx.merge(graphdef, state).decode(codes_BN)
