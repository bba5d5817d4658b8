"""Reads weight files of Hugging Face models (safetensors, torch `.bin`) and writes safetensors, tensor by tensor."""

import dataclasses
import functools
import glob
import json
import math
import os
import re
import zipfile
from collections.abc import Iterable

import numpy as np
from tqdm import tqdm

from EasyLM.checkpoints import entries
from EasyLM.checkpoints.entries import Entry
from EasyLM.errors import UserError
from EasyLM.storage import check_schema, parse_json, read_json

MAX_SHARD_MB = 5000.0
_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAFETENSORS_NAMES = {np.dtype(dtype): name for name, dtype in _SAFETENSORS_DTYPES.items()}


def write_safetensors(directory: str, tensors: list[Entry], max_shard_mb: float = MAX_SHARD_MB) -> None:
    """Writes tensors in order to shards of at most `max_shard_mb` megabytes. Several shards get an index file.

    A larger tensor has its own shard. The function holds one tensor in memory at a time.
    """
    shards: list[list[Entry]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(map(_num_bytes, shards[-1])) + _num_bytes(tensor) > max_shard_mb * 1e6:
            shards.append([])
        shards[-1].append(tensor)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        weight_map = {tensor.key[0]: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(map(_num_bytes, tensors))}, "weight_map": weight_map}
        with open(os.path.join(directory, "model.safetensors.index.json"), "w", encoding="utf-8") as file:
            json.dump(index, file, indent=2)
    for name, shard in zip(names, shards, strict=True):
        with open(os.path.join(directory, name), "wb") as file:
            _write_shard(file, shard)
            file.flush()
            os.fsync(file.fileno())


def _write_shard(file, tensors: Iterable[Entry]) -> None:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + _num_bytes(tensor)
        header[tensor.key[0]] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)  # aligns the tensors to 8 bytes
    file.write(len(data).to_bytes(8, "little") + data)
    for tensor in tensors:
        file.write(entries.bytes_of(tensor.read()))


def _num_bytes(tensor: Entry) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def read_weights(directory: str) -> list[Entry]:
    """Returns the tensors of a model directory as entries, without reading them. A key is `(tensor name,)`.

    The order of preference is the same as in transformers: safetensors before torch files, and a single file before
    shards. A stale index of an earlier sharded model is therefore ignored.

    Raises:
      UserError: if there are no weights, or a file is broken or missing. The message names the file.
    """
    for stem, ending, read in (("model", "safetensors", _read_safetensors), ("pytorch_model", "bin", _read_torch)):
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
        if paths:
            return [tensor for path in paths for tensor in read(path)]
    raise UserError(f"{directory}: no weights: neither model*.safetensors nor pytorch_model*.bin")


def _read_safetensors(path: str) -> list[Entry]:
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(min(length, size)))
        header.pop("__metadata__", None)
        check_schema(header, {str: {"dtype": str, "shape": [int], "data_offsets": [int]}})
        tensors = []
        for name, info in header.items():
            begin, end = info["data_offsets"]
            shape, dtype = tuple(info["shape"]), np.dtype(_SAFETENSORS_DTYPES[info["dtype"]])
            if begin < 0 or min(shape, default=0) < 0:
                raise ValueError(f"{name}: a negative size or place")
            if end - begin != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
                raise ValueError(f"{name}: {end - begin} bytes of {size} do not make {shape} of {dtype}")
            read = functools.partial(entries.read_pieces, path, ((8 + length + begin, end - begin),))
            tensors.append(Entry((name,), shape, dtype, read))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({type(error).__name__}: {error})") from None
    return tensors


def _read_torch(path: str) -> list[Entry]:
    import torch

    try:
        # Files from torch before 1.6 are not zip archives, so torch cannot memory-map them.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many types, with advice that does not apply here
        raise UserError(f"{path}: not a readable torch weights file ({str(error).splitlines()[0]})") from None

    def read(tensor, out):
        raw = tensor.contiguous().view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        np.copyto(out, raw.numpy().view(out.dtype))

    return [
        Entry((name,), tuple(tensor.shape), np.dtype(str(tensor.dtype).split(".")[1]), functools.partial(read, tensor))
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
