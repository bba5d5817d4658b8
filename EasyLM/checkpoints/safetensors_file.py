"""Reads and writes safetensors files, one tensor at a time, with a checksum of each tensor.

The header's `__metadata__` of a file that this module writes has the key `checksums`. Its value is a JSON text, in the
form of a checkpoint's `checksums.json`: {"algorithm": "crc32", "arrays": {"lm_head.weight": "0a1b2c3d", ...}}. Other
programs ignore it. Reading a tensor verifies its checksum. Files of other programs have no checksums, and load without
verification.
"""

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np

from EasyLM.checkpoints import checksums, entries
from EasyLM.checkpoints.entries import Entry
from EasyLM.errors import UserError
from EasyLM.storage import check_no_pointer, check_schema, parse_json
from EasyLM.storage.checksums import ALGORITHM

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
_DTYPES |= {
    f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_TENSORS = {str: {"dtype": str, "shape": [int], "data_offsets": [int]}}
_CHECKSUMS = {"algorithm": str, "arrays": {str: str}}
_KEY = "checksums"
# A text with two of these holds checksums, whatever its key is: key and text can both be damaged.
_MARKS = ('{"algorithm": ', f'"{ALGORITHM}"', '"arrays": {')


def write_safetensors(file: BinaryIO, tensors: Sequence[Entry]) -> None:
    """Writes a file. The key of a tensor is `(name,)`. The function holds one tensor in memory at a time.

    Args:
      file: an empty seekable file.
    """
    sums = {tensor.key[0]: "0" * 8 for tensor in tensors}
    file.write(_header(tensors, sums))
    for tensor in tensors:
        array = tensor.read()
        sums[tensor.key[0]] = checksums.array_checksum(tensor.key, array)
        file.write(entries.bytes_of(array))
    file.seek(0)
    file.write(_header(tensors, sums))  # as long as before
    file.seek(0, os.SEEK_END)


def tensor_entry(name: str, array: np.ndarray) -> Entry:
    """Returns an array in memory as an entry for `write_safetensors`."""
    return Entry((name,), array.shape, array.dtype, lambda out: np.copyto(out, array))


def num_bytes(tensor: Entry) -> int:
    """Returns the size of a tensor in bytes."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _header(tensors: Sequence[Entry], sums: Mapping[str, str]) -> bytes:
    metadata = {"format": "pt", _KEY: json.dumps({"algorithm": ALGORITHM, "arrays": sums})}
    header: dict[str, dict] = {"__metadata__": metadata}
    offset = 0
    for tensor in tensors:
        end = offset + num_bytes(tensor)
        header[tensor.key[0]] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)  # aligns the tensors to 8 bytes
    return len(data).to_bytes(8, "little") + data


class _UnsupportedTypeError(UserError):
    pass


def read_safetensors(path: str | os.PathLike) -> list[Entry]:
    """Returns the tensors of a file as entries, without reading them. A key is `(tensor name,)`.

    Raises:
      UserError: naming the file, if it is truncated, too long or damaged, or has a type such as F8_E4M3. Reading a
        damaged tensor raises `checksums.DamagedArrayError`.
    """
    path = os.fspath(path)
    try:
        return _entries(path)
    except _UnsupportedTypeError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        check_no_pointer(path)
        reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not a complete safetensors file ({reason})") from None


def _entries(path: str) -> list[Entry]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(min(length, size)))
    metadata = header.pop("__metadata__", {})
    check_schema(metadata, {str: str})
    check_schema(header, _TENSORS)
    tensors = []
    for name, info in header.items():
        begin, end = info["data_offsets"]
        if info["dtype"] not in _DTYPES:
            raise _UnsupportedTypeError(f"{path}: {name} is {info['dtype']}; supported are {', '.join(_DTYPES)}")
        shape, dtype = tuple(info["shape"]), np.dtype(_DTYPES[info["dtype"]])
        if begin < 0 or min(shape, default=0) < 0:
            raise ValueError(f"{name}: a negative size or offset")
        if end - begin != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
            raise ValueError(f"{name}: {end - begin} bytes of {size} do not make {shape} of {dtype}")
        read = functools.partial(entries.read_pieces, path, ((8 + length + begin, end - begin),))
        tensors.append(Entry((name,), shape, dtype, read))
    _check_no_gaps(sorted(info["data_offsets"] for info in header.values()), size - 8 - length)
    return _verified(path, tensors, metadata)


def _check_no_gaps(ranges: list[list[int]], size: int) -> None:
    """Raises ValueError unless the ranges cover `size` bytes, each byte once. A file joined to itself does not pass."""
    position = 0
    for begin, end in ranges:
        if begin != position:
            raise ValueError(f"the tensors do not follow each other at byte {position}")
        position = end
    if position != size:
        raise ValueError(f"{size} bytes of tensors instead of {position}")


def _verified(path: str, tensors: list[Entry], metadata: Mapping[str, str]) -> list[Entry]:
    keys = {key for key, text in metadata.items() if key == _KEY or sum(mark in text for mark in _MARKS) >= 2}
    if not keys:
        return tensors
    if keys != {_KEY}:
        raise ValueError(f"checksums under the key {min(keys - {_KEY})!r} instead of {_KEY!r}")
    table = parse_json(metadata[_KEY], _CHECKSUMS)
    if table["algorithm"] != ALGORITHM:
        raise ValueError(f"checksums of the unknown algorithm {table['algorithm']!r}")
    sums = table["arrays"]
    if different := sorted(sums.keys() ^ {tensor.key[0] for tensor in tensors}):
        raise ValueError(f"the tensors and the checksums differ: {different[0]}")
    return [checksums.verified_entry(path, tensor, sums[tensor.key[0]]) for tensor in tensors]
