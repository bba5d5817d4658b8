"""Reads and writes the folder of a VQGAN: config.json and weights under open-muse's names.

The name of a tensor is its module path with dots, then `weight` or `bias`. A convolution's kernel has the shape
[out, in, height, width] in files and [height, width, in, out] in memory.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import DTypeLike

from EasyLM.checkpoints.safetensors_file import read_safetensors, tensor_entry, write_safetensors
from EasyLM.errors import UserError, check_installed
from EasyLM.storage import atomic_file, content_digest, read_json, write_json
from tokenizer.vqgan.config import VQGANConfig
from tokenizer.vqgan.model import VQGAN

_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "embedding.weight", "bias": "bias"}
_OPEN_MUSE_GROUPS = 32
_NAMES_SHOWN = 4  # in an error


def load(directory: str | os.PathLike, dtype: jnp.dtype = jnp.float32) -> VQGAN:
    """Loads config.json and pytorch_model.bin (needs torch) or *.safetensors. Parameters are converted to float32.

    Raises:
      UserError: naming the folder or file, and the tensors that are missing, unexpected or of another shape.
    """
    config = read_config(directory)
    source, tensors = _read_directory(directory)
    abstract = nnx.eval_shape(lambda: VQGAN(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    leaves = {file_name(path): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    check_tensors(source, tensors, {name: file_shape(leaf) for name, (_, leaf) in leaves.items()}, "config.json")
    flat = []
    for name, (path, leaf) in leaves.items():
        flat.append((path, leaf.replace(jnp.asarray(from_file(tensors[name].astype(np.float32))))))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def save(model: VQGAN, directory: str | os.PathLike, dtype: DTypeLike = np.float32) -> None:
    """Atomically writes model.safetensors, with tensors in `dtype` and their checksums, and config.json."""
    os.makedirs(directory, exist_ok=True)
    arrays = {file_name(path): np.asarray(leaf.get_value()).astype(dtype) for path, leaf in flat_parameters(model)}
    with atomic_file(os.path.join(directory, "model.safetensors")) as file:
        write_safetensors(file, [tensor_entry(name, to_file(array)) for name, array in sorted(arrays.items())])
    config = dataclasses.asdict(model.config)
    if config["norm_groups"] == _OPEN_MUSE_GROUPS:  # open-muse's readers do not know this key
        del config["norm_groups"]
    write_json(os.path.join(directory, "config.json"), {"_class_name": "VQGANModel", **config})


def read_config(directory: str | os.PathLike) -> VQGANConfig:
    """Reads config.json of the VQGAN in `directory`, without its weights.

    Raises:
      UserError: naming the path.
    """
    path = pathlib.Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; a tokenizer folder contains config.json and weights")
    return VQGANConfig.from_dict(read_json(path), str(path))


def digests(directory: str | os.PathLike) -> list[str]:
    """Returns digests of config.json and of each weight file that `load` reads. Other files have no influence.

    Raises:
      UserError: naming the folder, if it has no weights.
    """
    paths = [pathlib.Path(directory) / "config.json", *_weight_files(directory)]
    return [content_digest(str(path), path.stat().st_size) for path in paths]


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


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads a *.safetensors file, or a torch file (needs torch; `weights_only` prevents code execution).

    Raises:
      UserError: naming the file.
    """
    if path.suffix == ".safetensors":
        return {tensor.key[0]: tensor.read() for tensor in read_safetensors(path)}
    check_installed(str(path), "torch", "torch")
    import torch

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.float().numpy() for name, tensor in tensors.items()}
    except Exception as error:  # torch raises many classes for truncated files, other formats and other objects
        raise UserError(f"{path}: not a file of tensors ({type(error).__name__})") from error


def check_tensors(
    source: str, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], expected_by: str
) -> None:
    """Checks the names and shapes of a file's tensors.

    Args:
      source: the name of the file, for errors.
      shapes: the expected shapes by name.
      expected_by: the origin of the expected shapes, for errors.

    Raises:
      UserError: naming the file and the tensors that are missing, unexpected or of another shape.
    """
    missing, unexpected = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or unexpected:
        raise UserError(f"{source}: missing keys: {_shortened(missing)}; unexpected keys: {_shortened(unexpected)}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise UserError(f"{source}: {name} has shape {tensors[name].shape}; {expected_by} requires {shape}")


def to_file(array: np.ndarray) -> np.ndarray:
    """Transposes a convolution's kernel from memory order to file order; returns other arrays as they are."""
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1)) if array.ndim == 4 else array


def from_file(array: np.ndarray) -> np.ndarray:
    """Inverts `to_file`."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


def _weight_files(directory: str | os.PathLike) -> list[pathlib.Path]:
    folder = pathlib.Path(directory)
    paths = sorted(folder.glob("*.safetensors")) or [folder / "pytorch_model.bin"]
    if not paths[0].is_file():
        raise UserError(f"{directory}: no weights: pytorch_model.bin or *.safetensors")
    return paths


def _read_directory(directory: str | os.PathLike) -> tuple[str, dict[str, np.ndarray]]:
    """Returns the name of the weights, for errors, and their tensors."""
    paths = _weight_files(directory)
    if paths[0].suffix == ".safetensors":
        return f"{directory}/*.safetensors", _merge(paths)
    return str(paths[0]), read_tensors(paths[0])


def _merge(shards: list[pathlib.Path]) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    owners: dict[str, pathlib.Path] = {}
    for shard in shards:
        for name, array in read_tensors(shard).items():
            if name in owners:  # two models, or two versions of one
                raise UserError(f"{owners[name]} and {shard} both contain {name}: keep the files of one model only")
            tensors[name], owners[name] = array, shard
    return tensors


def _shortened(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_NAMES_SHOWN])
    return f"{shown} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else shown or "none"
