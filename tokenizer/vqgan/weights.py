"""A VQGAN's directory: config.json and weights under open-muse's names, as they come and as we write them.

A name is the path of the module with dots, its last part `weight` or `bias`; a convolution is [out, in, height, width]
in the file and [height, width, in, out] here.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from EasyLM.errors import UserError
from EasyLM.storage import atomic_path, write_json
from tokenizer.vqgan.model import VQGAN, VQGANConfig

_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "embedding.weight", "bias": "bias"}


def load(directory: str, dtype=jnp.float32) -> VQGAN:
    """Reads a VQGAN: config.json with pytorch_model.bin (needs torch) or *.safetensors. Parameters become float32.

    Raises:
      UserError: naming the directory or file and what is missing, unexpected or of another shape.
    """
    config = read_config(directory)
    source, found = _read_directory(directory)
    abstract = nnx.eval_shape(lambda: VQGAN(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    wanted = {file_name(path): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    check_tensors(source, found, {name: file_shape(leaf) for name, (_, leaf) in wanted.items()}, "config.json")
    flat = []
    for name, (path, leaf) in wanted.items():
        flat.append((path, leaf.replace(jnp.asarray(from_file(found[name].astype(np.float32))))))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def save(model: VQGAN, directory: str, dtype=np.float32) -> None:
    """Writes config.json and model.safetensors (tensors in `dtype`), each atomically."""
    from safetensors.numpy import save_file

    os.makedirs(directory, exist_ok=True)
    arrays = {file_name(path): np.asarray(leaf.get_value()).astype(dtype) for path, leaf in flat_parameters(model)}
    tensors = {name: to_file(array) for name, array in arrays.items()}
    target = pathlib.Path(directory)
    with atomic_path(target / "model.safetensors") as temporary:
        save_file(tensors, temporary)
    config = dataclasses.asdict(model.config)
    if config["norm_groups"] == 32:  # what open-muse has always had; its readers do not know the key
        del config["norm_groups"]
    write_json(target / "config.json", {"_class_name": "VQGANModel", **config})


def read_config(directory: str) -> VQGANConfig:
    """The settings of the VQGAN in `directory`, without its weights.

    Raises:
      UserError: naming the path.
    """
    path = pathlib.Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(
            f"--vqgan={directory}: no config.json there; a VQGAN is a directory with config.json and weights"
        )
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold an object of settings")
    return VQGANConfig.from_dict(values, str(path))


def file_name(path: tuple) -> str:
    """Where a parameter stands in the module -> its name in a file, e.g. `decoder.up.0.block.1.norm1.weight`."""
    return ".".join([*map(str, path[:-1]), _LEAF_NAMES[path[-1]]])


def file_shape(leaf) -> tuple[int, ...]:
    """The shape that a parameter (or its abstract value) has in a file."""
    shape = tuple(leaf.get_value().shape)
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape


def flat_parameters(model: nnx.Module) -> list[tuple[tuple, nnx.Variable]]:
    """Every parameter of a module with its path."""
    return list(nnx.to_flat_state(nnx.state(model)))


def parameters(module: nnx.Module) -> dict[str, jax.Array]:
    """The arrays of a module by dotted path, e.g. `encoder.down.0.block.0.conv1.kernel`."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in flat_parameters(module)}


def with_parameters(make: Callable[[], nnx.Module], arrays: dict[str, jax.Array]) -> nnx.Module:
    """The module that `make` builds, of these arrays (see `parameters`) in place of its own, which are never made."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    flat = [(path, leaf.replace(arrays[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file: *.safetensors, or what torch saved (needs torch; weights only, never other objects).

    Raises:
      UserError: naming the file.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path}: reading it needs torch: pip install torch") from error
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.float().numpy() for name, tensor in tensors.items()}
    except Exception as error:  # torch has no one class for a file that is cut short, foreign, or names other objects
        raise UserError(f"{path}: not a file of tensors ({type(error).__name__})") from error


def check_tensors(source: str, tensors: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]], by: str) -> None:
    """Sees that the tensors of a file are those of `shapes`, which follow from what `by` names.

    Raises:
      UserError: naming the file and what is missing, unexpected or of another shape.
    """
    missing, unexpected = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or unexpected:
        raise UserError(f"{source}: missing keys: {_some(missing)}; unexpected keys: {_some(unexpected)}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise UserError(f"{source}: {name} has shape {tensors[name].shape}, {by} makes it {shape}")


def _read_directory(directory: str) -> tuple[str, dict[str, np.ndarray]]:
    root = pathlib.Path(directory)
    shards = sorted(root.glob("*.safetensors"))
    path = root / "pytorch_model.bin"
    if shards:
        return f"{root}/*.safetensors", _joined(shards)
    if not path.is_file():
        raise UserError(f"--vqgan={directory}: no weights there: pytorch_model.bin or *.safetensors")
    return str(path), read_tensors(path)


def _joined(shards: list[pathlib.Path]) -> dict[str, np.ndarray]:
    tensors, owners = {}, {}
    for shard in shards:
        for name, array in read_tensors(shard).items():
            if name in owners:  # two models, or two versions of one
                raise UserError(f"{owners[name]} and {shard} both hold {name}: leave the files of one model there")
            tensors[name], owners[name] = array, shard
    return tensors


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.flax import load_file  # knows bfloat16, which numpy's own does not

    try:
        with jax.default_device(jax.devices("cpu")[0]):
            return {name: np.asarray(value) for name, value in load_file(path).items()}
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from error


def to_file(array: np.ndarray) -> np.ndarray:
    """A convolution's kernel from our order to the files'; other arrays as they are."""
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1)) if array.ndim == 4 else array


def from_file(array: np.ndarray) -> np.ndarray:
    """The way back."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown or "none"
