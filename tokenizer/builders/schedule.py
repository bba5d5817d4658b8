"""The order in which a build processes the examples of its data sets: a function of their numbers alone."""

import heapq
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

from EasyLM.data import permuted


class Slot(NamedTuple):
    """An example of a build.

    Attributes:
      number: its number in the build.
      data_set: the number of its data set.
      example: its number in the data set; it continues through all epochs of the data set.
    """

    number: int
    data_set: int
    example: int


def in_order(numbers: range) -> Iterator[Slot]:
    """Yields examples of a single data set in its own order."""
    return (Slot(number, 0, number) for number in numbers)


def interleaved(counts: Sequence[int], sizes: Sequence[int], seed: int, numbers: range) -> Iterator[Slot]:
    """Yields examples of several data sets, each spread evenly over the build, in a random order of its own.

    Example k of the n examples of a data set has the time (k + 1/2) / n, and the build sorts all examples by time.
    Therefore consecutive examples contain the data sets in their proportions, up to a few examples.

    Args:
      counts: examples of each data set in the build.
      sizes: examples of each data set in an epoch.
      seed: selects the orders; every epoch has another one.
      numbers: of the examples to yield, out of 0..sum(counts)-1.
    """
    # A time before which there are at most numbers.start examples: rounding adds at most 1/2 for each data set.
    time = max(Fraction(numbers.start - len(counts), max(sum(counts), 1)), Fraction(0))
    passed = [int(time * count + Fraction(1, 2)) for count in counts]
    waiting = [(Fraction(2 * k + 1, 2 * n), i, k) for i, (k, n) in enumerate(zip(passed, counts)) if k < n]
    heapq.heapify(waiting)
    for number in range(sum(passed), numbers.stop):
        _, i, k = waiting[0]
        if k + 1 < counts[i]:
            heapq.heapreplace(waiting, (Fraction(2 * k + 3, 2 * counts[i]), i, k + 1))
        else:
            heapq.heappop(waiting)
        if number >= numbers.start:
            epoch, position = divmod(k, sizes[i])
            yield Slot(number, i, epoch * sizes[i] + permuted(position, sizes[i], seed + i, epoch))
