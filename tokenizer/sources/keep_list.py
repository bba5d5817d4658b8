"""Keep lists: the names of the images of a source that passed `tokenizer.filter`.

A keep list has a JSON text on each line, and is compressed if its name ends in .gz or .zst: first the names, then an
object that identifies the source by the number and the digest of its names, and by the contents of a few kept images.
Names do not depend on where the source lies, so that a list holds on every machine that has the same source.
"""

import array
import contextlib
import dataclasses
import gzip
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import orjson
import zstandard

from EasyLM.errors import UserError, prefix_errors
from EasyLM.storage import atomic_path, check_schema, read_lines
from tokenizer.sources.items import Item
from tokenizer.sources.reading import read_bytes

_VERSION = 1
_FOOTER = {"keep_list": int, "images": int, "names": str, "kept": int, "samples": {str: str}}


class NamesDigest:
    """The number of names and their digest, which does not depend on their order.

    Attributes:
      count: the names that were added.
    """

    def __init__(self) -> None:
        self.count, self._sum = 0, 0

    def add(self, name: str) -> int:
        """Adds a name; returns its hash of 64 bits."""
        number = _hash(name)
        self.count, self._sum = self.count + 1, self._sum + number
        return number % 2**64

    def hexdigest(self) -> str:
        """Returns the digest of the names so far."""
        return f"{self._sum % 2**128:032x}"


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest())


@dataclasses.dataclass(frozen=True)
class KeepList:
    """A keep list in memory: 8 bytes an image.

    Attributes:
      path: its file.
      images: number of images of the source.
      names: their `NamesDigest`.
      samples: name -> SHA-256 of a few of the kept images.
      hashes_n: hashes of the kept names, sorted, uint64 [n].
    """

    path: str
    images: int
    names: str
    samples: Mapping[str, str]
    hashes_n: np.ndarray

    def __len__(self) -> int:
        return len(self.hashes_n)


class KeptItems:
    """Tells which listed items a keep list has, and checks that it is a list of their source."""

    def __init__(self, keep_list: KeepList):
        self._list, self._names = keep_list, NamesDigest()
        self._samples: dict[str, Item] = {}

    def takes(self, item: Item) -> bool:
        """Whether the list has an item. Call it once for each item of the source."""
        if item.name in self._list.samples:
            self._samples[item.name] = item
        number, hashes_n = np.uint64(self._names.add(item.name)), self._list.hashes_n
        place = int(np.searchsorted(hashes_n, number))
        return place < len(hashes_n) and bool(hashes_n[place] == number)

    def checked_digest(self) -> int:
        """Returns a digest of the kept names, of 128 bits. Call it after the last item.

        Raises:
          UserError: naming the list, if it was made from other images.
        """
        subject = f"--keep={self._list.path}: is the list of another source"
        if self._names.count != self._list.images:
            raise UserError(f"{subject}: of {self._list.images} images, but the inputs are {self._names.count}")
        if self._names.hexdigest() != self._list.names:
            raise UserError(f"{subject}: its images have other names than the {self._list.images} inputs")
        for name, digest in self._list.samples.items():
            item = self._samples[name]
            with contextlib.suppress(UserError):  # one that cannot be read is reported when it is used
                if hashlib.sha256(read_bytes(item.address, item.location)).hexdigest() != digest:
                    break
        else:
            return int.from_bytes(hashlib.blake2b(self._list.hashes_n.data, digest_size=16).digest())
        raise UserError(f"{subject}, or its images have changed: {item.address} has other contents")


def read_keep_list(path: str) -> KeepList:
    """Reads a keep list.

    Raises:
      UserError: naming the file and the line, if it is missing, truncated or no keep list.
    """
    hashes, footer = array.array("Q"), None
    try:
        for number, line in read_lines(path):
            with prefix_errors(f"{path}:{number}"):
                value = _parse(line)
                if footer is not None:
                    raise UserError("follows the last line of the list")
                if isinstance(value, str):
                    hashes.append(_hash(value) % 2**64)
                else:
                    check_schema(value, _FOOTER)
                    footer = value
    except UserError as error:
        raise UserError(f"--keep={error}" if str(error).startswith(path) else f"--keep={path}: {error}") from None
    if footer is None or footer["kept"] != len(hashes):
        raise UserError(f"--keep={path}: is truncated, or no list of tokenizer.filter: its last line is missing")
    if footer["keep_list"] != _VERSION:
        raise UserError(f"--keep={path}: is of version {footer['keep_list']}, not {_VERSION}: filter again")
    hashes_n = np.sort(np.frombuffer(hashes, np.uint64))
    return KeepList(path, footer["images"], footer["names"], footer["samples"], hashes_n)


def _parse(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"no line of a list of tokenizer.filter: not JSON ({error})") from None


class KeepListWriter:
    """Writes the names of a keep list.

    Attributes:
      kept: number of names so far.
    """

    def __init__(self, write: Callable[[bytes], object]):
        self._write, self.kept = write, 0

    def add(self, name: str) -> None:
        """Adds the name of a kept image."""
        self._write(orjson.dumps(name) + b"\n")
        self.kept += 1

    def finish(self, images: int, names: str, samples: Mapping[str, str]) -> None:
        """Writes the last line; the arguments are attributes of a KeepList."""
        footer = {"keep_list": _VERSION, "images": images, "names": names, "kept": self.kept, "samples": dict(samples)}
        self._write(orjson.dumps(footer) + b"\n")


@contextlib.contextmanager
def keep_list_writer(path: str) -> Iterator[KeepListWriter]:
    """Yields a writer of a keep list, which appears under its name at the end."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        if path.lower().endswith(".gz"):
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as compressed:
                yield KeepListWriter(compressed.write)
        elif path.lower().endswith(".zst"):
            with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as compressed:
                yield KeepListWriter(compressed.write)
        else:
            yield KeepListWriter(file.write)
