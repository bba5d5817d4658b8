"""The checksum of an array follows from those of its parts."""

import zlib

import numpy as np
import pytest

from EasyLM.storage import checksums


@pytest.mark.parametrize("ends", [[1000], [0, 1000], [1, 2, 999, 1000], [500, 500, 1000]])
def test_parts_are_joined(ends):
    data = np.random.default_rng(0).bytes(1000)
    parts = [data[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    joined = checksums.joined_checksum("a", (1000,), np.dtype("u1"), [(zlib.crc32(part), len(part)) for part in parts])
    assert joined == f"{zlib.crc32(b'a (1000,) uint8' + data):08x}"
    assert joined == checksums.array_checksum("a", (1000,), np.dtype("u1"), parts)
