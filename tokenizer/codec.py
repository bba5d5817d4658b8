"""Pictures to codes and back, in batches over all devices.

Shapes: n pictures, S the side in pixels, N tokens an image.
"""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM.errors import UserError
from EasyLM.flags import Flag
from tokenizer import weights

PRETRAINED = os.path.join(os.path.dirname(__file__), "pretrained")  # the small tokenizer that comes with the package
DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}

CODEC_FLAGS = {
    "vqgan": Flag(PRETRAINED, "Folder of the tokenizer: config.json with pytorch_model.bin or *.safetensors."),
    "dtype": Flag("fp32", "Type of the tokenizer's computation.", choices=tuple(DTYPES)),
    "batch_size": Flag(32, "Pictures that are computed at a time, over all devices; changes no result."),
}


class Codec:
    """The tokenizer of a folder, ready to use. Inputs of any length are cut into batches, the last one padded."""

    def __init__(self, directory: str = PRETRAINED, dtype: str = "fp32", batch_size: int = 32, devices=None):
        """Loads the model of a folder onto `devices` (default: all).

        Raises:
          UserError: naming what is wrong with the folder or the setting.
        """
        if batch_size < 1:
            raise UserError(f"--batch_size={batch_size}: must be at least 1")
        devices = devices or jax.devices()
        mesh = jax.make_mesh((len(devices),), ("picture",), axis_types=(AxisType.Auto,), devices=devices)
        self._split, everywhere = NamedSharding(mesh, P("picture")), NamedSharding(mesh, P())
        self._batch = -(-batch_size // len(devices)) * len(devices)
        model = weights.load(directory, DTYPES[dtype])
        self.config = model.config
        self._graphdef, state = nnx.split(model)
        self._state = jax.device_put(state, everywhere)

    def encode(self, pixels_nSS3: np.ndarray) -> np.ndarray:
        """Pixels in [0, 1] at the tokenizer's resolution -> codes [n,N] int32."""
        side = self.config.resolution
        assert pixels_nSS3.shape[1:] == (side, side, 3), pixels_nSS3.shape
        return self._map(_encode, pixels_nSS3.astype(np.float32), (self.config.tokens_per_image,), np.int32)

    def decode(self, codes_nN: np.ndarray) -> np.ndarray:
        """Codes -> pixels [n,S,S,3] float32, clamped to [0, 1]."""
        assert codes_nN.shape[1:] == (self.config.tokens_per_image,), codes_nN.shape
        assert not codes_nN.size or (codes_nN.min() >= 0 and codes_nN.max() < self.config.num_embeddings)
        side = self.config.resolution
        return np.clip(self._map(_decode, codes_nN.astype(np.int32), (side, side, 3), np.float32), 0, 1)

    def _map(self, function, array: np.ndarray, shape: tuple[int, ...], dtype) -> np.ndarray:
        out = np.empty((len(array), *shape), dtype)
        for start in range(0, len(array), self._batch):
            part = array[start : start + self._batch]
            padded = np.zeros((self._batch, *array.shape[1:]), array.dtype)
            padded[: len(part)] = part
            result = function(self._graphdef, self._state, jax.device_put(padded, self._split))
            out[start : start + len(part)] = np.asarray(result)[: len(part)]
        return out


@partial(jax.jit, static_argnums=0)  # compiled once for all Codecs of one kind
def _encode(graphdef, state, pixels_BHWC):
    return nnx.merge(graphdef, state).encode(pixels_BHWC)[1]


@partial(jax.jit, static_argnums=0)
def _decode(graphdef, state, codes_BN):
    return nnx.merge(graphdef, state).decode(codes_BN)
