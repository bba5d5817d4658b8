"""A JSONL file with its line index, as a token file. Reading a range of tokens reads only the bytes of that range."""

import bisect
import functools
from typing import Any

import numpy as np
import pybase64

from EasyLM.data.record_fields import RecordProcessor
from EasyLM.data.records import parse_line, token_type
from EasyLM.data.tokenizer_names import tokenizer_of
from EasyLM.storage import Columns, byte_reader, check_line_start

# Bytes of one read, unless a line is longer. For 128 KiB or more, malloc maps a new buffer each time, and the page
# faults take longer than the decoding.
WINDOW_BYTES = 96 << 10
PARSED_LINES = 8  # size of the cache of parsed lines


class JsonlFile:
    """A `protocols.TokenFile`.

    The ids of most lines are decoded from a slice of the raw line. Three ids of s bytes are 4s characters of base64, so
    decoding starts at any multiple of three ids. The other lines are parsed as a whole.
    """

    def __init__(self, path: str, index: Columns, processor: RecordProcessor):
        """Opens the file.

        Args:
          index: from `line_index.line_index`, with the same processor.
        """
        self.path, self._processor, self._metadata = path, processor, index.metadata
        self._positions, self._ends = index.arrays["positions"], index.arrays["ends"]
        self._check_size = index.check_size
        self.num_tokens, self.num_lines = index.metadata["tokens"], len(self._ends)
        self.bad_lines, self.bytes_read = index.metadata["bad_lines"], 0
        self.tokenizer = tokenizer_of(index.metadata)
        self._layout = processor.layout
        self._item = token_type(processor.dtype)
        self._read_bytes = byte_reader(path)
        self._parse = functools.lru_cache(PARSED_LINES)(self._parse_line)

    def fingerprint(self) -> list[dict[str, Any]]:
        """See `TokenFile`."""
        return [{name: self._metadata[name] for name in ("size", "content", "tokens")}]

    def token_at(self, offset: int) -> int:
        """See `TokenFile`."""
        check_line_start(self.path, offset)
        line = bisect.bisect_left(self._positions, offset, key=lambda position: max(position, -1 - position))
        return int(self._ends[line - 1]) if line else 0

    def line_of(self, token: int) -> int:
        """See `TokenFile`."""
        self._check_size()
        return int(np.searchsorted(self._ends, token, side="right"))

    def line_bounds(self, first: int, last: int) -> np.ndarray:
        """See `TokenFile`."""
        return self._ends[first - 1 : last + 1] if first else np.concatenate([[0], self._ends[: last + 1]])

    def masks(self, line: int) -> np.ndarray:
        """See `TokenFile`."""
        return self._parse(line)[1]

    def read_ids(self, first: int, counts: list[int], start: int, ids: np.ndarray) -> None:
        """See `TokenFile`."""
        positions = self._positions[first : first + len(counts)].tolist()
        if min(positions) >= 0:
            self._decode(positions, counts, start, ids)
            return
        done, head = 0, len(self._layout.head)
        for line, (position, count) in enumerate(zip(positions, counts), start=first):
            part = ids[done : done + count - start]
            if position >= 0:
                self._decode([position], [count], start, part)
            else:
                part[:] = self._parse(line)[0][head + start : head + start + len(part)]
            done, start = done + len(part), 0

    def _decode(self, positions: list[int], counts: list[int], start: int, ids: np.ndarray) -> None:
        """Fills `ids` from sliceable lines. Reads only the bytes of those ids, several lines at a time."""
        size = self._item.itemsize
        # The byte range of each line's base64 text.
        spans = [(position, position + _base64_length(count * size)) for position, count in zip(positions, counts)]
        end = counts[-1] - (sum(counts) - start - len(ids))  # ids of the last line up to the end of the range
        spans[-1] = (positions[-1], min(spans[-1][1], positions[-1] + _groups_of_three(end) * 4 * size))
        spans[0] = (spans[0][0] + start // 3 * 4 * size, spans[0][1])
        skip, line, done = start % 3, 0, 0
        while line < len(spans):
            origin = spans[line][0]
            limit = bisect.bisect_right(spans, origin + WINDOW_BYTES, lo=line, key=lambda span: span[1])
            stop = max(limit, line + 1)
            data = memoryview(self._fetch(origin, spans[stop - 1][1]))
            raw = [pybase64.b64decode(data[low - origin : high - origin], None, True) for low, high in spans[line:stop]]
            decoded = np.frombuffer(b"".join(raw), self._item)[skip : skip + len(ids) - done]
            ids[done : done + len(decoded)] = decoded
            skip, line, done = 0, stop, done + len(decoded)
        if done < len(ids):
            raise ValueError(f"{len(ids) - done} ids are missing")

    def _parse_line(self, line: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids and loss weights of a line that the index marks as not sliceable."""
        begin = -1 - int(self._positions[line])
        following = int(self._positions[line + 1]) if line + 1 < self.num_lines else self._metadata["size"]
        data = self._fetch(begin, max(following, -1 - following))
        return self._processor(parse_line(data.partition(b"\n")[0]))

    def _fetch(self, begin: int, end: int) -> bytes:
        self.bytes_read += end - begin
        return self._read_bytes(begin, end)


def _groups_of_three(count: int) -> int:
    return (count + 2) // 3


def _base64_length(num_bytes: int) -> int:
    return _groups_of_three(num_bytes) * 4
