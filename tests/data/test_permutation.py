"""Permutations of a range, number by number."""

import numpy as np
import pytest

from EasyLM.data import permuted, shuffled_number


@pytest.mark.parametrize("count", [2, 5, 64, 65, 1000])
def test_numbers_are_uniform_at_each_position(count):
    """Chi-square of the numbers at the first, a middle and the last position, over many seeds and epochs."""
    draws = 20 * count
    for position in (0, count // 2, count - 1):
        numbers = [permuted(position, count, seed, epoch) for seed in range(draws // 4) for epoch in range(4)]
        expected = len(numbers) / count
        chi_square = ((np.bincount(numbers, minlength=count) - expected) ** 2 / expected).sum()
        assert abs(chi_square - (count - 1)) < 5 * np.sqrt(2 * (count - 1))  # 5 standard deviations


def test_neighbours_are_independent():
    """In a random order, the distance of consecutive numbers averages a third of the range."""
    order = np.array([permuted(position, 5000, 7, 0) for position in range(5000)])
    assert abs(np.abs(np.diff(order)).mean() - 5000 / 3) < 100
    assert abs(np.corrcoef(order, np.arange(5000))[0, 1]) < 0.06


def test_huge_ranges():
    numbers = {permuted(position, 10**12, 1, 0) for position in range(100)}
    assert len(numbers) == 100 and max(numbers) > 10**11


def test_each_epoch_has_another_permutation():
    orders = [[shuffled_number(row, 50, 3) for row in range(epoch * 50, (epoch + 1) * 50)] for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_orders_do_not_change_between_versions():
    """Runs resume with the order that an earlier version started with."""
    assert [permuted(position, 10, 42, 0) for position in range(10)] == [4, 0, 6, 1, 5, 7, 8, 9, 3, 2]
    assert [permuted(i, 10**9 + 7, 1234567, 5) for i in (0, 1, 10**9)] == [
        951161912,
        964526609,
        847355143,
    ]
