"""A cache of image codes on disk for later epochs."""

import hashlib
import os
import sys
import tempfile

import numpy as np
from tqdm import tqdm

from tokenizer.builders.image_ref import ImageRef

_WAYS = 8  # slots per set: while at most half of the slots are filled, few images are evicted


class CodeCache:
    """A set-associative cache of fixed size in an unnamed file, which is deleted by `close` or the end of the process.

    The cache affects the speed of a build, not its result, because missing images are encoded again. A full disk
    therefore only disables the cache and frees its space.
    """

    def __init__(self, capacity: int, tokens_per_image: int, directory: str):
        """Creates a cache for at least `capacity` images; 0 disables it.

        A cached image takes 2 * tokens_per_image bytes in `directory`, and a slot takes 8 bytes in memory.
        """
        self._sets, self._entry_bytes = -(-capacity // _WAYS), 2 * tokens_per_image
        self._keys = np.zeros((self._sets, _WAYS), np.uint64)
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0) if capacity else None  # noqa: SIM115

    def get(self, ref: ImageRef) -> np.ndarray | None:
        """Returns the codes of the image, uint16 [N], if they are cached."""
        if self._file is None:
            return None
        key = _key(ref)
        (ways,) = np.nonzero(self._keys[key % self._sets] == np.uint64(key))
        if not len(ways):
            return None
        try:
            data = os.pread(self._file.fileno(), self._entry_bytes, self._offset(key, ways[0]))
        except OSError as error:
            self._disable(error)
            return None
        return np.frombuffer(data, np.uint16)

    def put(self, ref: ImageRef, codes: np.ndarray) -> None:
        """Caches the codes [N] of an image. Evicts another image if its set is full."""
        if self._file is None:
            return
        key = _key(ref)
        set_keys = self._keys[key % self._sets]
        (free,) = np.nonzero((set_keys == np.uint64(key)) | (set_keys == 0))
        way = free[0] if len(free) else (key >> 32) % _WAYS
        # With a memory-mapped file, a full disk would kill the process by a signal instead of raising an exception.
        try:
            written = os.pwrite(self._file.fileno(), codes.astype(np.uint16).tobytes(), self._offset(key, way))
        except OSError as error:
            self._disable(error)
            return
        set_keys[way] = key if written == self._entry_bytes else 0  # after a partial write, the next one raises

    def close(self) -> None:
        """Frees the space; the cache is disabled."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _offset(self, key: int, way: int) -> int:
        return (key % self._sets * _WAYS + int(way)) * self._entry_bytes

    def _disable(self, error: OSError) -> None:
        self.close()
        tqdm.write(f"warning: codes are no longer cached for later epochs: {error}", file=sys.stderr)


def _key(ref: ImageRef) -> int:
    """Returns a hash that is never 0, the key of an empty slot."""
    return max(1, int.from_bytes(hashlib.blake2b(repr(ref).encode(), digest_size=8).digest()))
