"""Mixtures: rows of several sources in given proportions, without a copy of the data.

A block of P rows has n_i rows of source i. The n_i are integers in the exact proportions of the weights; their sum is
P. The rows of a source are spread evenly: its k-th row lies in the k-th of n_i equal intervals of the block, at a
random position (with a shuffle) or in the middle. So L consecutive rows have L n_i / P rows of source i, within a few.
T: tokens in a row.
"""

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from EasyLM.data.token_rows import Throughput, TokenRows
from EasyLM.data.tokenizer_names import common_tokenizer
from EasyLM.errors import UserError

LEAST_BLOCK = 512  # rows; computing the order of a block takes longer than reading a row
LARGEST_BLOCK = 1 << 16


def parse_numbers(text: str, count: int, number_type: Callable[[str], Any] = float) -> list:
    """Returns the numbers of a comma list, one for each of `count` sources.

    Raises:
      UserError: if an element is not a number, there are not `count` elements, a number is negative, or all are 0.
    """
    try:
        numbers = [number_type(element) for element in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise UserError(f"not a comma list of {'whole ' if number_type is int else ''}numbers") from None
    if len(numbers) != count:
        raise UserError(f"{len(numbers)} numbers for {count} inputs (a glob is one input)")
    if not all(0 <= number < float("inf") for number in numbers) or not any(numbers):
        raise UserError("none may be negative, and not all may be 0")
    return numbers


def proportional(total: int, weights: Sequence[float]) -> list[int]:
    """Returns integers whose sum is `total`, each within 1 of its share by weight (largest remainder method)."""
    shares = [total * weight / sum(weights) for weight in weights]
    numbers = [int(share) for share in shares]
    by_remainder = sorted(range(len(weights)), key=lambda i: numbers[i] - shares[i])
    for i in by_remainder[: total - sum(numbers)]:
        numbers[i] += 1
    return numbers


def block_counts(weights: Sequence[Fraction]) -> list[int]:
    """Returns the rows of each source in a block: integers in exactly these proportions.

    Raises:
      UserError: if the block would be too large.
    """
    scale = math.lcm(*(weight.denominator for weight in weights))
    counts = _reduced([int(weight * scale) for weight in weights])
    if sum(counts) > LARGEST_BLOCK:
        raise UserError(f"their exact proportions need {sum(counts)} rows; give fewer digits")
    return [count * -(-LEAST_BLOCK // sum(counts)) for count in counts]


def _reduced(counts: Sequence[int]) -> list[int]:
    """Divides integers by their greatest common divisor."""
    divisor = math.gcd(*counts)
    return [count // divisor for count in counts]


class MixedRows:
    """A row source (`EasyLM.training.batches.RowSource`) over row sources.

    Each source has its own epochs and its own order.

    Attributes:
      seq_length: T.
      tokenizer: the image tokenizer that the records name, or None.
      fingerprint: JSON values that determine every row.
    """

    def __init__(
        self,
        sources: Sequence[TokenRows],
        counts: Sequence[int],
        *,
        shuffle_seed: int = -1,
        token_count: int = 0,
        window: int,
    ):
        """Mixes sources of the same T.

        Args:
          counts: rows of each source in a block, from `block_counts`.
          shuffle_seed: selects the orders of the blocks; negative for the same regular order in each block.
          token_count, window: see `token_rows.RowSettings`.

        Raises:
          UserError: if two sources name different tokenizers.
        """
        self._sources, self._counts, self._seed, self._token_count = sources, counts, shuffle_seed, token_count
        self.seq_length = sources[0].seq_length
        self.tokenizer = common_tokenizer(
            (source.tokenizer, f"source {number} of the mixture") for number, source in enumerate(sources, start=1)
        )
        self._throughput = Throughput(window * sources[0].batch_size)
        self._block = functools.lru_cache(8)(self._make_block)
        self.fingerprint: dict[str, Any] = {
            "seq_length": self.seq_length,
            "shuffle_seed": max(shuffle_seed, -1),
            "weights": _reduced(counts),
            # These include seq_length: a mixture with another seq_length never continues exactly.
            "sources": [source.fingerprint for source in sources],
        }

    def rows(self, start: int, count: int) -> dict[str, np.ndarray]:
        """Returns rows as `TokenRows.rows` does."""
        row_sources = self.sources_of(start, count)
        firsts = self.rows_before(start)
        rows: dict[str, np.ndarray] = {}
        for number, (source, first) in enumerate(zip(self._sources, firsts)):
            selected = row_sources == number
            if selected.any():
                for name, array in source.rows(first, int(selected.sum())).items():
                    rows.setdefault(name, np.empty((count, self.seq_length), array.dtype))[selected] = array
        return rows

    def sources_of(self, start: int, count: int) -> np.ndarray:
        """Returns the source number of each of the rows start..start+count-1, int64 [count]."""
        size = sum(self._counts)
        blocks = range(start // size, (start + count - 1) // size + 1)
        begin = start - blocks.start * size
        return np.concatenate([self._block(block) for block in blocks])[begin : begin + count]

    def rows_before(self, row: int) -> list[int]:
        """Returns how many rows of each source precede a row."""
        block, position = divmod(row, sum(self._counts))
        in_block = np.bincount(self._block(block)[:position], minlength=len(self._counts)).tolist()
        return [block * count + rows for count, rows in zip(self._counts, in_block)]

    def metrics(self, rows_consumed: int) -> dict[str, float]:
        """Returns metrics as `TokenRows.metrics` does; `dataset_epoch_{i}` is the epoch of source i."""
        since_start, recent = self._throughput(rows_consumed)
        epochs = [
            rows * self.seq_length / source.num_tokens
            for rows, source in zip(self.rows_before(rows_consumed), self._sources)
        ]
        tokens = rows_consumed * self.seq_length
        return {
            "dataset_total_tokens": self._token_count + tokens,
            "dataset_epoch": tokens / sum(source.num_tokens for source in self._sources),
            **{f"dataset_epoch_{number}": epoch for number, epoch in enumerate(epochs)},
            "dataset_accumulated_tps": since_start * self.seq_length,
            "dataset_average_tps": recent * self.seq_length,
            "dataset_bytes_read": sum(source.bytes_read for source in self._sources),
            "dataset_skipped_lines": sum(source.skipped_lines for source in self._sources),
        }

    def _make_block(self, block: int) -> np.ndarray:
        """Returns the source number of each row of a block, int64 [P]."""
        rng = np.random.default_rng([self._seed, block]) if self._seed >= 0 else None
        positions = [(np.arange(n) + (0.5 if rng is None else rng.random(n))) / n for n in self._counts if n]
        numbers = np.repeat(np.arange(len(self._counts)), self._counts)
        return numbers[np.argsort(np.concatenate(positions), kind="stable")]
