"""Loads a VQGAN from the files of any format, and writes its folder: config.json and weights under open-muse's names.

The name of a tensor is its module path with dots, then `weight` or `bias`. A convolution's kernel has the shape
[out, in, height, width] in files and [height, width, in, out] in memory.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import DTypeLike

from EasyLM.checkpoints.safetensors_file import tensor_entry, write_safetensors
from EasyLM.errors import UserError
from EasyLM.storage import atomic_file, json_digest, write_json
from tokenizer import formats
from tokenizer.formats.architecture import Translated
from tokenizer.vqgan.config import VQGANConfig
from tokenizer.vqgan.model import VQGAN
from tokenizer.vqgan.quantizers import grid_vectors

_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "embedding.weight", "bias": "bias"}
# open-muse has none of them.
_OWN_SETTINGS = (
    "norm_groups",
    "pixel_range",
    "normalize_codes",
    "skip_single_attention",
    "quantizer",
    "fsq_levels",
)
_TRAINING_ONLY = ("dropout", "commitment_cost")  # settings
_TABLE = "quantize.embedding.weight"
_GRID_ERROR = 1e-3  # of values in -1..1; float16 has errors of half as much
_DECODING = ("decoder.", "post_quant_conv.")  # beginnings of names of parameters


def load(path: str | os.PathLike, dtype: jnp.dtype = jnp.float32, resolution: int = 0) -> VQGAN:
    """Loads a tokenizer of any format of `tokenizer.formats`. Parameters are converted to float32.

    Args:
      path: a folder or file.
      resolution: side of an image in pixels; 0: as the files say, or 256.

    Raises:
      UserError: naming the folder or file, and the tensors that are missing, unexpected or of another shape, or the
        setting to which they do not belong.
    """
    files = formats.read(path, resolution)
    config = VQGANConfig.from_dict(files.settings, files.config)
    abstract = nnx.eval_shape(lambda: VQGAN(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    leaves = {file_name(key): (key, leaf) for key, leaf in nnx.to_flat_state(state)}
    shapes = {name: file_shape(leaf) for name, (_, leaf) in leaves.items()}
    formats.check_tensors(files.weights, files.tensors, shapes, "the architecture")
    _check_grid(files, config)
    flat = []
    for name, (key, leaf) in leaves.items():
        flat.append((key, leaf.replace(jnp.asarray(from_file(files.tensors[name].astype(np.float32))))))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _check_grid(files: Translated, config: VQGANConfig) -> None:
    """Raises UserError if the quantizer has a grid of codes, and the file has another table."""
    table = files.tensors[_TABLE]
    if config.quantizer != "vq" and not np.allclose(table, grid_vectors(config), rtol=0, atol=_GRID_ERROR):
        raise UserError(f"{files.weights}: {_TABLE} is not the table of quantizer={config.quantizer} in {files.config}")


def save(model: VQGAN, directory: str | os.PathLike, dtype: DTypeLike = np.float32) -> list[str]:
    """Atomically writes a tokenizer's files: weights, in `dtype` and with checksums, preprocessing, and settings.

    Returns:
      The names of the files.
    """
    os.makedirs(directory, exist_ok=True)
    arrays = {file_name(path): np.asarray(leaf.get_value()).astype(dtype) for path, leaf in flat_parameters(model)}
    with atomic_file(os.path.join(directory, "model.safetensors")) as file:
        write_safetensors(file, [tensor_entry(name, to_file(array)) for name, array in sorted(arrays.items())])
    config = dataclasses.asdict(model.config)
    for name in _OWN_SETTINGS:  # open-muse reads the folder if they have its values
        if config[name] == getattr(VQGANConfig(), name):
            del config[name]
    write_json(os.path.join(directory, "preprocessor_config.json"), preprocessing(model.config))
    write_json(os.path.join(directory, "config.json"), {"_class_name": "VQGANModel", **config})
    return ["model.safetensors", "preprocessor_config.json", "config.json"]


def preprocessing(config: VQGANConfig) -> dict[str, Any]:
    """Returns the content of preprocessor_config.json: how an image becomes the network's pixels, as in transformers.

    The pixels are those inside the network: `(pixels / 255 - image_mean) / image_std`. `VQGAN` scales pixels itself.
    """
    low, high = config.pixel_range
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": config.resolution, "width": config.resolution},
        "resample": 3,  # bicubic, by Pillow's number; without keeping the aspect ratio, as all commands resize
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": config.pixel_range != (0, 1),
        "image_mean": [-low / (high - low)] * 3,
        "image_std": [1 / (high - low)] * 3,
    }


def digest(model: VQGAN) -> str:
    """Returns 16 hexadecimal digits that name the tokenizer: a digest of all that determines the codes of an image.

    That is the settings that differ from their defaults, the encoder and the codebook, as float32. The decoder may be
    trained further, and the weights may be stored in another format.
    """
    config = {
        field.name: getattr(model.config, field.name)
        for field in dataclasses.fields(model.config)
        if field.name not in _TRAINING_ONLY and getattr(model.config, field.name) != field.default
    }
    hashed = hashlib.blake2b(json_digest(config).encode(), digest_size=8)
    arrays = {file_name(path): leaf.get_value() for path, leaf in flat_parameters(model)}
    for name in sorted(arrays):
        if not name.startswith(_DECODING):
            array = np.ascontiguousarray(arrays[name], np.float32)
            hashed.update(f"{name} {array.shape}".encode())
            hashed.update(array.data)
    return hashed.hexdigest()


def file_name(path: tuple) -> str:
    """Returns the name in a file of the parameter at a module path, e.g. `decoder.up.0.block.1.norm1.weight`."""
    return ".".join([*map(str, path[:-1]), _LEAF_NAMES[path[-1]]])


def file_shape(leaf: nnx.Variable) -> tuple[int, ...]:
    """Returns the shape in a file of a parameter or its abstract value."""
    shape = tuple(leaf.get_value().shape)
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape


def flat_parameters(model: nnx.Module) -> list[tuple[tuple, nnx.Variable]]:
    """Returns every parameter of a module with its path."""
    return list(nnx.to_flat_state(nnx.state(model)))


def parameters(module: nnx.Module) -> dict[str, jax.Array]:
    """Returns the arrays of a module by dotted path, e.g. `encoder.down.0.block.0.conv1.kernel`."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in flat_parameters(module)}


def with_parameters(make: Callable[[], nnx.Module], arrays: Mapping[str, jax.Array]) -> Any:
    """Returns the module of `make` with `arrays` (see `parameters`). Its own arrays are never allocated."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    flat = [(path, leaf.replace(arrays[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def to_file(array: np.ndarray) -> np.ndarray:
    """Transposes a convolution's kernel from memory order to file order; returns other arrays as they are."""
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1)) if array.ndim == 4 else array


def from_file(array: np.ndarray) -> np.ndarray:
    """Inverts `to_file`."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
