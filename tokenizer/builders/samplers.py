"""Samplers select the rows of an example.

Builds progress, shard and resume by examples. The seed, the epoch and its number determine an example. The memory of a
sampler does not grow with the inputs, except for sixteen bytes per class.
"""

from typing import Protocol

import numpy as np

from EasyLM.data import permuted
from EasyLM.errors import UserError
from tokenizer.builders.arrangements import Row
from tokenizer.builders.file_index import FileIndex
from tokenizer.builders.settings import SentenceSettings


class Sampler(Protocol):
    """Rows by epoch and example.

    Attributes:
      num_examples: examples in an epoch.
    """

    num_examples: int

    def rows(self, epoch: int, example: int) -> list[Row]:
        """Returns the rows of an example, 0 <= example < num_examples."""
        ...


class SingleItems:
    """One item per example, in order."""

    def __init__(self, index: FileIndex, settings: SentenceSettings):
        self._index, self.num_examples = index, len(index)

    def rows(self, epoch: int, example: int) -> list[Row]:
        """Returns all rows of one item."""
        return self._index.rows(example)


class Shots:
    """`n_shots` items of one row each. Each epoch shuffles all items and leaves out a different remainder."""

    def __init__(self, index: FileIndex, settings: SentenceSettings):
        """Raises UserError naming the setting, if there are too few items."""
        self._index, self._shots, self._seed = index, settings.n_shots, settings.seed
        self.num_examples = len(index) // settings.n_shots
        if not self.num_examples:
            raise UserError(f"n_shots={settings.n_shots}: there are only {len(index)} inputs")

    def rows(self, epoch: int, example: int) -> list[Row]:
        """Returns the rows of `n_shots` items."""
        positions = range(example * self._shots, (example + 1) * self._shots)
        items = (permuted(position, len(self._index), self._seed, epoch) for position in positions)
        return [row for item in items for row in self._index.rows(item)]


class Classes:
    """`images_per_shot` rows of each of `n_shots` classes (items), class by class.

    An epoch shuffles the rows of each class. Its first round takes the first `images_per_shot` rows of every class, the
    next round the next ones of the classes that have enough left. Each round shuffles its classes and splits them into
    examples. Therefore no image occurs twice in an epoch, and no class twice in a sentence.
    """

    def __init__(self, index: FileIndex, settings: SentenceSettings):
        """Raises UserError naming the setting, if too few classes have `images_per_shot` images."""
        self._index, self._seed = index, settings.seed
        self._shots, self._rows_per_class = settings.n_shots, settings.images_per_shot
        self._sizes = index.sizes()
        rounds = self._sizes // self._rows_per_class  # of each class
        self._classes = np.argsort(-rounds, kind="stable")  # by descending number of rounds
        class_counts = np.searchsorted(-rounds[self._classes], -np.arange(rounds.max(initial=0)), side="left")
        self._class_counts = class_counts[class_counts >= self._shots]  # classes of each round
        self._round_ends = np.cumsum(self._class_counts // self._shots)  # examples up to the end of each round
        if not len(self._round_ends):
            count = int(np.sum(rounds > 0))
            raise UserError(
                f"n_shots={self._shots}: only {count} classes have images_per_shot={self._rows_per_class} images"
            )
        self.num_examples = int(self._round_ends[-1])

    def rows(self, epoch: int, example: int) -> list[Row]:
        """Returns the rows of `n_shots` classes."""
        round_number = int(np.searchsorted(self._round_ends, example, side="right"))
        round_start = int(self._round_ends[round_number - 1]) if round_number else 0
        first = (example - round_start) * self._shots
        rows = []
        for position in range(first, first + self._shots):
            class_shuffle = _shuffle(epoch, 0, round_number)
            item = int(
                self._classes[permuted(position, int(self._class_counts[round_number]), self._seed, class_shuffle)]
            )
            row_shuffle = _shuffle(epoch, 1, item)
            row_positions = range(round_number * self._rows_per_class, (round_number + 1) * self._rows_per_class)
            rows += [
                self._index.row(item, permuted(i, int(self._sizes[item]), self._seed, row_shuffle))
                for i in row_positions
            ]
        return rows


def _shuffle(epoch: int, purpose: int, number: int) -> int:
    """Returns a distinct number for every shuffle: of the classes of a round (purpose 0) or the rows of a class (1)."""
    return ((2 * epoch + purpose) << 40) + number
