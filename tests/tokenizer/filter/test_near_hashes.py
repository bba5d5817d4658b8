"""Near hashes are those that a comparison of all pairs finds, in memory proportional to their number."""

import tracemalloc

import numpy as np
import pytest

from tokenizer.filter import near_hashes


def _crowded(count: int, seed: int) -> np.ndarray:
    """Returns hashes around a few centres, so that many are near each other and some are equal."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).integers(0, 2**64, 20, np.uint64)
    hashes_n = rng.choice(centres, count)
    for _ in range(4):  # turns up to 4 bits
        hashes_n ^= np.uint64(1) << rng.integers(0, 64, count, np.uint64)
    return rng.choice(hashes_n, count)


@pytest.mark.parametrize("distance", [0, 1, 3, 6])
def test_near_pairs_are_all_pairs_within_the_distance_each_once(monkeypatch, distance):
    monkeypatch.setattr(near_hashes, "_COMPARED", 100)  # blocks end inside of the matches of a hash
    ours_n, theirs_m = np.unique(_crowded(500, 0)), np.unique(_crowded(300, 1))
    ours_n = np.union1d(ours_n, theirs_m[::3])
    for left, right in ((ours_n, ours_n), (ours_n, theirs_m)):
        near = [pair for pairs in near_hashes.near_pairs(left, right, distance) for pair in zip(*pairs)]
        is_near_nm = np.bitwise_count(left[:, None] ^ right) <= distance
        expected = {(left[i], right[j]) for i, j in zip(*np.nonzero(is_near_nm))}
        assert len(near) == len(expected) and set(near) == expected
        assert len(expected) > 50


def test_no_hash_gives_no_pair():
    none = np.empty(0, np.uint64)
    assert not list(near_hashes.near_pairs(none, none, 3))
    assert not list(near_hashes.near_pairs(none, np.arange(3, dtype=np.uint64), 3))
    assert near_hashes.near_earlier(none, 3).tolist() == near_hashes.repeats(none).tolist() == []


@pytest.mark.parametrize("distance", [0, 2, 5])
def test_each_hash_that_is_left_out_is_near_an_earlier_one_that_is_not(distance):
    hashes_n = _crowded(600, 2)
    expected = np.zeros(len(hashes_n), bool)
    for i, number in enumerate(hashes_n):
        others = hashes_n[:i][~expected[:i]]
        expected[i] = (np.bitwise_count(others ^ number) <= distance).any()
    assert near_hashes.near_earlier(hashes_n, distance).tolist() == expected.tolist()
    assert 50 < expected.sum() < 595


def test_repeats_are_all_but_the_first():
    values_n = np.array([3, 1, 3, 3, 2, 1], np.uint64)
    assert near_hashes.repeats(values_n).tolist() == [False, False, True, True, False, True]


def test_memory_is_proportional_to_the_number_of_hashes(monkeypatch):
    """The figure in the docstring holds; the blocks of pairs, whose size is constant, are made small here."""
    monkeypatch.setattr(near_hashes, "_COMPARED", 200)
    count = 20_000
    hashes_n = np.random.default_rng(0).integers(0, 2**64, count, np.uint64)
    hashes_n[1::100] = hashes_n[::100] ^ np.uint64(1 << 40)
    peaks = []
    for _ in range(3):  # the smallest peak counts, because other threads of the process can allocate meanwhile
        tracemalloc.start()
        try:
            left_out_n = near_hashes.near_earlier(hashes_n, 3)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert np.flatnonzero(left_out_n).tolist() == list(range(1, count, 100))
    assert 25 * count < min(peaks) < 42.5 * count
