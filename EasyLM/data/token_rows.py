"""Rows of a token stream. A row is a function of its number: the state of the pipeline is the number of rows consumed.

Row r is tokens [r*T, (r+1)*T) of the stream; its targets are the tokens one position later. The stream repeats after
its last token. With a shuffle, an epoch is all ceil(N/T) rows, in an order that (seed, epoch) selects.
T: tokens in a row. N: tokens in the stream.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from EasyLM.data.permutation import shuffled_number
from EasyLM.data.protocols import TokenStream


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """How a token stream is cut into rows.

    Attributes:
      seq_length: T.
      batch_size: rows in a global batch, for the throughput metrics.
      shuffle_seed: selects the orders of the epochs; negative for the order of the stream.
      first_id: replaces the first input id of every row; None keeps it.
      document_mask: whether rows have `segment_ids`, so that a token attends to its own sentence only.
      dtype: item type of the ids in a row.
      first_example: start of the counter `dataset_example_index`.
      token_count: start of the counter `dataset_total_tokens`.
      window: batches over which `dataset_average_tps` is averaged.
    """

    seq_length: int
    batch_size: int
    shuffle_seed: int = -1
    first_id: int | None = None
    document_mask: bool = False
    dtype: str = "i4"
    first_example: int = 0
    token_count: int = 0
    window: int = 200


class TokenRows:
    """A row source (`EasyLM.training.batches.RowSource`) over a token stream.

    Attributes:
      num_tokens: N.
      seq_length: T.
      batch_size: as in the settings; not used by `rows`.
      rows_per_epoch: ceil(N/T). Without a shuffle, later epochs do not always start at the start of a row.
      skipped_lines: bad lines that the stream skips.
      tokenizer: the image tokenizer that the records name, or None.
      fingerprint: JSON values that determine every row.
    """

    def __init__(self, stream: TokenStream, settings: RowSettings, first_token: int = 0):
        """Cuts a stream into rows.

        Args:
          first_token: the token of the stream at which row 0 starts.
        """
        self._stream, self._settings, self._first_token = stream, settings, first_token
        self.num_tokens, self.seq_length, self.batch_size = stream.num_tokens, settings.seq_length, settings.batch_size
        self.rows_per_epoch = -(-self.num_tokens // self.seq_length)
        self.skipped_lines, self.tokenizer = stream.bad_lines, stream.tokenizer
        self._throughput = Throughput(settings.window * settings.batch_size)
        self._ones = np.ones((0, self.seq_length), np.float32)
        self.fingerprint: dict[str, Any] = {
            "seq_length": settings.seq_length,
            "shuffle_seed": max(settings.shuffle_seed, -1),
            "first_token": first_token,
            **({"document_mask": True} if settings.document_mask else {}),  # absent in older states
            **stream.fingerprint(),
        }

    @property
    def bytes_read(self) -> int:
        """Bytes that `rows` has read so far in this process."""
        return self._stream.bytes_read

    def rows(self, start: int, count: int) -> dict[str, np.ndarray]:
        """Returns rows start..start+count-1, read-only arrays [count, T].

        `input_tokens` and `target_tokens` are ids; `loss_masks`, float32, are the loss weights of the targets. With
        `document_mask`, `segment_ids`, int32, number the sentences of a row from 0, or the parts of sentences. The loss
        weight is then 0 for a target in another sentence than its input.
        """
        if self._settings.shuffle_seed < 0:
            ranges = [(self._first_token + start * self.seq_length, count * self.seq_length + 1)]
        else:
            begins = [self._first_token + self.shuffled(row) * self.seq_length for row in range(start, start + count)]
            ranges = [(begin, self.seq_length + 1) for begin in begins]
        ids, masks = _join(_stack, [self._wrapped(*part) for part in ranges])
        inputs, targets = self._inputs_and_targets(ids)
        if self._settings.first_id is not None:
            inputs = inputs.copy()
            inputs[:, 0] = self._settings.first_id
        rows = {
            "input_tokens": inputs.astype(self._settings.dtype, copy=False),
            "target_tokens": targets.astype(self._settings.dtype, copy=False),
            "loss_masks": self._all_ones(count) if masks is None else self._inputs_and_targets(masks)[1],
        }
        if self._settings.document_mask:
            starts = _stack([self._sentence_starts(*part) for part in ranges])
            input_starts, target_starts = self._inputs_and_targets(starts)
            sentences = np.cumsum(input_starts, axis=1, dtype=np.int32)
            rows["segment_ids"] = sentences - sentences[:, :1]
            rows["loss_masks"] = rows["loss_masks"] * ~target_starts
        for array in rows.values():
            array.flags.writeable = False  # the arrays share memory
        return rows

    def _inputs_and_targets(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the values of inputs and of targets, [count, T] each.

        Args:
          tokens: the values of consecutive rows, [1, count * T + 1], or of each row, [count, T + 1].
        """
        return tokens[:, :-1].reshape(-1, self.seq_length), tokens[:, 1:].reshape(-1, self.seq_length)

    def shuffled(self, row: int) -> int:
        """Returns the row of the stream that is at position `row` of the shuffled order."""
        return shuffled_number(row, self.rows_per_epoch, self._settings.shuffle_seed)

    def metrics(self, rows_consumed: int) -> dict[str, float]:
        """Returns the position in the data, and tokens per second since the first call and over the last batches."""
        tokens = rows_consumed * self.seq_length
        since_start, recent = self._throughput(rows_consumed)
        metrics = {
            "dataset_total_tokens": self._settings.token_count + tokens,
            "dataset_epoch": tokens / self.num_tokens,
            "dataset_accumulated_tps": since_start * self.seq_length,
            "dataset_average_tps": recent * self.seq_length,
            "dataset_bytes_read": self.bytes_read,
            "dataset_skipped_lines": self.skipped_lines,
        }
        if self._settings.shuffle_seed < 0:
            metrics["dataset_example_index"] = self._example(tokens)
        return metrics

    def _example(self, tokens: int) -> int:
        """Returns the number of the next example after `tokens` tokens.

        Numbers start at `first_example` in the first epoch, and at 0 in later epochs.
        """
        example = self._stream.example_of((self._first_token + tokens) % self.num_tokens)
        if self._first_token + tokens < self.num_tokens:
            example += self._settings.first_example - self._stream.example_of(self._first_token)
        return example

    def _wrapped(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Reads `length` tokens from `start` on, wrapping around at the end of the stream."""
        parts = [self._stream.read(begin, end) for begin, end in self._ranges(start, length)]
        return parts[0] if len(parts) == 1 else _join(np.concatenate, parts)

    def _sentence_starts(self, start: int, length: int) -> np.ndarray:
        """Returns whether each of `length` tokens from `start` on is the first of a sentence, as bool [length]."""
        parts = []
        for begin, end in self._ranges(start, length):
            is_start = np.zeros(end - begin, bool)
            is_start[self._stream.example_starts(begin, end) - begin] = True
            parts.append(is_start)
        return np.concatenate(parts)

    def _ranges(self, start: int, length: int) -> Iterator[tuple[int, int]]:
        """Yields the ranges (begin, end) of the stream that hold `length` tokens from `start` on."""
        while length:
            start %= self.num_tokens
            stop = min(start + length, self.num_tokens)
            yield start, stop
            start, length = stop, length - (stop - start)

    def _all_ones(self, count: int) -> np.ndarray:
        """Returns cached loss weights of 1: allocating them takes as long as decoding the ids."""
        if len(self._ones) < count:
            self._ones = np.ones((count, self.seq_length), np.float32)
        return self._ones[:count]


def no_rows(seq_length: int, dtype: str = RowSettings.dtype, document_mask: bool = False) -> dict[str, np.ndarray]:
    """Returns arrays [0, T] with the names and types of those of `TokenRows.rows`, without data."""
    ids = np.zeros((0, seq_length), dtype)
    rows = {"input_tokens": ids, "target_tokens": ids, "loss_masks": np.zeros((0, seq_length), np.float32)}
    return rows | ({"segment_ids": np.zeros((0, seq_length), np.int32)} if document_mask else {})


def _stack(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Stacks arrays along a new leading axis. A single array is not copied."""
    return parts[0][None] if len(parts) == 1 else np.stack(parts)


def _join(
    join: Callable[..., np.ndarray], parts: Sequence[tuple[np.ndarray, np.ndarray | None]]
) -> tuple[np.ndarray, np.ndarray | None]:
    ids, masks = zip(*parts, strict=True)
    return join(ids), None if masks[0] is None else join(masks)


class Throughput:
    """Rows per second: since the first call, and over the last `window` rows."""

    def __init__(self, window: int):
        self._window = window
        self._first: tuple[int, float] | None = None
        self._recent: collections.deque[tuple[int, float]] = collections.deque()

    def __call__(self, rows: int) -> tuple[float, float]:
        """Returns both rates when `rows` rows have been consumed."""
        now = (rows, time.monotonic())
        self._first = self._first or now
        self._recent.append(now)
        while len(self._recent) > 2 and rows - self._recent[1][0] >= self._window:
            self._recent.popleft()
        return _rate(self._first, now), _rate(self._recent[0], now)


def _rate(begin: tuple[int, float], end: tuple[int, float]) -> float:
    return (end[0] - begin[0]) / (end[1] - begin[1]) if end[1] > begin[1] else 0.0
