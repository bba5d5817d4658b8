"""Which rows of the inputs make an example, the unit that a build goes through, splits into shards and resumes at.

Every group has `examples`, how many an epoch has, and `rows(epoch, example)`; which rows these are follows from the
seed and the two numbers alone. No memory grows with the inputs, but for sixteen bytes a class.
"""

import numpy as np

from EasyLM.data import permuted
from EasyLM.errors import UserError
from tokenizer.builders.arrangements import Row


class Single:
    """Each item by itself, in order."""

    def __init__(self, inputs, settings):
        self._inputs, self.examples = inputs, len(inputs)

    def rows(self, epoch: int, example: int) -> list[Row]:
        return self._inputs.rows(example)


class Shots:
    """`n_shots` items of one row: each epoch shuffles all and cuts them; those left over are others each time.

    Raises:
      UserError: if there are too few.
    """

    def __init__(self, inputs, settings):
        self._inputs, self._shots, self._seed = inputs, settings.n_shots, settings.seed
        self.examples = len(inputs) // settings.n_shots
        if not self.examples:
            raise UserError(f"--n_shots={settings.n_shots}: only {len(inputs)} are there")

    def rows(self, epoch: int, example: int) -> list[Row]:
        places = range(example * self._shots, (example + 1) * self._shots)
        numbers = (permuted(place, len(self._inputs), self._seed, epoch) for place in places)
        return [row for number in numbers for row in self._inputs.rows(number)]


class Classes:
    """`images_per_shot` rows of each of `n_shots` items (classes), one class behind the other.

    An epoch shuffles the rows of each class. Its first round takes the first `images_per_shot` of every class, the next
    round the next ones of the classes that have so many left; in each round the classes are shuffled and cut into
    sentences. So no picture comes twice in an epoch, nor a class twice in a sentence.

    Raises:
      UserError: if there are too few classes of that size.
    """

    def __init__(self, inputs, settings):
        self._inputs, self._seed = inputs, settings.seed
        self._shots, self._each = settings.n_shots, settings.images_per_shot
        self._sizes = inputs.sizes  # each time, they are read from the disk
        rounds_of = self._sizes // self._each
        self._classes = np.argsort(-rounds_of, kind="stable")  # those of most rounds first: round r has the first few
        in_round = np.searchsorted(-rounds_of[self._classes], -np.arange(rounds_of.max(initial=0)), side="left")
        self._in_round = in_round[in_round >= self._shots]
        self._ends = np.cumsum(self._in_round // self._shots)
        if not len(self._ends):
            count = int(np.sum(rounds_of > 0))
            raise UserError(
                f"--n_shots={self._shots}: only {count} classes have --images_per_shot={self._each} pictures"
            )
        self.examples = int(self._ends[-1])

    def rows(self, epoch: int, example: int) -> list[Row]:
        turn = int(np.searchsorted(self._ends, example, side="right"))
        first = (example - int(self._ends[turn - 1] if turn else 0)) * self._shots
        found = []
        for place in range(first, first + self._shots):
            number = permuted(place, int(self._in_round[turn]), self._seed, _shuffle_id(epoch, 0, turn))
            number = int(self._classes[number])
            size = int(self._sizes[number])
            shuffle = _shuffle_id(epoch, 1, number)
            places = range(turn * self._each, (turn + 1) * self._each)
            found += [self._inputs.row(number, permuted(i, size, self._seed, shuffle)) for i in places]
        return found


def _shuffle_id(epoch: int, kind: int, number: int) -> int:
    """A distinct number for every shuffle of an epoch: of the classes in a round (kind 0), of a class (kind 1)."""
    return ((2 * epoch + kind) << 40) + number
