"""Packed files: sentences as columns, two bytes per token. Their rows equal those of the JSONL files.

Columns:
  ids         uint16, the ids of all sentences
  ends        int64, ids up to the end of each sentence
  others      bytes, the JSON of the other keys of each record
  other_ends  int64, bytes of `others` up to the end of each sentence
  origin      bytes, JSON: the fingerprints of the packed JSONL files, so that a run resumes from either form

The header holds a checksum of each column, and the name of the tokenizer if all sentences have one. Opening a file
reads all of it, at 1 to 4 GB/s per core: it verifies the checksums and the order of the ends, and finds the largest id.
For a file of more than 64 MiB the result is cached, as the index of a JSONL file is, until the size or the modification
time of the file changes. Reading rows costs no more.

A local file is memory-mapped. Of a remote one, opening reads the header and the columns `ends` and `origin`, and each
row is a request for its bytes. The other columns are not verified; instead, no id may exceed the largest of the header.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import numpy as np
import orjson

from EasyLM.data.record_fields import RecordProcessor
from EasyLM.data.records import TOKENS_KEY, RecordError, parse_line
from EasyLM.data.tokenizer_names import TOKENIZER_KEY, OneTokenizer, tokenizer_of
from EasyLM.errors import UserError, prefix_errors
from EasyLM.storage import (
    VERIFIED_ONCE_BYTES,
    Columns,
    cached_columns,
    checksums,
    content_digest,
    file_version,
    is_remote,
    open_columns,
    parse_json,
    write_columns,
)

ENDING = ".packed"
FORMAT = "EasyLM packed sentences, version 1"
DTYPES = {"ids": "<u2", "ends": "<i8", "others": "u1", "other_ends": "<i8", "origin": "u1"}
LARGEST_ID = np.iinfo(np.uint16).max
_ORIGIN = [{"size": int, "content": str, "tokens": int, "sentences": int}]
CACHED_BYTES = VERIFIED_ONCE_BYTES  # size of a file from which on the result of its verification is cached
_BLOCK_SENTENCES = 1024  # appended at a time

Sentence = tuple[np.ndarray, dict[str, Any]]  # ids [n], record


def is_packed(path: str) -> bool:
    """Whether the name is that of a packed file."""
    return path.endswith(ENDING)


def write(path: str, sources: Iterable[tuple[str, Iterable[Sentence]]], keep_others: bool) -> dict[str, int]:
    """Atomically writes a packed file.

    Args:
      sources: (path of a JSONL file, its sentences).
      keep_others: whether to keep the other keys of the records.

    Returns:
      {"tokens": tokens of all sentences, "sentences": their number}

    Raises:
      UserError: naming both sentences, if two name different tokenizers.
    """
    totals = {"tokens": 0, "sentences": 0}
    tokenizer = OneTokenizer()

    def produce(append) -> dict[str, Any]:
        largest = other_bytes = 0
        origin = []
        for source, sentences in sources:
            iterator, before = iter(sentences), dict(totals)
            while block := list(itertools.islice(iterator, _BLOCK_SENTENCES)):
                for number, (_, record) in enumerate(block, totals["sentences"] - before["sentences"]):
                    tokenizer.add(tokenizer_of(record), f"{source}, sentence {number}")
                ids, counts, others = _block_columns(block, keep_others)
                largest = max(largest, int(ids.max(initial=0)))
                assert largest <= LARGEST_ID
                lengths = [len(other) for other in others]
                append(ids=ids, ends=totals["tokens"] + np.cumsum(counts))
                append(others=np.frombuffer(b"".join(others), np.uint8), other_ends=other_bytes + np.cumsum(lengths))
                totals["tokens"] += sum(counts)
                totals["sentences"] += len(block)
                other_bytes += sum(lengths)
            size = file_version(source)["size"]
            counted = {name: total - before[name] for name, total in totals.items()}
            origin.append({"size": size, "content": content_digest(source, size), **counted})
        append(origin=np.frombuffer(orjson.dumps(origin), np.uint8))
        return {"format": FORMAT, "largest_id": largest, TOKENIZER_KEY: None if tokenizer.unnamed else tokenizer.name}

    write_columns(path, DTYPES, produce)
    return totals


def _block_columns(block: list[Sentence], keep_others: bool) -> tuple[np.ndarray, list[int], list[bytes]]:
    """Returns the concatenated ids, the number of ids and the JSON of the other keys of each sentence."""
    others = [{key: value for key, value in record.items() if key != TOKENS_KEY} for _, record in block]
    texts = [orjson.dumps(other) if keep_others and other else b"" for other in others]
    return np.concatenate([ids for ids, _ in block]), [len(ids) for ids, _ in block], texts


def read(path: str, vocab_size: int) -> Iterator[Sentence]:
    """Yields ids uint16 [n] and the other keys of each sentence, as `records.read_records` does.

    Raises:
      UserError: naming the path, if it is damaged or not a packed file, or an id is not below vocab_size.
    """
    if is_remote(path):
        raise UserError(f"{path}: only the trainer reads remote packed files: copy it to this machine")
    columns = _open(path, vocab_size)
    arrays, name = columns.arrays, tokenizer_of(columns.metadata)
    common = {} if name is None else {TOKENIZER_KEY: name}
    begin = other_begin = 0
    for sentence in range(len(arrays["ends"])):
        columns.check_size()
        end, other_end = arrays["ends"][sentence], arrays["other_ends"][sentence]
        text = arrays["others"][other_begin:other_end].tobytes()
        try:
            others = parse_line(text) if text else {}
        except RecordError as reason:
            raise UserError(f"{path}: is damaged, at byte {other_begin} of the column others ({reason})") from None
        yield arrays["ids"][begin:end].copy(), others | common
        begin, other_begin = end, other_end


def _open(path: str, vocab_size: int) -> Columns:
    version = file_version(path)
    columns = open_columns(path)
    if columns is None or not _is_valid(columns):
        raise UserError(f"{path}: is truncated, or not of the format {FORMAT!r}: write it with tokenizer.pack")
    verify = functools.partial(_verify, path, columns)
    if is_remote(path):
        columns = _with_bounds(path, columns)
        largest_id = columns.metadata["largest_id"]
    elif version["size"] > CACHED_BYTES:
        largest_id = cached_columns(path, ".index", FORMAT, version, {}, verify).metadata["largest_id"]
    else:
        largest_id = verify()["largest_id"]
    if largest_id >= vocab_size:
        _raise_outside(path, columns, largest_id, vocab_size)
    return columns


def _is_valid(columns: Columns) -> bool:
    """Whether the columns are those of a packed file, and their lengths agree."""
    if columns.metadata.get("format") != FORMAT or columns.arrays.keys() != DTYPES.keys():
        return False
    ids, ends, others, other_ends, _ = (columns.arrays[name] for name in DTYPES)
    if any(array.dtype != DTYPES[name] for name, array in columns.arrays.items()):
        return False
    lasts = [int(column[-1:][0]) if len(column) else 0 for column in (ends, other_ends)]
    return len(ends) == len(other_ends) and lasts == [len(ids), len(others)]


def _verify(path: str, columns: Columns, append: Callable[..., None] | None = None) -> dict[str, Any]:
    """Reads the whole file. Returns the largest id.

    The header's `largest_id` is not used: files of version 0.1.0 have no checksums.

    Raises:
      UserError: naming the file and the column, if it is damaged.
    """
    _check(path, columns)
    return {"largest_id": max((int(block.max()) for block in checksums.blocks(columns.arrays["ids"])), default=0)}


def _with_bounds(path: str, columns: Columns) -> Columns:
    """Reads the columns of a remote file that locate rows and identify the data.

    Raises:
      UserError: naming the file, if it has no checksums, or one of these columns is damaged.
    """
    if not columns.checksums:
        raise UserError(f"{path}: is of version 0.1.0, without checksums: copy it to this machine, or pack it again")
    arrays = {name: columns.arrays[name][:] for name in ("ends", "origin")}
    _check(path, Columns(columns.metadata, arrays, {name: columns.checksums[name] for name in arrays}))
    return dataclasses.replace(columns, arrays=columns.arrays | arrays)


def _check(path: str, columns: Columns) -> None:
    """Raises UserError, naming the file and the column, if a column is damaged."""
    damaged = columns.damaged_column()
    for name in [name for name in ("ends", "other_ends") if name in columns.arrays]:
        last = 0
        for block in checksums.blocks(columns.arrays[name]):
            if block[0] < last or (block[1:] < block[:-1]).any():
                damaged = damaged or name
            last = block[-1]
    if damaged:
        raise UserError(
            f"{path}: is damaged: the column {damaged} differs from what was written; copy or pack the file again"
        )


def _raise_outside(path: str, columns: Columns, largest_id: int, vocab_size: int) -> NoReturn:
    """Raises UserError, naming the sentence and token of the largest id, which is outside the vocabulary."""
    place, ends = 0, columns.arrays["ends"]
    for block in checksums.blocks(columns.arrays["ids"]):
        is_largest = block == largest_id
        if is_largest.any():
            place += int(is_largest.argmax())
            break
        place += len(block)
    sentence = int(np.searchsorted(ends, place, side="right"))
    token = place - (int(ends[sentence - 1]) if sentence else 0)
    raise UserError(
        f"{path}: id {largest_id} is outside the vocabulary 0..{vocab_size - 1} (token {token} of sentence {sentence}, "
        "counted from 0)"
    )


class PackedFile:
    """A packed file as a `protocols.TokenFile`. Its only field is {tokens}; literals may surround the ids of a line."""

    def __init__(self, path: str, processor: RecordProcessor):
        """Opens the file.

        Raises:
          UserError: naming the path, if the file is invalid, or the field list has more than {tokens} and literal ids.
        """
        if processor.slice_part is None or processor.parts[processor.slice_part].keys != (TOKENS_KEY,):
            raise UserError(
                f"{path}: a packed file has one field, {{{TOKENS_KEY}}}, which literal ids may surround; for other "
                "field lists use the JSONL file"
            )
        columns = _open(path, processor.vocab_size)
        self.path, self.bad_lines, self.bytes_read = path, 0, 0
        self.tokenizer = tokenizer_of(columns.metadata)
        self._limit = columns.metadata["largest_id"] if is_remote(path) else None
        self._ids, self._ends, self._check_size = columns.arrays["ids"], columns.arrays["ends"], columns.check_size
        with prefix_errors(f"{path}: is damaged, in the column origin"):
            self._origin = parse_json(columns.arrays["origin"].tobytes(), _ORIGIN)
        self._literals = processor.layout.num_literals  # of each line
        self.num_lines = len(self._ends)
        self.num_tokens = len(self._ids) + self._literals * self.num_lines
        if not self.num_tokens:
            raise UserError(f"{path}: holds no tokens")

    def fingerprint(self) -> list[dict[str, Any]]:
        """See `TokenFile`."""
        return [
            {
                "size": part["size"],
                "content": part["content"],
                "tokens": part["tokens"] + self._literals * part["sentences"],
            }
            for part in self._origin
        ]

    def token_at(self, offset: int) -> int:
        """See `TokenFile`; a packed file has no byte offsets of lines, so only offset 0 is valid."""
        if offset:
            raise UserError(f"{self.path} is packed: it has no byte offsets of lines, give 0")
        return 0

    def line_of(self, token: int) -> int:
        """See `TokenFile`."""
        self._check_size()
        if not self._literals:
            return int(np.searchsorted(self._ends, token, side="right"))
        return bisect.bisect_right(range(self.num_lines), token, key=self._end)

    def line_bounds(self, first: int, last: int) -> np.ndarray:
        """See `TokenFile`."""
        bounds = self._ends[first - 1 : last + 1] if first else np.concatenate([[0], self._ends[: last + 1]])
        return bounds + self._literals * np.arange(first, last + 2) if self._literals else bounds

    def read_ids(self, first: int, counts: list[int], start: int, ids: np.ndarray) -> None:
        """See `TokenFile`."""
        begin = (int(self._ends[first - 1]) if first else 0) + start
        ids[:] = self._ids[begin : begin + len(ids)]
        if self._limit is not None and ids.max(initial=0) > self._limit:
            raise ValueError(f"an id is larger than {self._limit}, the largest of the header")
        self.bytes_read += self._ids.itemsize * len(ids)

    def masks(self, line: int) -> np.ndarray:
        """See `TokenFile`; never called."""
        raise AssertionError("the layout of a packed file gives all loss weights")

    def _end(self, line: int) -> int:
        """Returns the tokens up to the end of a line."""
        return int(self._ends[line]) + self._literals * (line + 1)
