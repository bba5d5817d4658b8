"""JSONL and packed files, one after another, as one stream of tokens: any range is read at the cost of that range."""

import bisect
import functools
import os
import resource

import fsspec
import numpy as np
import pybase64

from EasyLM.data import packed_file
from EasyLM.data.line_index import line_index
from EasyLM.data.record_fields import RecordProcessor
from EasyLM.data.records import parse_line, token_type
from EasyLM.data.token_file import LineFile
from EasyLM.storage import check_line_start, is_remote, open_binary

# Read at once, unless a line is longer. Below 128 KiB, where malloc begins to map each buffer anew, whose page faults
# cost more than the decoding.
WINDOW_BYTES = 96 << 10
PARSED_LINES = 8  # kept, of those that cannot be cut out of the raw line


class JsonLines:
    """Tokens of files in order; also how the other source of tokens (`token_store.TokenStore`) behaves.

    Attributes:
      num_tokens: of all files.
      num_examples: lines that are records.
      bad_lines: lines left out.
      bytes_read: so far, by `read`.
    """

    def __init__(self, paths: list[str], processor: RecordProcessor, processes: int = 1, skip_bad_lines: bool = False):
        """Indexes the files, or opens their indexes (see `line_index` for `processes` and errors)."""
        _allow_open_files(2 * len(paths))  # a file and its index
        self._files = [_open(path, processor, processes, skip_bad_lines) for path in paths]
        self._first_tokens = np.cumsum([0] + [file.num_tokens for file in self._files]).tolist()
        self._first_examples = np.cumsum([0] + [file.num_examples for file in self._files]).tolist()
        self._processor = processor
        self._all_in_loss = processor.all_in_loss
        self.num_tokens = self._first_tokens[-1]
        self.num_examples = self._first_examples[-1]
        self.bad_lines = sum(file.bad_lines for file in self._files)

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
            "files": [part for file in self._files for part in file.identity()],
            "processing": self._processor.identity(),
        }

    def _file_of(self, token):
        return bisect.bisect_right(self._first_tokens, token) - 1


class JsonFile(LineFile):
    """One JSONL file and its index.

    Three ids of s bytes are 4s characters of base64, so any range of ids can be decoded without what stands before it.
    """

    def __init__(self, path: str, index, processor: RecordProcessor):
        super().__init__(path, processor)
        self._facts = index.metadata
        self.num_tokens, self.num_examples = index.metadata["tokens"], len(index.arrays["ends"])
        self.bad_lines = index.metadata["bad_lines"]
        self._positions, self._all_ends = index.arrays["positions"], index.arrays["ends"]
        self._read_bytes = _byte_reader(path)
        self._parsed = functools.lru_cache(PARSED_LINES)(self._parse)
        self._item = token_type(processor.dtype)

    def identity(self) -> list[dict]:
        """As of `LineFile`."""
        return [{name: self._facts[name] for name in ("size", "content", "tokens")}]

    def token_at(self, offset: int) -> int:
        """As of `LineFile`."""
        check_line_start(self.path, offset)
        line = bisect.bisect_left(self._positions, offset, key=lambda position: max(position, -1 - position))
        return int(self._all_ends[line - 1]) if line else 0

    def line_of(self, token: int) -> int:
        """As of `LineFile`."""
        return int(np.searchsorted(self._all_ends, token, side="right"))

    def _ends(self, first, last):
        return self._all_ends[first : last + 1]

    def _cut(self, first, last):
        return self._positions[first : last + 1] >= 0

    def _copy_bodies(self, first, counts, skip, ids):
        """Only the bytes of those ids are read, of several lines at a time."""
        positions = self._positions[first : first + len(counts)].tolist()
        size = self._item.itemsize
        spans = [(position, position + (count * size + 2) // 3 * 4) for position, count in zip(positions, counts)]
        used = counts[-1] - (sum(counts) - skip - len(ids))  # of the last body
        spans[-1] = (spans[-1][0], min(spans[-1][1], positions[-1] + (used + 2) // 3 * 4 * size))
        spans[0] = (spans[0][0] + skip // 3 * 4 * size, spans[0][1])
        skip, line, done = skip % 3, 0, 0
        while line < len(spans):
            origin = spans[line][0]
            end = max(bisect.bisect_right(spans, origin + WINDOW_BYTES, lo=line, key=lambda span: span[1]), line + 1)
            data = memoryview(self._fetch(origin, spans[end - 1][1]))
            raw = [pybase64.b64decode(data[low - origin : high - origin], None, True) for low, high in spans[line:end]]
            decoded = np.frombuffer(b"".join(raw), self._item)[skip : skip + len(ids) - done]
            ids[done : done + len(decoded)] = decoded
            skip, line, done = 0, end, done + len(decoded)
        if done < len(ids):
            raise ValueError(f"{len(ids) - done} ids are missing")

    def _parse(self, line):
        begin = -1 - int(self._positions[line])
        following = int(self._positions[line + 1]) if line + 1 < self.num_examples else self._facts["size"]
        data = self._fetch(begin, max(following, -1 - following))
        return self._processor(parse_line(data.partition(b"\n")[0]))

    def _fetch(self, begin, end):
        self.bytes_read += end - begin
        return self._read_bytes(begin, end)


def _open(path: str, processor: RecordProcessor, processes: int, skip_bad_lines: bool) -> LineFile:
    if packed_file.is_packed(path):
        return packed_file.PackedFile(path, processor)
    return JsonFile(path, line_index(path, processor, processes, skip_bad_lines), processor)


def _byte_reader(path: str):
    """(begin, end) -> bytes of a file."""
    if is_remote(path):
        system, inner = fsspec.url_to_fs(path)
        return functools.partial(system.cat_file, inner)
    file = open_binary(path)
    return lambda begin, end: os.pread(file.fileno(), end - begin, begin)


def _allow_open_files(count: int) -> None:
    """Raises this process's limit of open files where a data set of many files needs it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256  # for all else that a run opens
    if soft != resource.RLIM_INFINITY and wanted > soft:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
