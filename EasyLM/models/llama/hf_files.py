"""Reads weight files of Hugging Face models (safetensors, torch `.bin`) and writes safetensors, tensor by tensor."""

import dataclasses
import functools
import glob
import json
import os
import re
from collections.abc import Mapping

import numpy as np
from tqdm import tqdm

from EasyLM.checkpoints.entries import Entry
from EasyLM.checkpoints.safetensors_file import num_bytes, read_safetensors, write_safetensors
from EasyLM.errors import UserError, prefix_errors
from EasyLM.storage import TorchTensor, read_json, read_torch_file

MAX_SHARD_MB = 5000.0
_SHARD = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\.\w+)", re.DOTALL)


def write_shards(directory: str, tensors: list[Entry], max_shard_mb: float = MAX_SHARD_MB) -> None:
    """Writes tensors in order to shards of at most `max_shard_mb` megabytes. Several shards get an index file.

    A larger tensor has its own shard. The function holds one tensor in memory at a time.
    """
    shards: list[list[Entry]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(map(num_bytes, shards[-1])) + num_bytes(tensor) > max_shard_mb * 1e6:
            shards.append([])
        shards[-1].append(tensor)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        weight_map = {tensor.key[0]: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(map(num_bytes, tensors))}, "weight_map": weight_map}
        with open(os.path.join(directory, "model.safetensors.index.json"), "w", encoding="utf-8") as file:
            json.dump(index, file, indent=2)
    for name, shard in zip(names, shards, strict=True):
        with open(os.path.join(directory, name), "wb") as file:
            write_safetensors(file, shard)
            file.flush()
            os.fsync(file.fileno())


def read_weights(directory: str) -> list[Entry]:
    """Returns the tensors of a model directory as entries, without reading them. A key is `(tensor name,)`.

    The order of preference is the same as in transformers: safetensors before torch files, and a single file before
    shards. A stale index of an earlier sharded model is therefore ignored.

    Raises:
      UserError: if there are no weights, or a file is broken or missing. The message names the file.
    """
    for stem, ending, read in (("model", "safetensors", read_safetensors), ("pytorch_model", "bin", _read_torch)):
        single, index = (os.path.join(directory, f"{stem}.{ending}{suffix}") for suffix in ("", ".index.json"))
        if os.path.exists(single):
            paths = [single]
        elif os.path.exists(index):
            names = set(read_json(index, {"weight_map": {str: str}})["weight_map"].values())
            if elsewhere := [name for name in names if os.path.basename(name) != name]:
                raise UserError(f"{index}: {elsewhere[0]!r} is not the name of a file in this directory")
            paths = [os.path.join(directory, name) for name in sorted(names)]
        else:
            paths = sorted(glob.glob(os.path.join(glob.escape(directory), f"{stem}*.{ending}")))
            paths = sorted({*paths, *(shard for path in paths for shard in _shards(path))})
        if missing := [path for path in paths if not os.path.exists(path)]:
            raise UserError(f"{missing[0]}: missing, so the model is incomplete: copy or download it again")
        if paths:
            return _unique({path: read(path) for path in paths})
    raise UserError(f"{directory}: no weights: neither model*.safetensors nor pytorch_model*.bin")


def _shards(path: str) -> list[str]:
    """Returns the paths of all shards to which a file belongs, by its name; an empty list if it is no shard."""
    match = _SHARD.fullmatch(path)
    return [f"{match[1]}{i:05d}-of-{match[3]}{match[4]}" for i in range(1, int(match[3]) + 1)] if match else []


def _unique(tensors_of: Mapping[str, list[Entry]]) -> list[Entry]:
    """Returns the tensors of all files. Raises UserError if two files contain the same one."""
    owners: dict[tuple[str, ...], str] = {}
    for path, tensors in tensors_of.items():
        for tensor in tensors:
            if tensor.key in owners:  # two models, or two versions of one
                raise UserError(f"{owners[tensor.key]} and {path} both contain {tensor.key[0]}: keep one model only")
            owners[tensor.key] = path
    return [tensor for tensors in tensors_of.values() for tensor in tensors]


def _read_torch(path: str) -> list[Entry]:
    state = read_torch_file(path)
    if not isinstance(state, dict) or not all(isinstance(tensor, TorchTensor) for tensor in state.values()):
        raise UserError(f"{path}: not a file of tensors: some values are something else")

    def read(name: str, tensor: TorchTensor, out: np.ndarray) -> None:
        with prefix_errors(f"{path}: {name}"):
            np.copyto(out, tensor.read())

    return [
        Entry((name,), tensor.shape, tensor.dtype, functools.partial(read, name, tensor))
        for name, tensor in state.items()
    ]


def with_progress(tensor: Entry, bar: tqdm) -> Entry:
    """Returns the tensor as an entry that advances a progress bar when it is read."""

    def read_into(out: np.ndarray) -> None:
        tensor.read_into(out)
        bar.update()

    return dataclasses.replace(tensor, read_into=read_into)


def model_file(directory: str) -> str | None:
    """Returns the name of a model file in a directory, or None if there is none."""
    pattern = re.compile(r"config\.json|.*\.safetensors|pytorch_model.*\.bin")
    names = os.listdir(directory) if os.path.isdir(directory) else []
    return next((name for name in sorted(names) if pattern.fullmatch(name)), None)
