"""Features of images for FID: the pooled activations of InceptionV3 (arXiv 1512.00567).

The weights come from a local file: pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`, the network of the original
FID, or the same tensors as safetensors. Unlike other versions of InceptionV3, this network
excludes the padding from average pools and takes the maximum in the pool of the last block.

Shapes: n images, B images of a batch, H W pixels, h w positions of a layer, C channels, D = 2048 features.
"""

import pathlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from EasyLM.errors import UserError
from tokenizer.formats import check_tensors, read_tensors
from tokenizer.vqgan import DeviceBatches, weights

SIDE = 299  # pixels of the network's input
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")  # names in the files
_BATCH_NORM_EPSILON = 1e-3


class Conv(NamedTuple):
    """A convolution with batch normalization and ReLU, under its name in the files."""

    name: str
    out: int
    height: int = 1
    width: int = 1
    stride: int = 1
    padding: str = "SAME"


def _pool(x_BhwC: jax.Array, initial: float, join: Callable, stride: int = 1, padding: str = "SAME") -> jax.Array:
    return jax.lax.reduce_window(x_BhwC, initial, join, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _average(x_BhwC: jax.Array) -> jax.Array:
    """Averages 3x3 positions, excluding the padding."""
    rows_h, columns_w = (np.convolve(np.ones(extent), np.ones(3))[1:-1] for extent in x_BhwC.shape[1:3])
    count_hw = np.outer(rows_h, columns_w).astype(np.float32)
    return _pool(x_BhwC, 0.0, jax.lax.add) / count_hw[None, :, :, None]


_maximum = partial(_pool, initial=-jnp.inf, join=jax.lax.max)
_HALVING = (2, "VALID")  # stride and padding of layers that halve the side
_halve = partial(_maximum, stride=2, padding="VALID")


def _chain(name: str, *settings: tuple) -> list[Conv]:
    """Returns a sequence of convolutions, numbered from 1."""
    return [Conv(f"{name}_{i}", *setting) for i, setting in enumerate(settings, 1)]


def _block_a(at: str, pooled: int) -> tuple:
    double = _chain(f"{at}.branch3x3dbl", (64,), (96, 3, 3), (96, 3, 3))
    wide = _chain(f"{at}.branch5x5", (48,), (64, 5, 5))
    return Conv(f"{at}.branch1x1", 64), wide, double, [_average, Conv(f"{at}.branch_pool", pooled)]


def _block_b(at: str) -> tuple:
    double = _chain(f"{at}.branch3x3dbl", (64,), (96, 3, 3), (96, 3, 3, *_HALVING))
    return Conv(f"{at}.branch3x3", 384, 3, 3, *_HALVING), double, _halve


def _block_c(at: str, inner: int) -> tuple:
    single = _chain(f"{at}.branch7x7", (inner,), (inner, 1, 7), (192, 7, 1))
    double = _chain(f"{at}.branch7x7dbl", (inner,), (inner, 7, 1), (inner, 1, 7), (inner, 7, 1), (192, 1, 7))
    return Conv(f"{at}.branch1x1", 192), single, double, [_average, Conv(f"{at}.branch_pool", 192)]


def _block_d(at: str) -> tuple:
    long = _chain(f"{at}.branch7x7x3", (192,), (192, 1, 7), (192, 7, 1), (192, 3, 3, *_HALVING))
    return _chain(f"{at}.branch3x3", (192,), (320, 3, 3, *_HALVING)), long, _halve


def _block_e(at: str, pool: Callable) -> tuple:
    def both(name: str) -> tuple:
        return Conv(f"{at}.{name}a", 384, 1, 3), Conv(f"{at}.{name}b", 384, 3, 1)

    single = [Conv(f"{at}.branch3x3_1", 384), both("branch3x3_2")]
    double = [*_chain(f"{at}.branch3x3dbl", (448,), (384, 3, 3)), both("branch3x3dbl_3")]
    return Conv(f"{at}.branch1x1", 320), single, double, [pool, Conv(f"{at}.branch_pool", 192)]


# A list is a sequence. A tuple holds parallel branches, whose results are concatenated along the channels.
NETWORK = [
    Conv("Conv2d_1a_3x3", 32, 3, 3, *_HALVING),
    Conv("Conv2d_2a_3x3", 32, 3, 3, padding="VALID"),
    Conv("Conv2d_2b_3x3", 64, 3, 3),
    _halve,
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, 3, 3, padding="VALID"),
    _halve,
    *(_block_a("Mixed_5b", 32), _block_a("Mixed_5c", 64), _block_a("Mixed_5d", 64)),
    _block_b("Mixed_6a"),
    *(_block_c("Mixed_6b", 128), _block_c("Mixed_6c", 160), _block_c("Mixed_6d", 160), _block_c("Mixed_6e", 192)),
    _block_d("Mixed_7a"),
    *(_block_e("Mixed_7b", _average), _block_e("Mixed_7c", _maximum)),
]


class Inception:
    """A network loaded from a file, applied to any number of images in batches over all devices."""

    def __init__(self, path: str, batch_size: int):
        """Loads the weights. Raises UserError as `load` does."""
        self._batches = DeviceBatches(batch_size)
        self._params = self._batches.replicate(load(path))

    def __call__(self, pixels_nHW3: np.ndarray) -> np.ndarray:
        """Returns the features, float32 [n,D], of n > 0 images in [0, 1]."""
        batches = self._batches.split(pixels_nHW3)
        function = partial(_jitted_features, self._params)
        return np.concatenate(list(self._batches.map(function, batches, pixels_nHW3.shape[1:], np.float32)))


def load(path: str) -> dict[str, np.ndarray]:
    """Reads *.safetensors or a torch file. Ignores the classifier and other tensors that pooled features do not need.

    Returns:
      For each convolution NAME.weight [height, width, in, out] and NAME.bias, with the batch normalization folded in.

    Raises:
      UserError: naming the file, and the tensors that are missing, unexpected or of another shape.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f"{path}: no such file")
    tensors = {
        name: array.astype(np.float64)
        for name, array in read_tensors(pathlib.Path(path)).items()
        if not name.startswith(("fc.", "AuxLogits.")) and not name.endswith(".num_batches_tracked")
    }
    check_tensors(path, tensors, shapes(), "pytorch-fid's InceptionV3")
    params = {}
    for name in [name.removesuffix(".conv.weight") for name in tensors if name.endswith(".conv.weight")]:
        gain, bias, mean, variance = (tensors[f"{name}.bn.{leaf}"] for leaf in _BATCH_NORM)
        scale = gain / np.sqrt(variance + _BATCH_NORM_EPSILON)
        params[f"{name}.weight"] = (weights.from_file(tensors[f"{name}.conv.weight"]) * scale).astype(np.float32)
        params[f"{name}.bias"] = (bias - mean * scale).astype(np.float32)
    return params


def shapes() -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of all required tensors in the files."""
    shapes_by_name: dict[str, tuple[int, ...]] = {}

    def record(conv: Conv, channels: int):
        shapes_by_name[f"{conv.name}.conv.weight"] = (conv.out, channels, conv.height, conv.width)
        shapes_by_name.update({f"{conv.name}.bn.{leaf}": (conv.out,) for leaf in _BATCH_NORM})
        return jnp.zeros((conv.height, conv.width, channels, conv.out)), jnp.zeros(conv.out)

    jax.eval_shape(lambda x: _apply(NETWORK, x, record), jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32))
    return shapes_by_name


def features(params: dict, pixels_BHW3: jax.Array) -> jax.Array:
    """Returns the means over the last layer's positions, float32 [B,D], of images in [0, 1] of any size."""
    size = (len(pixels_BHW3), SIDE, SIDE, 3)
    x = 2 * jax.image.resize(pixels_BHW3, size, "bilinear", antialias=False) - 1
    x_BhwC = _apply(NETWORK, x, lambda conv, _: (params[f"{conv.name}.weight"], params[f"{conv.name}.bias"]))
    return x_BhwC.mean(axis=(1, 2))


_jitted_features = jax.jit(features)  # one cache for all instances


def _apply(step, x_BhwC: jax.Array, parameters: Callable) -> jax.Array:
    """Applies a part of NETWORK. `parameters` maps a convolution and its input channels to its kernel and bias."""
    if isinstance(step, list):
        for inner in step:
            x_BhwC = _apply(inner, x_BhwC, parameters)
        return x_BhwC
    if callable(step):
        return step(x_BhwC)
    if not isinstance(step, Conv):
        return jnp.concatenate([_apply(inner, x_BhwC, parameters) for inner in step], axis=-1)
    kernel, bias_C = parameters(step, x_BhwC.shape[-1])
    convolve = partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest")
    return jax.nn.relu(convolve(x_BhwC, kernel, (step.stride,) * 2, step.padding) + bias_C[None, None, None])
