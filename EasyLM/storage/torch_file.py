"""Reads the files of `torch.save` without torch. The code that a file refers to is never executed.

Such a file is a pickle and the bytes of the tensors: a zip archive, or one stream in versions of torch before 1.6. Next
to weights it can hold optimizers, callbacks and arguments of any class. Placeholders stand for these objects.
"""

import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from EasyLM.errors import UserError
from EasyLM.storage.pickles import Unchangeable, check_memo
from EasyLM.storage.reading import check_no_pointer

_MOST_PICKLE_BYTES = 64 << 20  # of the pickle, which holds no array; that of a large training run has some megabytes
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

# Type of a storage -> type of its items. Newer types of torch, such as 8-bit floats, are read as placeholders.
_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


class Placeholder(metaclass=Unchangeable):
    """Stands for an object of any other class. Accepts what a pickle does to an object, and keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Placeholder":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "Placeholder":
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Ignores the item."""

    def extend(self, items: Any) -> None:
        """Ignores the items."""

    def add(self, item: Any) -> None:
        """Ignores the item."""


class _Storage:
    """The memory of one or more tensors. `read_bytes` reads it from the file."""

    def __init__(self, dtype: np.dtype, count: int):
        self.dtype, self.count = dtype, count
        self.read_bytes: Callable[[], bytes] | None = None


class TorchTensor(metaclass=Unchangeable):
    """A tensor of the file, which is read on demand.

    Attributes:
      shape, dtype: of the array.
    """

    def __init__(self, storage: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any):
        """Takes the arguments of torch's `_rebuild_tensor_v2`; `offset` and `strides` count items."""
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("a tensor of an unknown form")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if math.prod(shape) and (last >= storage.count or math.prod(shape) > storage.count):
            raise ValueError(f"a tensor {tuple(shape)} beyond its storage of {storage.count} items")
        self.shape, self.dtype = tuple(shape), storage.dtype
        self._storage, self._offset, self._strides = storage, offset, tuple(strides)

    def __setstate__(self, state: Any) -> None:
        pass

    def read(self) -> np.ndarray:
        """Reads the array from the file.

        Raises:
          UserError: if the file is truncated or damaged.
        """
        if not math.prod(self.shape):
            return np.zeros(self.shape, self.dtype)
        assert self._storage.read_bytes is not None
        try:
            items = np.frombuffer(self._storage.read_bytes(), self.dtype)
        except Exception as error:  # zipfile has errors of many types
            raise UserError(f"damaged ({type(error).__name__}: {error})") from None
        if len(items) < self._storage.count:
            raise UserError("truncated")
        strides = [stride * self.dtype.itemsize for stride in self._strides]
        return np.lib.stride_tricks.as_strided(items[self._offset :], self.shape, strides).copy()


class _Dict(dict, metaclass=Unchangeable):
    """Stands for OrderedDict. A state dict of torch sets an attribute, which is ignored."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Parameter(metaclass=Unchangeable):
    """Stands for torch's `_rebuild_parameter`, which returns its first argument."""

    def __new__(cls, tensor: Any, *_: Any) -> Any:
        return tensor


_CLASSES: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): TorchTensor,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _Parameter,
    ("collections", "OrderedDict"): _Dict,
    # The name of a storage's type stands for it.
    **{("torch", name): name for name in _STORAGES},
}


class _Unpickler(pickle.Unpickler):
    """Makes tensors, dictionaries and placeholders. `storages` collects the storages of the tensors by key."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="latin1")  # Python 2 wrote some of the old files
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        return _CLASSES.get((module, name), Placeholder)

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, count = pid[:5]
        if kind not in _STORAGES:
            return Placeholder()
        if type(count) is not int or count < 0:
            raise ValueError("a storage of an unknown size")
        return self.storages.setdefault(str(key), _Storage(_STORAGES[kind], count))


def read_torch_file(path: str | os.PathLike) -> Any:
    """Returns the content of a file of `torch.save`: plain containers and values, tensors and placeholders.

    Raises:
      UserError: naming the file, if it does not exist, is of another format, broken or too large.
    """
    try:
        if zipfile.is_zipfile(path):
            return _read_archive(zipfile.ZipFile(path))
        return _read_stream(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # a broken pickle may raise almost any exception
        check_no_pointer(path)
        raise UserError(f"{path}: not a file of tensors ({type(error).__name__}: {error})") from None


def _read_archive(archive: zipfile.ZipFile) -> Any:
    names = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
    if len(names) != 1:
        raise ValueError("no data.pkl in the archive")
    root = names[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and _member(archive, f"{root}byteorder", 16) != b"little":
        raise ValueError("not little-endian")
    data = _member(archive, names[0], _MOST_PICKLE_BYTES)
    check_memo(data)
    unpickler = _Unpickler(data)
    content = unpickler.load()
    for key, storage in unpickler.storages.items():
        most = storage.count * storage.dtype.itemsize
        storage.read_bytes = lambda name=f"{root}data/{key}", most=most: _member(archive, name, most)
    return content


def _member(archive: zipfile.ZipFile, name: str, most_bytes: int) -> bytes:
    """Reads a member and verifies its checksum. torch does not compress, so no member is larger than on disk."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > most_bytes:
        raise ValueError(f"{name}: compressed, or more than {most_bytes} bytes")
    return archive.read(info)


def _read_stream(path: str | os.PathLike) -> Any:
    """Reads the format before torch 1.6: magic number, version, machine, content, keys, then the storages."""
    with open(path, "rb") as file:
        stream = io.BytesIO(file.read(_MOST_PICKLE_BYTES))
    magic, _, _ = (_next_pickle(stream).load() for _ in range(3))
    if magic != _LEGACY_MAGIC:
        raise ValueError("another kind of pickle")
    unpickler = _next_pickle(stream)
    content = unpickler.load()
    keys = _next_pickle(stream).load()
    offset = stream.tell()
    for key in keys:
        storage = unpickler.storages[str(key)]
        size = storage.count * storage.dtype.itemsize
        storage.read_bytes = lambda start=offset + 8, size=size: _bytes_at(path, start, size)  # after the count, int64
        offset += 8 + size
    return content


def _next_pickle(stream: io.BytesIO) -> _Unpickler:
    start = stream.tell()
    check_memo(stream)
    return _Unpickler(stream.getvalue()[start : stream.tell()])


def _bytes_at(path: str | os.PathLike, start: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)
