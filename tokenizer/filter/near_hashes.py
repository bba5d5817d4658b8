"""Pairs of 64-bit hashes at a small distance, among any number of them, without comparing all pairs.

Two hashes that differ in k bits are equal in at least two of k + 2 blocks of bits. For each two blocks, the hashes are
sorted by these blocks, and only those that are equal there are compared. Manku, Jain and Das Sarma, "Detecting
Near-Duplicates for Web Crawling" (WWW 2007). Memory is proportional to the number of hashes; see `near_earlier`.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

_BITS = 64
_COMPARED = 1 << 20  # pairs of hashes that are compared at a time


def near_pairs(
    queries_n: np.ndarray, references_m: np.ndarray, distance: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (queries [p], references [p]): each pair of a query and a reference within the distance, once.

    Args:
      queries_n: different hashes, uint64 [n].
      references_m: different hashes, uint64 [m]; may be the same array.
      distance: the most bits in which a pair differs.
    """
    blocks = distance + 2
    widths = [_BITS * (i + 1) // blocks - _BITS * i // blocks for i in range(blocks)]
    for first, second in itertools.combinations(range(blocks), 2):
        order = [first, second, *(i for i in range(blocks) if i not in (first, second))]
        moved_m = _reorder(references_m, widths, order)
        moved_m.sort()
        moved_n = moved_m if queries_n is references_m else np.sort(_reorder(queries_n, widths, order))
        moved_widths = [widths[i] for i in order]
        for moved_p, other_p in _equal_in_high_bits(moved_n, moved_m, moved_widths[0] + moved_widths[1]):
            different_p = moved_p ^ other_p
            is_near = np.bitwise_count(different_p) <= distance
            # A pair may be equal in further blocks. It is found with the first two.
            for i, mask in zip(order[2:], _masks(moved_widths)[2:]):
                if i < second:
                    is_near &= (different_p & mask) != 0
            if is_near.any():
                back = [order.index(i) for i in range(blocks)]
                yield _reorder(moved_p[is_near], moved_widths, back), _reorder(other_p[is_near], moved_widths, back)
        del moved_m, moved_n  # before the next ones are made


def _masks(widths: Sequence[int]) -> list[np.uint64]:
    """Returns a mask of each block; the first block has the highest bits."""
    ends = itertools.accumulate(widths)
    return [np.uint64(((1 << width) - 1) << (_BITS - end)) for width, end in zip(widths, ends)]


def _reorder(hashes_n: np.ndarray, widths: Sequence[int], order: Sequence[int]) -> np.ndarray:
    """Puts the blocks of bits into another order."""
    starts = [_BITS - end for end in itertools.accumulate(widths)]  # the lowest bit of each block
    moved_n, end = np.zeros_like(hashes_n), _BITS
    for i in order:
        end -= widths[i]
        block_n = hashes_n >> np.uint64(starts[i])
        block_n &= np.uint64((1 << widths[i]) - 1)
        block_n <<= np.uint64(end)
        moved_n |= block_n
    return moved_n


def _equal_in_high_bits(
    queries_n: np.ndarray, references_m: np.ndarray, bits: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (queries [p], references [p]) of all pairs that are equal in their high bits. Both are sorted."""
    low_bits = np.uint64((1 << (_BITS - bits)) - 1)
    for start in range(0, len(queries_n), _COMPARED):
        queries_q = queries_n[start : start + _COMPARED]
        firsts_q = np.searchsorted(references_m, queries_q & ~low_bits)
        ends_q = np.cumsum(np.searchsorted(references_m, queries_q | low_bits, side="right") - firsts_q)
        for begin in range(0, int(ends_q[-1]), _COMPARED):
            pairs_p = np.arange(begin, min(begin + _COMPARED, int(ends_q[-1])))
            query_p = np.searchsorted(ends_q, pairs_p, side="right")
            # Pair 0 of a query is the first of its references.
            reference_p = firsts_q[query_p] + pairs_p - np.where(query_p, ends_q[query_p - 1], 0)
            yield queries_q[query_p], references_m[reference_p]


def repeats(values_n: np.ndarray) -> np.ndarray:
    """Returns which values occur earlier in the array, bool [n]."""
    order_n = np.argsort(values_n, kind="stable")
    sorted_n = values_n[order_n]
    repeats_n = np.zeros(len(values_n), bool)
    repeats_n[order_n[1:]] = sorted_n[1:] == sorted_n[:-1]
    return repeats_n


def near_earlier(hashes_n: np.ndarray, distance: int) -> np.ndarray:
    """Returns which hashes to leave out, bool [n], so that no two of the others are within the distance.

    Goes through the hashes in order, and leaves out each one that is within the distance of an earlier one that is not
    left out. Takes at most 42 bytes of memory for each hash, and 32 for each pair within the distance.

    Args:
      hashes_n: uint64 [n]; may be equal.
    """
    order_n = np.argsort(hashes_n, kind="stable")
    sorted_n = hashes_n[order_n]
    is_first_n = np.ones(len(hashes_n), bool)
    is_first_n[1:] = sorted_n[1:] != sorted_n[:-1]
    firsts_u, unique_u = order_n[is_first_n], sorted_n[is_first_n]  # the index of each hash in hashes_n
    del order_n, sorted_n, is_first_n
    pairs = []
    for one_p, other_p in near_pairs(unique_u, unique_u, distance):
        is_new = one_p < other_p
        one_p, other_p = (firsts_u[np.searchsorted(unique_u, hashes_p[is_new])] for hashes_p in (one_p, other_p))
        pairs.append(np.stack([np.minimum(one_p, other_p), np.maximum(one_p, other_p)]))
    left_out_n = np.ones(len(hashes_n), bool)
    left_out_n[firsts_u] = False
    if pairs:
        left_out_n[_left_out(*np.concatenate(pairs, axis=1))] = True
    return left_out_n


def _left_out(earlier_p: np.ndarray, later_p: np.ndarray) -> np.ndarray:
    """Returns the numbers to leave out: the later one of each pair whose earlier one is not left out."""
    numbers_i, indices_2p = np.unique(np.concatenate([earlier_p, later_p]), return_inverse=True)
    earlier_p, later_p = np.split(indices_2p, 2)
    left_out_i = np.zeros(len(numbers_i), bool)
    while len(earlier_p):
        is_open_i = np.zeros(len(numbers_i), bool)
        is_open_i[later_p] = True  # an earlier one may still leave it out
        left_out_i[later_p[~is_open_i[earlier_p]]] = True
        is_left_p = ~left_out_i[earlier_p] & ~left_out_i[later_p]
        earlier_p, later_p = earlier_p[is_left_p], later_p[is_left_p]
    return numbers_i[left_out_i]
