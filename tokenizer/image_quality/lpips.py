"""LPIPS (arXiv 1801.03924): the perceptual distance of two images, based on features of VGG16 (arXiv 1409.1556).

The weights come from local files: torchvision's VGG16 (`features.0.weight`, ...) and the linear layers of the lpips
package (`lin0.model.1.weight`, ...), in one file or two.

Shapes: B images, H W pixels, h w positions of a layer, C channels.
"""

import pathlib
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from EasyLM.errors import UserError
from EasyLM.storage import split_paths
from tokenizer.formats import read_tensors
from tokenizer.vqgan import weights

# Channels of VGG16's convolutions, with a pool between stages. LPIPS compares the last activations of each stage.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Mean and standard deviation of ImageNet for pixels in [-1, 1].
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)[None, None, None]
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)[None, None, None]


def shapes() -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of all required tensors in the files."""
    shapes_by_name: dict[str, tuple[int, ...]] = {}
    width, index = 3, 0
    for number, stage in enumerate(STAGES):
        for out in stage:
            shapes_by_name |= {f"features.{index}.weight": (out, width, 3, 3), f"features.{index}.bias": (out,)}
            width, index = out, index + 2  # torchvision also numbers the activations
        index += 1  # ... and the pools
        shapes_by_name[f"lin{number}.model.1.weight"] = (1, width, 1, 1)
    return shapes_by_name


def load(paths: str) -> dict[str, np.ndarray]:
    """Reads the weights from a comma list of files, *.safetensors or torch files. Ignores tensors of other names.

    Returns:
      Parameters for `distance`: arrays by their names in the files, convolutions as [height, width, in, out].

    Raises:
      UserError: naming a file that is missing or not a file of tensors, or the first tensor that is missing or of
        another shape.
    """
    tensors: dict[str, np.ndarray] = {}
    for path in map(pathlib.Path, split_paths(paths)):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        tensors |= read_tensors(path)
    for name, shape in shapes().items():
        if name not in tensors or tensors[name].shape != shape:
            problem = f"has shape {tensors[name].shape}, not {shape}" if name in tensors else "is missing"
            raise UserError(f"{name} {problem}; give torchvision's VGG16 and the linear layers of LPIPS")
    return {name: weights.from_file(tensors[name].astype(np.float32)) for name in shapes()}


def distance(
    params: Mapping[str, jax.Array], images_BHWC: jax.Array, references_BHWC: jax.Array, dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """Returns the LPIPS of each pair of images in [0, 1] of at least 16x16 pixels: float32 [B]."""
    both = jnp.concatenate([images_BHWC, references_BHWC])
    total_B = jnp.zeros(len(images_BHWC))
    for number, features in enumerate(_features(params, both, dtype)):
        features = features.astype(jnp.float32)
        unit = features / (jnp.sqrt(jnp.sum(features**2, axis=-1, keepdims=True)) + 1e-10)
        a_BhwC, b_BhwC = jnp.split(unit, 2)
        weight_C = params[f"lin{number}.model.1.weight"][0, 0, :, 0]
        total_B += jnp.mean((a_BhwC - b_BhwC) ** 2 @ weight_C, axis=(1, 2))
    return total_B


def _features(params: Mapping[str, jax.Array], pixels_BHWC: jax.Array, dtype: jnp.dtype) -> Iterator[jax.Array]:
    """Yields the last activations of each stage of VGG16, [B,h,w,C]."""
    x, index = ((2 * pixels_BHWC - 1) - _SHIFT) / _SCALE, 0
    x = x.astype(dtype)
    for number, stage in enumerate(STAGES):
        if number:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            index += 1
        for _ in stage:
            kernel, bias = (params[f"features.{index}.{name}"].astype(dtype) for name in ("weight", "bias"))
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.nn.relu(x + bias[None, None, None])
            index += 2
        yield x
