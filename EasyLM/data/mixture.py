"""Rows of several sources in given proportions, without a copy: whose turn it is, is a function of the row number.

With weights n_0, n_1, ... (whole numbers, P in all), each block of P rows has n_i rows of source i. They are spread
evenly: the k-th of them lies in the k-th of n_i equal stretches of the block, at a random place of it (with a shuffle),
or in its middle. So every run of L rows, wherever it begins, has L n_i / P of them, give or take a few.
T: tokens a row.
"""

import functools
import math
from fractions import Fraction

import numpy as np

from EasyLM.data.token_rows import Throughput, TokenRows
from EasyLM.errors import UserError

LEAST_BLOCK = 512  # rows: computing an order costs more than a row
LARGEST_BLOCK = 1 << 16


def block_counts(name: str, weights: list[Fraction]) -> list[int]:
    """The rows of each source in a block: whole numbers in exactly these proportions.

    Raises:
      UserError: naming the flag, if no small block has them.
    """
    scale = math.lcm(*(weight.denominator for weight in weights))
    counts = [int(weight * scale) for weight in weights]
    counts = [count // math.gcd(*counts) for count in counts]
    if sum(counts) > LARGEST_BLOCK:
        text = ",".join(map(str, weights))
        raise UserError(f"--{name}={text}: their exact proportions need {sum(counts)} rows; give fewer digits")
    return [count * -(-LEAST_BLOCK // sum(counts)) for count in counts]


class MixedRows:
    """A row source (see `batches`) of row sources. Each goes through its own epochs, in its own order.

    Attributes:
      seq_length: T.
      fingerprint: as of `rows.TokenRows`.
    """

    def __init__(
        self, sources: list[TokenRows], counts: list[int], *, shuffle_seed: int = -1, token_count: int = 0, window: int
    ):
        """Mixes `sources`, all of the same T.

        Args:
          counts: rows of each in a block, as `block_counts` gives them.
          shuffle_seed, token_count, window: as of `rows.TokenRows`; a negative seed spreads the turns regularly.
        """
        self._sources, self._counts, self._seed, self._token_count = sources, counts, shuffle_seed, token_count
        self.seq_length = sources[0].seq_length
        self._throughput = Throughput(window * sources[0].batch_size)
        self._turns = functools.lru_cache(8)(self._block_turns)
        self.fingerprint = {
            "seq_length": self.seq_length,
            "shuffle_seed": max(shuffle_seed, -1),
            "weights": [count // math.gcd(*counts) for count in counts],
            # With their own seq_length: rows of another length never continue a mixture exactly.
            "sources": [source.fingerprint for source in sources],
        }

    def rows(self, start: int, count: int) -> dict[str, np.ndarray]:
        """As `TokenRows.rows`."""
        turns = self.turns(start, count)
        firsts = self.rows_before(start)
        rows: dict[str, np.ndarray] = {}
        for number, (source, first) in enumerate(zip(self._sources, firsts)):
            mine = turns == number
            if mine.any():
                for name, array in source.rows(first, int(mine.sum())).items():
                    rows.setdefault(name, np.empty((count, self.seq_length), array.dtype))[mine] = array
        return rows

    def turns(self, start: int, count: int) -> np.ndarray:
        """The number of the source of each of the rows start..start+count-1."""
        size = sum(self._counts)
        blocks = range(start // size, (start + count - 1) // size + 1)
        begin = start - blocks.start * size
        return np.concatenate([self._turns(block) for block in blocks])[begin : begin + count]

    def rows_before(self, row: int) -> list[int]:
        """How many rows each source has had before a row."""
        block, place = divmod(row, sum(self._counts))
        had = np.bincount(self._turns(block)[:place], minlength=len(self._counts)).tolist()
        return [block * count + here for count, here in zip(self._counts, had)]

    def metrics(self, rows_consumed: int) -> dict[str, float]:
        """As `TokenRows.metrics`; `dataset_epoch_{i}` counts how often source i has been gone through."""
        accumulated, average = self._throughput(rows_consumed)
        epochs = [
            rows * self.seq_length / source.num_tokens
            for rows, source in zip(self.rows_before(rows_consumed), self._sources)
        ]
        tokens = rows_consumed * self.seq_length
        return {
            "dataset_total_tokens": self._token_count + tokens,
            "dataset_epoch": tokens / sum(source.num_tokens for source in self._sources),
            **{f"dataset_epoch_{number}": epoch for number, epoch in enumerate(epochs)},
            "dataset_accumulated_tps": accumulated * self.seq_length,
            "dataset_average_tps": average * self.seq_length,
            "dataset_bytes_read": sum(source.bytes_read for source in self._sources),
            "dataset_skipped_lines": sum(source.skipped_lines for source in self._sources),
        }

    def _block_turns(self, block: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, block]) if self._seed >= 0 else None
        places = [(np.arange(n) + (0.5 if rng is None else rng.random(n))) / n for n in self._counts if n]
        numbers = np.repeat(np.arange(len(self._counts)), self._counts)
        return numbers[np.argsort(np.concatenate(places), kind="stable")]
