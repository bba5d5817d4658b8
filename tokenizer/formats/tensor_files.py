"""Reads files of named tensors: safetensors, and files of `torch.save` without torch."""

import pathlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from EasyLM.errors import UserError, prefix_errors
from EasyLM.storage import TorchTensor, read_torch_file

# Keys under which a training checkpoint has the weights, the best ones first.
_STATE_DICTS = ("ema", "model", "state_dict")
_NAMES_SHOWN = 4  # in an error


def read_tensors(path: pathlib.Path, ignored: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Reads the tensors of a safetensors file or of a torch file, whose code is never executed.

    A torch file is a state dict, or a training checkpoint with one.

    Args:
      ignored: prefixes of names that are not read.

    Raises:
      UserError: naming the file.
    """
    if path.suffix == ".safetensors":
        from EasyLM.checkpoints.safetensors_file import read_safetensors  # imports JAX

        tensors = {tensor.key[0]: tensor for tensor in read_safetensors(path)}
        return {name: tensor.read() for name, tensor in tensors.items() if not name.startswith(ignored)}
    content = read_torch_file(path)
    state = content
    if isinstance(content, dict):
        state = next((content[key] for key in _STATE_DICTS if isinstance(content.get(key), dict)), content)
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path}: not a file of tensors: neither a state dict nor a checkpoint with one")
    arrays = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, TorchTensor):
            raise UserError(f"{path}: not a file of tensors: {str(name)[:80]!r} is something else")
        if not name.startswith(ignored):
            with prefix_errors(f"{path}: {name}"):
                arrays[name] = tensor.read()
    return arrays


def read_shards(shards: Sequence[pathlib.Path]) -> dict[str, np.ndarray]:
    """Reads the tensors of a model that is one file or several.

    Raises:
      UserError: naming the file, or two files with the same tensor.
    """
    tensors: dict[str, np.ndarray] = {}
    owners: dict[str, pathlib.Path] = {}
    for shard in shards:
        for name, array in read_tensors(shard).items():
            if name in owners:  # two models, or two versions of one
                raise UserError(f"{owners[name]} and {shard} both contain {name}: keep the files of one model only")
            tensors[name], owners[name] = array, shard
    return tensors


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


def _shortened(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_NAMES_SHOWN])
    return f"{shown} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else shown or "none"
