"""JSONL and packed files, concatenated to one stream of tokens."""

import bisect
import resource
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Any

import numpy as np

from EasyLM.data.jsonl_file import JsonlFile
from EasyLM.data.line_index import line_index
from EasyLM.data.packed_file import PackedFile, is_packed
from EasyLM.data.protocols import TokenFile
from EasyLM.data.record_fields import RecordProcessor, TokenLayout
from EasyLM.data.tokenizer_names import common_tokenizer
from EasyLM.errors import UnavailableError, UserError


class FileTokenStream:
    """A `protocols.TokenStream` over files."""

    def __init__(self, paths: list[str], processor: RecordProcessor, processes: int = 1, skip_bad_lines: bool = False):
        """Opens the files and their indexes; builds the indexes that are missing.

        Args:
          processes: processes that build an index.
          skip_bad_lines: skip lines that are not records.

        Raises:
          UserError: naming the file, and the line if one is bad; or two files whose records name different tokenizers.
        """
        _raise_open_file_limit(2 * len(paths))  # a file and its index
        self._files = [_open(path, processor, processes, skip_bad_lines) for path in paths]
        self._first_tokens = np.cumsum([0] + [file.num_tokens for file in self._files]).tolist()
        self._first_examples = np.cumsum([0] + [file.num_lines for file in self._files]).tolist()
        self._processor, self._layout, self._all_in_loss = processor, processor.layout, processor.all_in_loss
        self.num_tokens = self._first_tokens[-1]
        self.num_examples = self._first_examples[-1]
        self.bad_lines = sum(file.bad_lines for file in self._files)
        self.tokenizer = common_tokenizer((file.tokenizer, file.path) for file in self._files)

    @property
    def bytes_read(self) -> int:
        """See `TokenStream`."""
        return sum(file.bytes_read for file in self._files)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """See `TokenStream`; ids are int32."""
        assert 0 <= start <= stop <= self.num_tokens
        ids = np.empty(stop - start, np.int32)
        masks = None if self._all_in_loss else np.empty(stop - start, np.float32)
        for file, first, token, end in self._file_ranges(start, stop):
            part = slice(token - start, end - start)
            part_masks = None if masks is None else masks[part]
            _read_file(file, self._layout, token - first, end - first, ids[part], part_masks)
        return ids, masks

    def example_of(self, token: int) -> int:
        """See `TokenStream`."""
        number = self._file_of(token)
        return self._first_examples[number] + self._files[number].line_of(token - self._first_tokens[number])

    def example_starts(self, start: int, stop: int) -> np.ndarray:
        """See `TokenStream`."""
        starts = [np.zeros(0, np.int64)]
        for file, first, token, end in self._file_ranges(start, stop):
            lines = file.line_of(token - first), file.line_of(end - first - 1)
            bounds = first + file.line_bounds(*lines)[:-1]
            starts.append(bounds[bounds >= token])  # the first line may have begun before
        return np.concatenate(starts)

    def token_at(self, offset: int) -> int:
        """See `TokenStream`."""
        return self._files[0].token_at(offset)

    def fingerprint(self) -> dict[str, Any]:
        """See `TokenStream`."""
        return {
            "files": [part for file in self._files for part in file.fingerprint()],
            "processing": self._processor.fingerprint(),
        }

    def _file_ranges(self, start: int, stop: int) -> Iterator[tuple[TokenFile, int, int, int]]:
        """Yields each file of the tokens start..stop-1, its first token in the stream, and its range of them."""
        number, token = self._file_of(start), start
        while token < stop:
            first, end = self._first_tokens[number], min(stop, self._first_tokens[number + 1])
            yield self._files[number], first, token, end
            number, token = number + 1, end

    def _file_of(self, token: int) -> int:
        return bisect.bisect_right(self._first_tokens, token) - 1


def _read_file(
    file: TokenFile, layout: TokenLayout, start: int, stop: int, ids: np.ndarray, masks: np.ndarray | None
) -> None:
    """Fills `ids` and `masks` (None where all loss weights are 1) with tokens start..stop-1 of a file."""
    first, last = file.line_of(start), file.line_of(stop - 1)
    bounds = file.line_bounds(first, last).tolist()
    try:
        if masks is None and not layout.num_literals:
            file.read_ids(first, [end - begin for begin, end in pairwise(bounds)], start - bounds[0], ids)
            return
        for line, (begin, end) in enumerate(pairwise(bounds), start=first):
            low, high = max(start, begin), min(stop, end)
            part = slice(low - start, high - start)
            line_masks = None if masks is None else masks[part]
            _read_line(file, layout, line, end - begin, low - begin, ids[part], line_masks)
    except UnavailableError:
        raise
    except ValueError as error:
        raise UserError(f"{file.path}: changed since it was indexed, at token {start} ({error})") from None


def _read_line(
    file: TokenFile, layout: TokenLayout, line: int, length: int, start: int, ids: np.ndarray, masks: np.ndarray | None
) -> None:
    """Fills `ids` and `masks` with the tokens of a line of `length` tokens, from its token `start` on."""
    stop, head, tail = start + len(ids), len(layout.head), length - len(layout.tail)
    low, high = max(start, head), min(stop, tail)
    if low < high:
        file.read_ids(line, [tail - head], low - head, ids[low - start : high - start])
    if masks is not None:
        masks[:] = file.masks(line)[start:stop] if layout.mask is None else layout.mask
    for token, literal in chain(enumerate(layout.head), enumerate(layout.tail, tail)):
        if start <= token < stop:
            ids[token - start] = literal.literal
            if masks is not None:
                masks[token - start] = literal.mask


def _open(path: str, processor: RecordProcessor, processes: int, skip_bad_lines: bool) -> TokenFile:
    if is_packed(path):
        return PackedFile(path, processor)
    return JsonlFile(path, line_index(path, processor, processes, skip_bad_lines), processor)


def _raise_open_file_limit(count: int) -> None:
    """Raises this process's limit of open files, if `count` data files need it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 256  # for everything else that a run opens
    if soft != resource.RLIM_INFINITY and needed > soft:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
