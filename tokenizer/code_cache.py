"""Codes of pictures that were encoded before, on disk, for those that come again in another epoch.

Shapes: N tokens a picture.
"""

import hashlib
import tempfile

import numpy as np

from tokenizer.pictures import Picture

_WAYS = 8  # places that a picture may take: with half of them filled, few pictures are lost to others


class CodeCache:
    """A table of a fixed size in a file without a name, which vanishes with the process: a set-associative cache.

    A picture that is not found, because it never came or another one took its place, is to be encoded again: the
    cache saves time and decides nothing.
    """

    def __init__(self, pictures: int, tokens_per_image: int, directory: str):
        """Room for at least `pictures`, 2 N + 8 bytes each; the disk is used as it fills."""
        self._sets = -(-pictures // _WAYS)
        keys_bytes = 8 * self._sets * _WAYS
        file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  # the arrays keep it
        file.truncate(keys_bytes + 2 * self._sets * _WAYS * tokens_per_image)
        keys = np.memmap(file, np.uint64, "r+", 0, (self._sets, _WAYS))
        codes = np.memmap(file, np.uint16, "r+", keys_bytes, (self._sets, _WAYS, tokens_per_image))
        self._keys, self._codes = (
            keys.view(np.ndarray),
            codes.view(np.ndarray),
        )  # indexing a memmap takes 20 times as long

    def get(self, picture: Picture) -> np.ndarray | None:
        """Its codes, uint16 [N], if they are still there."""
        key = _key(picture)
        (ways,) = np.nonzero(self._keys[key % self._sets] == np.uint64(key))
        return np.array(self._codes[key % self._sets, ways[0]]) if len(ways) else None

    def put(self, picture: Picture, codes: np.ndarray) -> None:
        """Keeps its codes [N], in place of another picture's if need be."""
        key = _key(picture)
        of_set = self._keys[key % self._sets]
        (fit,) = np.nonzero((of_set == np.uint64(key)) | (of_set == 0))
        way = fit[0] if len(fit) else (key >> 32) % _WAYS
        self._codes[key % self._sets, way] = codes
        of_set[way] = key


def _key(picture: Picture) -> int:
    """Never 0, which marks an empty place."""
    return max(1, int.from_bytes(hashlib.blake2b(repr(picture).encode(), digest_size=8).digest()))
