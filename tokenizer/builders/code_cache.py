"""Codes of pictures that were encoded before, on disk, for those that come again in another epoch.

Shapes: N tokens a picture.
"""

import hashlib
import os
import sys
import tempfile

import numpy as np
from tqdm import tqdm

from tokenizer.builders.image_ref import Picture

_WAYS = 8  # places that a picture may take: with half of them filled, few pictures are lost to others


class CodeCache:
    """A table of a fixed size in a file without a name, which vanishes with the process: a set-associative cache.

    A picture that is not found, because it never came or another one took its place, is to be encoded again: the
    cache saves time and decides nothing. So a full disk ends only the cache, and gives back what it took of it.
    """

    def __init__(self, pictures: int, tokens_per_image: int, directory: str):
        """Room for at least `pictures` (0: no cache), 2 N bytes each on disk, used as it fills, and 8 in memory."""
        self._sets, self._bytes = -(-pictures // _WAYS), 2 * tokens_per_image
        self._keys = np.zeros((self._sets, _WAYS), np.uint64)
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0) if pictures else None  # noqa: SIM115

    def get(self, picture: Picture) -> np.ndarray | None:
        """Its codes, uint16 [N], if they are still there."""
        if self._file is None:
            return None
        key = _key(picture)
        (ways,) = np.nonzero(self._keys[key % self._sets] == np.uint64(key))
        if not len(ways):
            return None
        try:
            data = os.pread(self._file.fileno(), self._bytes, self._place(key, ways[0]))
        except OSError as error:
            self._end(error)
            return None
        return np.frombuffer(data, np.uint16)

    def put(self, picture: Picture, codes: np.ndarray) -> None:
        """Keeps its codes [N], in place of another picture's if need be."""
        if self._file is None:
            return
        key = _key(picture)
        of_set = self._keys[key % self._sets]
        (fit,) = np.nonzero((of_set == np.uint64(key)) | (of_set == 0))
        way = fit[0] if len(fit) else (key >> 32) % _WAYS
        # Not mapped into memory: there a full disk is no exception but a signal that ends the process.
        try:
            written = os.pwrite(self._file.fileno(), codes.astype(np.uint16).tobytes(), self._place(key, way))
        except OSError as error:
            self._end(error)
            return
        of_set[way] = key if written == self._bytes else 0  # part of it: the next one that is written says why

    def _place(self, key: int, way: int) -> int:
        return (key % self._sets * _WAYS + int(way)) * self._bytes

    def _end(self, error: OSError) -> None:
        self._file.close()
        self._file = None
        tqdm.write(f"warning: codes are not kept for further epochs any more: {error}", file=sys.stderr)


def _key(picture: Picture) -> int:
    """Never 0, which marks an empty place."""
    return max(1, int.from_bytes(hashlib.blake2b(repr(picture).encode(), digest_size=8).digest()))
