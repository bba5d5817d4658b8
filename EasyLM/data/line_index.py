"""The index of a JSONL file: position and number of the tokens of each line. Building it checks every line.

The file is read once, in byte ranges, by one or more processes.
"""

import dataclasses
import functools
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pybase64
from tqdm import tqdm

from EasyLM.data.record_fields import RecordProcessor
from EasyLM.data.records import RecordError, check_ids, parse_line, token_type, type_warning
from EasyLM.data.tokenizer_names import OneTokenizer, tokenizer_of
from EasyLM.errors import UserError
from EasyLM.process_pool import Workers
from EasyLM.progress import progress
from EasyLM.storage import Columns, cached_columns, content_digest, file_version, open_binary

RANGE_BYTES = 64 << 20  # one task of a worker
BLOCK_BYTES = 1 << 20  # one read; fits into a CPU cache
REASON_CHARACTERS = 500
PLACEHOLDER = b"?ids?"  # not base64


@dataclasses.dataclass
class RangeScan:
    """The entries of the lines that start in a byte range. Bad and blank lines have no entry.

    Attributes:
      positions: int64 arrays, one for each block. For a line whose ids can be sliced from the raw line: the offset of
        its base64 text. For a line that has to be parsed: -1 - (the offset of the line).
      counts: int64 arrays, one for each block: tokens of each line.
      lines: number of lines, including bad and blank ones.
      first_bad: line number (the first line of the range is 1) and reason.
      type_warning: that of `records.type_warning` for the first lines of the file; empty in other ranges.
      tokenizers: the tokenizers that the records name, with the first line of each, counted as in `first_bad`.
    """

    start: int
    stop: int
    positions: list[np.ndarray] = dataclasses.field(default_factory=list)
    counts: list[np.ndarray] = dataclasses.field(default_factory=list)
    lines: int = 0
    bad_lines: int = 0
    first_bad: tuple[int, str] | None = None
    type_warning: str = ""
    tokenizers: dict[str, int] = dataclasses.field(default_factory=dict)


def line_index(path: str, processor: RecordProcessor, processes: int = 1, skip_bad_lines: bool = False) -> Columns:
    """Returns the index of a file, cached on first use.

    Args:
      processes: processes that build the index.
      skip_bad_lines: leave out lines that are not records.

    Returns:
      columns `positions` int64 [n] (see `RangeScan`) and `ends` int64 [n], tokens up to the end of each line; metadata
      `tokens`, `size`, `content` (a digest of the file), `bad_lines`, `first_bad` ("LINE: reason"), and `tokenizer`,
      the one that the records name, or None.

    Raises:
      UserError: naming FILE:LINE of the first bad line, unless bad lines are skipped; or of a line that names another
        tokenizer than the lines before it; or if there are no tokens.
    """
    version = file_version(path)
    produce = functools.partial(_build, path, version["size"], processor, processes, not skip_bad_lines)
    dtypes = {"positions": "<i8", "ends": "<i8"}
    index = cached_columns(path, ".index", processor.fingerprint(), version, dtypes, produce, is_shared=True)
    if index.metadata["bad_lines"] and not skip_bad_lines:
        raise UserError(f"{path}:{index.metadata['first_bad']}")
    return index


def _build(
    path: str, size: int, processor: RecordProcessor, processes: int, strict: bool, append: Callable[..., None]
) -> dict[str, Any]:
    """Scans the byte ranges of a file, appends their entries in order, and returns the metadata."""
    starts = range(0, size, RANGE_BYTES)
    stops = [min(start + RANGE_BYTES, size) for start in starts]
    tokens = lines = bad_lines = 0
    first_bad = None
    tokenizer = OneTokenizer()
    with _progress_bar(path, size) as bar, Workers(min(processes, len(starts))) as workers:
        for scan in workers.map(functools.partial(scan_range, path, processor, strict), starts, stops):
            if scan.type_warning:
                logging.warning("%s: %s", path, scan.type_warning)
            for name, line in scan.tokenizers.items():
                tokenizer.add(name, f"{path}:{lines + line}")
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
        raise UserError(f"{path}: changed while it was indexed; start again when it is complete")
    return {
        "tokens": tokens,
        "size": size,
        "content": content_digest(path, size),
        "bad_lines": bad_lines,
        "first_bad": first_bad,
        "tokenizer": tokenizer.name,
    }


def _progress_bar(path: str, size: int) -> tqdm:
    return progress(total=size, desc=f"indexing {os.path.basename(path)}", unit="B", unit_scale=True, delay=2)


def scan_range(path: str, processor: RecordProcessor, strict: bool, start: int, stop: int) -> RangeScan:
    """Checks the lines that start at bytes start..stop-1; with `strict`, only up to the block of the first bad line."""
    scanner = _Scanner(processor)
    scan = RangeScan(start, stop)
    for offset, data in _line_blocks(path, start, stop):
        lines = data.split(b"\n")
        if not lines[-1]:
            lines.pop()  # the empty text after the last newline
        if not scanner.scan_block(scan, offset, lines):
            scanner.scan_lines(scan, offset, lines)
        scan.lines += len(lines)
        if strict and scan.first_bad:
            break
    return scan


class _Scanner:
    """Adds the entries of consecutive lines to a `RangeScan`. The first line starts at byte `offset`."""

    def __init__(self, processor: RecordProcessor):
        self._processor = processor
        self._key, self._opening = "", re.compile(b"")
        if processor.slice_part is not None:
            self._key = processor.parts[processor.slice_part].keys[0]
            self._opening = re.compile(b'"%s"\\s*:\\s*"' % re.escape(self._key.encode()))

    def scan_block(self, scan: RangeScan, offset: int, lines: list[bytes]) -> bool:
        """Adds all lines at once, if all are good and their ids can be sliced; otherwise returns False.

        Valid base64 contains no character that JSON treats specially. So a line is valid JSON if it is valid with a
        placeholder instead of the base64 text, and this shorter line is fast to parse. If the placeholder is the value
        of the field, the base64 text is too.
        """
        if not self._key:
            return False
        item = token_type(self._processor.dtype)
        try:
            begins = [self._opening.search(line).end() for line in lines]  # type: ignore[union-attr]  # caught below
            ends = [line.index(b'"', begin) for line, begin in zip(lines, begins)]
            raw = [pybase64.b64decode(line[b:e], None, True) for line, b, e in zip(lines, begins, ends)]
            tokenizers = set()
            for rest in {line[:b] + PLACEHOLDER + line[e:] for line, b, e in zip(lines, begins, ends)}:
                record = parse_line(rest)
                if record.get(self._key) != PLACEHOLDER.decode():
                    return False
                tokenizers.add(tokenizer_of(record))
            if len(tokenizers) > 1:  # the other function finds the first line of each
                return False
            sizes = np.array([len(ids) for ids in raw])
            if (sizes % item.itemsize).any():
                return False
            ids = np.frombuffer(b"".join(raw), item)
            check_ids(ids, self._processor.vocab_size)
        except (AttributeError, ValueError):  # AttributeError: no such field; ValueError includes RecordError
            return False
        if offset == 0:
            scan.type_warning = type_warning(ids)
        _note_tokenizer(scan, tokenizers.pop(), scan.lines + 1)
        lengths = np.array([len(line) + 1 for line in lines])
        scan.positions.append(offset + np.cumsum(lengths) - lengths + begins)
        scan.counts.append(sizes // item.itemsize + self._processor.layout.num_literals)
        return True

    def scan_lines(self, scan: RangeScan, offset: int, lines: list[bytes]) -> None:
        """Parses each line, skips blank lines, and counts bad lines."""
        positions, counts, stored, is_first = [], [], [], offset == 0
        for number, line in enumerate(lines, start=scan.lines + 1):
            if line.strip():
                try:
                    record = parse_line(line)
                    ids, _ = self._processor(record)
                    counts.append(len(ids))
                    positions.append(self._position(offset, line, record))
                    _note_tokenizer(scan, tokenizer_of(record), number)
                    if is_first:
                        stored += self._processor.stored_ids(record)
                except RecordError as reason:
                    scan.bad_lines += 1
                    scan.first_bad = scan.first_bad or (number, str(reason))
            offset += len(line) + 1
        if stored:
            scan.type_warning = type_warning(np.concatenate(stored))
        scan.positions.append(np.array(positions, np.int64))
        scan.counts.append(np.array(counts, np.int64))

    def _position(self, offset: int, line: bytes, record: dict[str, Any]) -> int:
        if self._key:
            opening = self._opening.search(line)
            if opening and line.startswith(record[self._key].encode() + b'"', opening.end()):
                return offset + opening.end()
        return -1 - offset


def _note_tokenizer(scan: RangeScan, name: str | None, number: int) -> None:
    if name is not None and len(scan.tokenizers) < 2:  # two are an error
        scan.tokenizers.setdefault(name, number)


def _line_blocks(path: str, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, bytes) of complete lines: all lines that start at bytes start..stop-1."""
    with open_binary(path) as file:
        if start:  # a line that started before `start` belongs to the previous range
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
