"""One file of a stream of tokens: any range of them, whose lines are a head of literals, a body of ids, and a tail."""

from itertools import chain

import numpy as np

from EasyLM.data.record_fields import RecordProcessor
from EasyLM.errors import UserError


class LineFile:
    """What `json_lines.JsonLines` and `packed.PackedFile` share; they say where bodies come from.

    Attributes:
      num_tokens, num_examples, bad_lines: as of `json_lines.JsonLines`.
      bytes_read: so far, by `read`.
    """

    num_tokens: int
    num_examples: int
    bad_lines: int = 0

    def __init__(self, path: str, processor: RecordProcessor):
        self.path, self._processor, self.bytes_read = path, processor, 0
        body = processor.slice_part
        self._head, self._tail, self._body_mask = (), (), 1.0
        if body is not None:
            self._head, self._tail = processor.parts[:body], processor.parts[body + 1 :]
            self._body_mask = processor.parts[body].mask

    def identity(self) -> list[dict]:
        """What the file holds, as JSON values: a dict for each JSONL file whose lines these are."""
        raise NotImplementedError

    def token_at(self, offset: int) -> int:
        """The first token of the line that begins at a byte offset; UserError if none does."""
        raise NotImplementedError

    def line_of(self, token: int) -> int:
        """The line of a token."""
        raise NotImplementedError

    def _ends(self, first: int, last: int) -> np.ndarray:
        """Tokens up to the end of each of the lines first..last."""
        raise NotImplementedError

    def _cut(self, first: int, last: int) -> np.ndarray:
        """Whether the body of each of the lines first..last can be copied; else the line has to be parsed."""
        raise NotImplementedError

    def _copy_bodies(self, first: int, counts: list[int], skip: int, ids: np.ndarray) -> None:
        """Fills ids with those of successive bodies, of so many ids each, from line `first` on, after `skip` ids."""
        raise NotImplementedError

    def _parsed(self, line: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, loss weights) of a line that has to be parsed."""
        raise NotImplementedError

    def read(self, start: int, stop: int, ids: np.ndarray, masks: np.ndarray | None) -> None:
        """Fills ids and masks (None where all weights are 1) with this file's tokens [start, stop)."""
        first, last = self.line_of(start), self.line_of(stop - 1)
        ends = self._ends(first, last).tolist()
        begins = [int(self._ends(first - 1, first - 1)[0]) if first else 0, *ends[:-1]]
        cut = self._cut(first, last)
        try:
            if masks is None and not self._head and not self._tail and cut.all():
                counts = [end - begin for begin, end in zip(begins, ends)]
                self._copy_bodies(first, counts, start - begins[0], ids)
                return
            for line, (can_be_cut, begin, end) in enumerate(zip(cut, begins, ends), start=first):
                low, high = max(start, begin), min(stop, end)
                share = slice(low - start, high - start)
                line_masks = None if masks is None else masks[share]
                copy = self._copy_cut if can_be_cut else self._copy_parsed
                copy(line, end - begin, low - begin, ids[share], line_masks)
        except ValueError as error:
            raise UserError(f"{self.path}: changed since it was indexed, at token {start} ({error})") from None

    def _copy_parsed(self, line, count, skip, ids, masks):
        """Fills ids and masks with the tokens of a line, from `skip` on, that has to be parsed."""
        line_ids, line_masks = self._parsed(line)
        ids[:] = line_ids[skip : skip + len(ids)]
        if masks is not None:
            masks[:] = line_masks[skip : skip + len(ids)]

    def _copy_cut(self, line, count, skip, ids, masks):
        """The same, for a line of `count` tokens whose body can be copied."""
        head, body = len(self._head), count - len(self._head) - len(self._tail)
        low, high = max(skip - head, 0), min(skip + len(ids) - head, body)
        if low < high:
            self._copy_bodies(line, [body], low, ids[head + low - skip : head + high - skip])
        if masks is not None:
            masks[:] = self._body_mask
        for token, part in chain(enumerate(self._head, -skip), enumerate(self._tail, head + body - skip)):
            if 0 <= token < len(ids):
                ids[token] = part.literal
                if masks is not None:
                    masks[token] = part.mask
