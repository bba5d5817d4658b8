"""The code cache returns the cached codes or None. Its file has a fixed size, and a full disk disables it."""

import errno
import os

import numpy as np
import pytest
from build_kit import build_records
from open_files import open_files

from tokenizer.builders import writing
from tokenizer.builders.code_cache import CodeCache
from tokenizer.builders.image_ref import ImageRef

TOKENS = 4


def test_cached_codes_are_correct_or_missing(make_cache, tmp_path):
    capacity = 64
    cache = make_cache(capacity)
    codes = {ImageRef(str(i), i / 7, "hole", i): np.full(TOKENS, i, np.uint16) for i in range(10 * capacity)}
    kept = 0
    for i, (ref, value) in enumerate(codes.items(), start=1):
        assert cache.get(ref) is None
        cache.put(ref, value)
        np.testing.assert_array_equal(cache.get(ref), value)
        if i == capacity // 2:
            kept = sum(cache.get(ref) is not None for ref in list(codes)[:i])
    assert kept >= 0.9 * capacity // 2  # few evictions up to half of the capacity
    cached = {ref: cache.get(ref) for ref in codes}
    assert 0.8 * capacity <= sum(value is not None for value in cached.values()) <= capacity
    for ref, value in cached.items():
        assert value is None or np.array_equal(value, codes[ref])
    assert not os.listdir(tmp_path)  # an unnamed file: nothing remains after SIGKILL


def test_a_full_disk_disables_the_cache(make_cache, monkeypatch, capsys):
    cache = make_cache(64)
    one, two, three = (ImageRef(str(i)) for i in range(3))
    cache.put(one, np.arange(TOKENS))
    with monkeypatch.context() as patch:
        pwrite = os.pwrite
        patch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:3], offset))  # a partial write
        cache.put(two, np.arange(TOKENS))
        assert cache.get(two) is None and cache.get(one).tolist() == list(range(TOKENS))

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "pwrite", full)
        cache.put(three, np.arange(TOKENS))
    for ref in (one, two, three):
        cache.put(ref, np.arange(TOKENS))
        assert cache.get(ref) is None
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "no longer cached for later epochs: [Errno 28] No space left" in warning


def test_a_build_closes_its_cache(tree, tiny, tmp_path):
    made: list = []  # holds the cache
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "CodeCache", lambda *sizes: made.append(CodeCache(*sizes)) or made[-1])
        build_records(tree, tiny, tmp_path / "out.jsonl", "colorization")
    assert made and not open_files(tmp_path)
