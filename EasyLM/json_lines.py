"""JSONL files, one after another, as one stream of tokens of which any range can be read, at the cost of that range."""

import bisect
import functools
import os
import resource
from itertools import chain

import fsspec
import numpy as np
import pybase64

from EasyLM import files
from EasyLM.errors import UserError
from EasyLM.fields import RecordProcessor
from EasyLM.line_index import line_index
from EasyLM.records import parse_line, token_type

# Read at once, unless a line is longer. Below 128 KiB, where malloc begins to map each buffer anew, whose page faults
# cost more than the decoding.
WINDOW_BYTES = 96 << 10
PARSED_LINES = 8  # kept, of those that cannot be cut out of the raw line


class JsonLines:
    """Tokens of JSONL files in order; also how the other source of tokens (`token_store.TokenStore`) behaves.

    Attributes:
      num_tokens: of all files.
      num_examples: lines that are records.
      bad_lines: lines left out.
      bytes_read: so far, by `read`.
    """

    def __init__(self, paths: list[str], processor: RecordProcessor, processes: int = 1, skip_bad_lines: bool = False):
        """Indexes the files, or opens their indexes (see `line_index` for `processes` and errors)."""
        _allow_open_files(2 * len(paths))  # a file and its index
        self._files = [_File(path, line_index(path, processor, processes, skip_bad_lines), processor) for path in paths]
        self._first_tokens = np.cumsum([0] + [file.num_tokens for file in self._files]).tolist()
        self._first_examples = np.cumsum([0] + [file.num_examples for file in self._files]).tolist()
        self._processor = processor
        self._all_in_loss = processor.all_in_loss
        self.num_tokens = self._first_tokens[-1]
        self.num_examples = self._first_examples[-1]
        self.bad_lines = sum(file.index.facts["bad_lines"] for file in self._files)

    @property
    def bytes_read(self) -> int:
        return sum(file.bytes_read for file in self._files)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(ids int32 [n], loss weights float32 [n] or, where all are 1, None) of the stream's tokens [start, stop)."""
        assert 0 <= start <= stop <= self.num_tokens
        ids = np.empty(stop - start, np.int32)
        masks = None if self._all_in_loss else np.empty(stop - start, np.float32)
        number, at = self._file_of(start), start
        while at < stop:
            first, end = self._first_tokens[number], min(stop, self._first_tokens[number + 1])
            share = slice(at - start, end - start)
            self._files[number].read(at - first, end - first, ids[share], masks if masks is None else masks[share])
            number, at = number + 1, end
        return ids, masks

    def example_of(self, token: int) -> int:
        """The number of the example that a token of the stream belongs to."""
        number = self._file_of(token)
        return self._first_examples[number] + self._files[number].line_of(token - self._first_tokens[number])

    def token_at(self, offset: int) -> int:
        """The first token of the line that begins at a byte offset of the first file.

        Raises:
          UserError: if no line begins there.
        """
        return self._files[0].token_at(offset)

    def identity(self) -> dict:
        """What the stream is made of, as JSON values: equal for equal streams, wherever the files lie."""
        return {
            "files": [{name: file.index.facts[name] for name in ("size", "content", "tokens")} for file in self._files],
            "processing": self._processor.identity(),
        }

    def _file_of(self, token):
        return bisect.bisect_right(self._first_tokens, token) - 1


class _File:
    """One file and its index.

    Numbers below: a line of n tokens has a head of literals, a body of base64 ids, and a tail of literals. Three ids of
    s bytes are 4s characters of base64, so any range of ids can be decoded without what stands before it.
    """

    def __init__(self, path: str, index, processor: RecordProcessor):
        self.index, self._path, self._processor = index, path, processor
        self.num_tokens, self.num_examples = index.facts["tokens"], len(index.arrays["ends"])
        self.bytes_read = 0
        self._positions, self._ends = index.arrays["positions"], index.arrays["ends"]
        self._read_bytes = _byte_reader(path)
        self._parsed = functools.lru_cache(PARSED_LINES)(self._parse)
        self._item = token_type(processor.dtype)
        body = processor.slice_part
        self._head, self._tail, self._body_mask = (), (), 1.0
        if body is not None:
            self._head, self._tail = processor.parts[:body], processor.parts[body + 1 :]
            self._body_mask = processor.parts[body].mask

    def line_of(self, token: int) -> int:
        return int(np.searchsorted(self._ends, token, side="right"))

    def read(self, start: int, stop: int, ids: np.ndarray, masks: np.ndarray | None) -> None:
        """Fills ids and masks (None where all weights are 1) with this file's tokens [start, stop)."""
        first, last = self.line_of(start), self.line_of(stop - 1)
        positions, ends = self._positions[first : last + 1].tolist(), self._ends[first : last + 1].tolist()
        begins = [int(self._ends[first - 1]) if first else 0, *ends[:-1]]
        try:
            self._decode(self._pieces(start, stop, positions, begins, ends), ids)
            for line, (position, begin, end) in enumerate(zip(positions, begins, ends, strict=True), start=first):
                low, high = max(start, begin), min(stop, end)
                if position < 0:
                    line_ids, line_masks = self._parsed(line)
                    ids[low - start : high - start] = line_ids[low - begin : high - begin]
                    if masks is not None:
                        masks[low - start : high - start] = line_masks[low - begin : high - begin]
                    continue
                if masks is not None:
                    masks[low - start : high - start] = self._body_mask
                for token, part in self._literals(begin, end):
                    if start <= token < stop:
                        ids[token - start] = part.literal
                        if masks is not None:
                            masks[token - start] = part.mask
        except ValueError as error:
            raise UserError(f"{self._path}: changed since it was indexed, at token {start} ({error})") from None

    def token_at(self, offset: int) -> int:
        """The first token of the line that begins at a byte offset; UserError if none does."""
        files.check_line_begins(self._path, offset)
        line = bisect.bisect_left(self._positions, offset, key=lambda position: max(position, -1 - position))
        return int(self._ends[line - 1]) if line else 0

    def _pieces(self, start, stop, positions, begins, ends):
        """(first byte, last byte, ids to skip of those decoded, ids to take, where to) of each body that can be cut."""
        quad, size, head, tail = 4 * self._item.itemsize, self._item.itemsize, len(self._head), len(self._tail)
        pieces = []
        for position, begin, end in zip(positions, begins, ends, strict=True):
            body = end - tail - (begin := begin + head)
            low, high = max(start - begin, 0), min(stop - begin, body)
            if position >= 0 and low < high:
                last = min((high + 2) // 3 * quad, (body * size + 2) // 3 * 4)
                pieces.append((position + low // 3 * quad, position + last, low % 3, high - low, begin + low - start))
        return pieces

    def _literals(self, begin, end):
        """(token, part) of each literal of a line."""
        return chain(enumerate(self._head, start=begin), enumerate(self._tail, start=end - len(self._tail)))

    def _decode(self, pieces, ids):
        """Reads the bytes of the pieces, several at a time, and decodes them into ids."""
        done = 0
        while done < len(pieces):
            origin = pieces[done][0]
            many = max(bisect.bisect_right(pieces, origin + WINDOW_BYTES, key=lambda piece: piece[1]), done + 1)
            data = memoryview(self._fetch(origin, pieces[many - 1][1]))
            for begin, end, skip, count, at in pieces[done:many]:
                raw = pybase64.b64decode(data[begin - origin : end - origin], validate=True)
                ids[at : at + count] = np.frombuffer(raw, self._item)[skip : skip + count]
            done = many

    def _parse(self, line):
        begin = -1 - int(self._positions[line])
        following = int(self._positions[line + 1]) if line + 1 < self.num_examples else self.index.facts["size"]
        data = self._fetch(begin, max(following, -1 - following))
        return self._processor(parse_line(data.partition(b"\n")[0]))

    def _fetch(self, begin, end):
        self.bytes_read += end - begin
        return self._read_bytes(begin, end)


def _byte_reader(path: str):
    """(begin, end) -> bytes of a file."""
    if files.is_remote(path):
        system, inner = fsspec.url_to_fs(path)
        return functools.partial(system.cat_file, inner)
    file = files.open_binary(path)
    return lambda begin, end: os.pread(file.fileno(), end - begin, begin)


def _allow_open_files(count: int) -> None:
    """Raises this process's limit of open files where a data set of many files needs it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256  # for all else that a run opens
    if soft != resource.RLIM_INFINITY and wanted > soft:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
