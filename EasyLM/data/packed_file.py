"""Packed sentences: a JSONL file as columns of numbers, two bytes a token, read in place of it with the same rows.

Columns: `ids` uint16 of all sentences; `ends` int64, ids up to each sentence's end; `others` bytes, the JSON of what
rides along with each sentence, `other_ends` int64; `origin` bytes, JSON: the files that it was packed from, as a data
state names them, so that a run goes on from either.
"""

import bisect
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import orjson

from EasyLM.data import records
from EasyLM.data.record_fields import RecordProcessor
from EasyLM.data.token_file import LineFile
from EasyLM.errors import UserError
from EasyLM.storage import Columns, content_digest, file_version, is_remote, open_columns, write_columns

ENDING = ".packed"
FORMAT = "EasyLM packed sentences, version 1"
DTYPES = {"ids": "<u2", "ends": "<i8", "others": "u1", "other_ends": "<i8", "origin": "u1"}
LARGEST_ID = np.iinfo(np.uint16).max
_BLOCK = 1024  # sentences appended at a time


def is_packed(path: str) -> bool:
    return path.endswith(ENDING)


def write(path: str, sources: Iterable[tuple[str, Iterable[tuple[np.ndarray, dict]]]], keep_others: bool) -> dict:
    """Packs the (ids, record) of each sentence of (path, sentences). Returns {"tokens", "sentences"}.

    Args:
      keep_others: whether what rides along with the ids is kept.
    """
    facts = {}

    def produce(append) -> dict:
        tokens = largest = sentences = other_bytes = 0
        origin = []
        for source, items in sources:
            iterator, before = iter(items), (tokens, sentences)
            while block := list(itertools.islice(iterator, _BLOCK)):
                ids, counts, others = _columns_of(block, keep_others)
                largest = max(largest, int(ids.max(initial=0)))
                assert largest <= LARGEST_ID
                lengths = [len(other) for other in others]
                append(ids=ids, ends=tokens + np.cumsum(counts), others=np.frombuffer(b"".join(others), np.uint8))
                append(other_ends=other_bytes + np.cumsum(lengths))
                tokens, sentences, other_bytes = (
                    tokens + sum(counts),
                    sentences + len(block),
                    other_bytes + sum(lengths),
                )
            size = file_version(source)["size"]
            counted = {"tokens": tokens - before[0], "sentences": sentences - before[1]}
            origin.append({"size": size, "content": content_digest(source, size), **counted})
        append(origin=np.frombuffer(orjson.dumps(origin), np.uint8))
        facts.update(tokens=tokens, sentences=sentences)
        return {"format": FORMAT, "largest_id": largest}

    write_columns(path, DTYPES, produce)
    return facts


def _columns_of(block: list[tuple[np.ndarray, dict]], keep_others: bool) -> tuple[np.ndarray, list[int], list[bytes]]:
    others = [{key: value for key, value in record.items() if key != records.TOKENS_KEY} for _, record in block]
    texts = [orjson.dumps(other) if keep_others and other else b"" for other in others]
    return np.concatenate([ids for ids, _ in block]), [len(ids) for ids, _ in block], texts


def read(path: str, vocab_size: int) -> Iterator[tuple[np.ndarray, dict]]:
    """Yields (ids uint16 [n], what rode along) of each sentence, as `records.read_records`.

    Raises:
      UserError: naming the path, if it is no packed file, or an id is not below vocab_size.
    """
    arrays = _opened(path, vocab_size).arrays
    begin = other_begin = 0
    for end, other_end in zip(arrays["ends"], arrays["other_ends"]):
        text = arrays["others"][other_begin:other_end].tobytes()
        try:
            others = orjson.loads(text) if text else {}
        except orjson.JSONDecodeError as error:
            raise UserError(f"{path}: is damaged, at byte {other_begin} of what rides along ({error})") from None
        yield arrays["ids"][begin:end], others
        begin, other_begin = end, other_end


def _opened(path: str, vocab_size: int) -> Columns:
    if is_remote(path):
        raise UserError(f"{path}: a packed file is mapped into memory and has to be local: copy it here")
    file_version(path)
    found = open_columns(path)
    if found is None or not _is_whole(found):
        raise UserError(f"{path}: is cut off, or not of the format {FORMAT!r}: write it with tokenizer.pack")
    if found.metadata["largest_id"] >= vocab_size:
        raise UserError(f"{path}: id {found.metadata['largest_id']} is outside the vocabulary 0..{vocab_size - 1}")
    return found


def _is_whole(found: Columns) -> bool:
    """Whether the columns are those of a packed file and fit together."""
    if found.metadata.get("format") != FORMAT or found.arrays.keys() != DTYPES.keys():
        return False
    if not isinstance(found.metadata.get("largest_id"), int):
        return False
    ids, ends, others, other_ends, _ = (found.arrays[name] for name in DTYPES)
    lasts = [int(column[-1]) if len(column) else 0 for column in (ends, other_ends)]
    return len(ends) == len(other_ends) and lasts == [len(ids), len(others)]


class PackedFile(LineFile):
    """A packed file as part of a stream: literals may surround its ids, other fields are not there."""

    def __init__(self, path: str, processor: RecordProcessor):
        """Maps the file.

        Raises:
          UserError: naming the path, if it is none, or the field list asks for more than `{tokens}` and literal ids.
        """
        super().__init__(path, processor)
        if processor.slice_part is None or processor.parts[processor.slice_part].keys != (records.TOKENS_KEY,):
            raise UserError(
                f"{path}: a packed file has one field, {{{records.TOKENS_KEY}}}, which literal ids may surround; for "
                "other field lists use the JSONL file"
            )
        found = _opened(path, processor.vocab_size)
        self._ids, self._id_ends = found.arrays["ids"], found.arrays["ends"]
        self._origin = orjson.loads(found.arrays["origin"].tobytes())
        self._literals = len(processor.parts) - 1  # of each line
        self.num_examples = len(self._id_ends)
        self.num_tokens = len(self._ids) + self._literals * self.num_examples
        if not self.num_tokens:
            raise UserError(f"{path}: holds no tokens")

    def identity(self) -> list[dict]:
        """As of `LineFile`: of the JSONL files that were packed."""
        return [
            {
                "size": part["size"],
                "content": part["content"],
                "tokens": part["tokens"] + self._literals * part["sentences"],
            }
            for part in self._origin
        ]

    def token_at(self, offset: int) -> int:
        """As of `LineFile`."""
        if offset:
            raise UserError(f"{self.path} is packed: it has no bytes of lines, its data begins at 0")
        return 0

    def line_of(self, token: int) -> int:
        """As of `LineFile`."""
        if not self._literals:
            return int(np.searchsorted(self._id_ends, token, side="right"))
        return bisect.bisect_right(range(self.num_examples), token, key=lambda line: self._ends(line, line)[0])

    def _ends(self, first, last):
        return self._id_ends[first : last + 1] + self._literals * np.arange(first + 1, last + 2)

    def _cut(self, first, last):
        return np.ones(last - first + 1, bool)

    def _copy_bodies(self, first, counts, skip, ids):
        begin = (int(self._id_ends[first - 1]) if first else 0) + skip
        ids[:] = self._ids[begin : begin + len(ids)]
        self.bytes_read += 2 * len(ids)
