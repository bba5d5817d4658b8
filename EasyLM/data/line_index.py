"""An index of the lines of a JSONL file: where each line's tokens are, and how many. Building it checks every line.

The file is read once, in byte ranges, by one process or several. Nothing here imports JAX: the processes start fast.
"""

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Iterator

import numpy as np
import pybase64
from tqdm import tqdm

from EasyLM.data.record_fields import RecordProcessor
from EasyLM.data.records import RecordError, check_ids, parse_line, token_type
from EasyLM.errors import UserError
from EasyLM.process_pool import Workers
from EasyLM.storage import cached_columns, content_digest, file_version, open_binary

RANGE_BYTES = 64 << 20  # one piece of work
BLOCK_BYTES = 1 << 20  # one read: fits a cache
REASON_CHARACTERS = 500
STAND_IN = b"?ids?"  # not base64


@dataclasses.dataclass
class Scan:
    """What a byte range holds, of the lines that begin in it.

    `positions[i]` is where line i's base64 text begins, if its ids can be cut out of the raw line; -1 - (where the line
    begins), if it has to be parsed. `counts[i]` is its number of tokens. Bad and blank lines have no entry.
    """

    start: int
    stop: int
    positions: list[np.ndarray] = dataclasses.field(default_factory=list)  # int64, block by block
    counts: list[np.ndarray] = dataclasses.field(default_factory=list)
    lines: int = 0
    bad_lines: int = 0
    first_bad: tuple[int, str] | None = None  # line number, from 1 at the range's first line; reason


def line_index(path: str, processor: RecordProcessor, processes: int = 1, skip_bad_lines: bool = False):
    """The `Columns` of a file: `positions` int64 [n] (see `Scan`) and `ends` int64 [n], tokens up to each line's end.

    Facts: `tokens`, `size`, `content` (a digest of the file's two ends), `bad_lines`, `first_bad` (`line:
    reason`). Built on first use, then kept.

    Raises:
      UserError: `file:line: reason` of the first bad line, unless those are to be skipped; or if no token is left.
    """
    version = file_version(path)
    produce = functools.partial(_produce, path, version["size"], processor, processes, not skip_bad_lines)
    dtypes = {"positions": "<i8", "ends": "<i8"}
    index = cached_columns(path, ".index", processor.identity(), version, dtypes, produce)
    if index.metadata["bad_lines"] and not skip_bad_lines:
        raise UserError(f"{path}:{index.metadata['first_bad']}")
    return index


def _produce(path, size, processor, processes, strict, append) -> dict:
    """Scans the file range by range, in order, appends its entries, and returns its facts."""
    name = os.path.basename(path)
    starts = range(0, size, RANGE_BYTES)
    stops = [min(start + RANGE_BYTES, size) for start in starts]
    # Without a terminal, as in a job's log, one line a minute is enough.
    interval = 0.5 if sys.stderr.isatty() else 60
    tokens = lines = bad_lines = 0
    first_bad = None
    with (
        tqdm(total=size, desc=f"indexing {name}", unit="B", unit_scale=True, mininterval=interval, delay=2) as bar,
        Workers(min(processes, len(starts))) as workers,
    ):
        for scan in workers.map(functools.partial(scan_range, path, processor, strict), starts, stops):
            if scan.first_bad and not first_bad:
                first_bad = f"{lines + scan.first_bad[0]}: {scan.first_bad[1][:REASON_CHARACTERS]}"
                if strict:
                    raise UserError(f"{path}:{first_bad}")
            for positions, counts in zip(scan.positions, scan.counts, strict=True):
                append(positions=positions, ends=tokens + np.cumsum(counts))
                tokens += int(counts.sum())
            lines += scan.lines
            bad_lines += scan.bad_lines
            bar.update(scan.stop - scan.start)
    if not tokens:
        raise UserError(f"{path}: holds no tokens" + (f"; {path}:{first_bad}" if first_bad else " (the file is empty)"))
    if file_version(path)["size"] != size:
        raise UserError(f"{path}: changed while it was indexed; start again when nothing writes to it")
    content = content_digest(path, size)
    return {"tokens": tokens, "size": size, "content": content, "bad_lines": bad_lines, "first_bad": first_bad}


def scan_range(path: str, processor: RecordProcessor, strict: bool, start: int, stop: int) -> Scan:
    """Checks the lines that begin in [start, stop); with `strict` up to the block of the first bad one."""
    scanner = _Scanner(processor)
    scan = Scan(start, stop)
    for offset, data in _whole_lines(path, start, stop):
        lines = data.split(b"\n")
        if not lines[-1]:
            lines.pop()  # what follows the last newline
        if not scanner.together(scan, offset, lines):
            scanner.line_by_line(scan, offset, lines)
        scan.lines += len(lines)
        if strict and scan.first_bad:
            break
    return scan


class _Scanner:
    """Adds the entries of successive lines, of which the first begins at `offset`, to a `Scan`."""

    def __init__(self, processor: RecordProcessor):
        self._processor = processor
        self._key = None
        if processor.slice_part is not None:
            self._key = processor.parts[processor.slice_part].keys[0]
            self._opening = re.compile(b'"%s"\\s*:\\s*"' % re.escape(self._key.encode()))

    def together(self, scan: Scan, offset: int, lines: list[bytes]) -> bool:
        """Checks all lines at once, if the ids of each can be cut out and all are good; else returns False.

        Valid base64 has no character that JSON treats specially, so what is left of a line when its ids are cut out is
        JSON if the line is, and takes no time to parse. A stand-in proves that they were those of the right field.
        """
        if not self._key:
            return False
        item = token_type(self._processor.dtype)
        try:
            begins = [self._opening.search(line).end() for line in lines]
            ends = [line.index(b'"', begin) for line, begin in zip(lines, begins)]
            raw = [pybase64.b64decode(line[b:e], None, True) for line, b, e in zip(lines, begins, ends)]
            for rest in {line[:b] + STAND_IN + line[e:] for line, b, e in zip(lines, begins, ends)}:
                if parse_line(rest).get(self._key) != STAND_IN.decode():
                    return False
            sizes = np.array([len(ids) for ids in raw])
            if (sizes % item.itemsize).any():
                return False
            check_ids(np.frombuffer(b"".join(raw), item), self._processor.vocab_size)
        except (AttributeError, ValueError):  # no opening; anything else (RecordError is a ValueError)
            return False
        lengths = np.array([len(line) + 1 for line in lines])
        scan.positions.append(offset + np.cumsum(lengths) - lengths + begins)
        scan.counts.append(sizes // item.itemsize + len(self._processor.parts) - 1)  # a literal is one token
        return True

    def line_by_line(self, scan: Scan, offset: int, lines: list[bytes]) -> None:
        """Parses each line, skips blank ones, and notes bad ones."""
        positions, counts = [], []
        for number, line in enumerate(lines, start=scan.lines + 1):
            if line.strip():
                try:
                    record = parse_line(line)
                    ids, _ = self._processor(record)
                    counts.append(len(ids))
                    positions.append(self._position(offset, line, record))
                except RecordError as reason:
                    scan.bad_lines += 1
                    scan.first_bad = scan.first_bad or (number, str(reason))
            offset += len(line) + 1
        scan.positions.append(np.array(positions, np.int64))
        scan.counts.append(np.array(counts, np.int64))

    def _position(self, offset, line, record):
        if self._key:
            opening = self._opening.search(line)
            if opening and line.startswith(record[self._key].encode() + b'"', opening.end()):
                return offset + opening.end()
        return -1 - offset


def _whole_lines(path: str, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, bytes): all lines that begin in [start, stop), none of them cut."""
    with open_binary(path) as file:
        if start:  # a line that began before belongs to the range before
            file.seek(start - 1)
            start = start - 1 + len(file.readline())
        while start < stop:
            file.seek(start)
            data = file.read(min(BLOCK_BYTES, stop - start))
            if not data:
                return
            if not data.endswith(b"\n"):
                data += file.readline()
            yield start, data
            start += len(data)
