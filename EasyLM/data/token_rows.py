"""Rows of a stream of tokens. A row is a function of its number, so the pipeline's state is how many were consumed.

Row r is tokens [r*T, (r+1)*T) of the stream, its targets are one further; after the last token the stream begins again.
With a shuffle, an epoch is all ceil(N/T) rows in an order drawn from (seed, epoch). T: tokens a row; N: tokens in all.
"""

import collections
import time

import numpy as np

# Of the Feistel network; with a random round function 4 give a random permutation (Luby and Rackoff, 1988).
_ROUNDS = 6
_MASK64 = (1 << 64) - 1


class TokenRows:
    """A row source over a stream (`JsonLines`, `TokenStore`).

    Attributes:
      num_tokens: N.
      seq_length: T.
      batch_size: rows of a global batch, as the settings say; for `Batches`, not used here.
      rows_per_epoch: ceil(N/T). Without a shuffle a further epoch need not begin where a row does.
      skipped_lines: bad lines left out.
      fingerprint: JSON values. A run continues exactly only on the same fingerprint.
    """

    def __init__(
        self,
        stream,
        seq_length: int,
        batch_size: int,
        *,
        shuffle_seed: int = -1,
        first_id: int | None = None,
        dtype: str = "i4",
        first_token: int = 0,
        first_example: int = 0,
        token_count: int = 0,
        window: int = 200,
    ):
        """Rows of `stream`.

        Args:
          shuffle_seed: negative for the stream's own order.
          first_id: replaces the first input id of every row.
          dtype: item type of the ids in a row.
          first_token: where in the stream the first epoch begins.
          first_example, token_count: where the counters `dataset_example_index` and `dataset_total_tokens` begin.
          window: batches over which `dataset_average_tps` is taken.
        """
        self._stream = stream
        self.num_tokens, self.seq_length, self.batch_size = stream.num_tokens, seq_length, batch_size
        self.rows_per_epoch = -(-self.num_tokens // seq_length)
        self.skipped_lines = stream.bad_lines
        self._seed, self._first_id, self._dtype = shuffle_seed, first_id, np.dtype(dtype)
        self._first_token, self._first_example, self._token_count = first_token, first_example, token_count
        self._throughput = Throughput(window * batch_size)
        self._ones = np.ones((0, seq_length), np.float32)
        self.fingerprint = {
            "seq_length": seq_length,
            "shuffle_seed": max(shuffle_seed, -1),
            "first_token": first_token,
            **stream.identity(),
        }

    @property
    def bytes_read(self) -> int:
        """Bytes that `rows` has read so far, in this process."""
        return self._stream.bytes_read

    def rows(self, start: int, count: int) -> dict[str, np.ndarray]:
        """Rows start..start+count-1, read-only, each [count, T].

        `input_tokens` and `target_tokens` are ids; `loss_masks`, float32, are the loss weights of the targets.
        """
        if self._seed < 0:
            ids, masks = self._wrapped(self._first_token + start * self.seq_length, count * self.seq_length + 1)
            shape = (count, self.seq_length)
            inputs, targets = ids[:-1].reshape(shape), ids[1:].reshape(shape)
            masks = None if masks is None else masks[1:].reshape(shape)
        else:
            begins = [self._first_token + self.shuffled(row) * self.seq_length for row in range(start, start + count)]
            ids, masks = _joined(np.stack, [self._wrapped(begin, self.seq_length + 1) for begin in begins])
            inputs, targets = ids[:, :-1], ids[:, 1:]
            masks = None if masks is None else masks[:, 1:]
        if self._first_id is not None:
            inputs = inputs.copy()
            inputs[:, 0] = self._first_id
        rows = {
            "input_tokens": inputs.astype(self._dtype, copy=False),
            "target_tokens": targets.astype(self._dtype, copy=False),
            "loss_masks": self._all_ones(count) if masks is None else masks,
        }
        for array in rows.values():
            array.flags.writeable = False  # they share memory
        return rows

    def shuffled(self, row: int) -> int:
        """The number, in the stream's own order, of the row that comes at place `row` of the shuffled order."""
        epoch, place = divmod(row, self.rows_per_epoch)
        return permuted(place, self.rows_per_epoch, self._seed, epoch)

    def metrics(self, rows_consumed: int) -> dict[str, float]:
        """Where the data is after so many rows; tokens per second since the first call, and over the last batches."""
        tokens = rows_consumed * self.seq_length
        accumulated, average = self._throughput(rows_consumed)
        figures = {
            "dataset_total_tokens": self._token_count + tokens,
            "dataset_epoch": tokens / self.num_tokens,
            "dataset_accumulated_tps": accumulated * self.seq_length,
            "dataset_average_tps": average * self.seq_length,
            "dataset_bytes_read": self.bytes_read,
            "dataset_skipped_lines": self.skipped_lines,
        }
        return figures | ({"dataset_example_index": self._example(tokens)} if self._seed < 0 else {})

    def _example(self, tokens):
        """Number of the example after so many tokens: in the first pass from `first_example` on, then from 0."""
        example = self._stream.example_of((self._first_token + tokens) % self.num_tokens)
        if self._first_token + tokens < self.num_tokens:
            example += self._first_example - self._stream.example_of(self._first_token)
        return example

    def _wrapped(self, start, length):
        """`length` tokens from `start` on, through the stream's end as often as needed."""
        parts = []
        while length:
            start %= self.num_tokens
            stop = min(start + length, self.num_tokens)
            parts.append(self._stream.read(start, stop))
            start, length = stop, length - (stop - start)
        return parts[0] if len(parts) == 1 else _joined(np.concatenate, parts)

    def _all_ones(self, count):
        """Kept between calls: making them anew takes as long as decoding the ids."""
        if len(self._ones) < count:
            self._ones = np.ones((count, self.seq_length), np.float32)
        return self._ones[:count]


def _joined(join, parts):
    ids, masks = zip(*parts, strict=True)
    return join(ids), None if masks[0] is None else join(masks)


class Throughput:
    """rows consumed so far -> rows per second: since the first call, and over the last `window` rows."""

    def __init__(self, window: int):
        self._window, self._first, self._recent = window, None, collections.deque()

    def __call__(self, rows: int) -> tuple[float, float]:
        now = (rows, time.monotonic())
        self._first = self._first or now
        self._recent.append(now)
        while len(self._recent) > 2 and rows - self._recent[1][0] >= self._window:
            self._recent.popleft()
        return _rate(self._first, now), _rate(self._recent[0], now)


def _rate(begin, end):
    return (end[0] - begin[0]) / (end[1] - begin[1]) if end[1] > begin[1] else 0.0


def permuted(place: int, count: int, seed: int, epoch: int) -> int:
    """Place -> number, a permutation of 0..count-1 for each (seed, epoch), with no memory of its size.

    A Feistel network permutes the next larger range of 4^k numbers; a number outside 0..count-1 is permuted again until
    it falls inside ("cycle walking", Black and Rogaway, 2002). No cryptography, but it passes for uniform.
    """
    half = max(3, (count - 1).bit_length() + 1 >> 1)  # bits; 3, as tiny networks reach few permutations
    low = (1 << half) - 1
    key = _mixed(_mixed(seed) + epoch)
    number = place
    while True:
        left, right = number >> half, number & low
        for i in range(_ROUNDS):
            left, right = right, left ^ (_mixed(key + (i << half) + right) & low)
        number = left << half | right
        if number < count:
            return number


def _mixed(value: int) -> int:
    """Spreads every bit of a number over 64 (SplitMix64: Steele, Lea, Flood, 2014)."""
    value = value * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15 & _MASK64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK64
    return value ^ value >> 31
