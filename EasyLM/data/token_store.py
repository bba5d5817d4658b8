"""Text, tokenized once: a stream of tokens in a memory-mapped file."""

import functools
import itertools

import numpy as np
from tqdm import tqdm

from EasyLM.data.record_fields import RecordProcessor
from EasyLM.data.records import RecordError, parse_line
from EasyLM.errors import UserError
from EasyLM.process_pool import Workers
from EasyLM.storage import cached_columns

STORE_DTYPES = ("i4", "u4", "i2", "u2")
REASON_CHARACTERS = 1000


class TokenStore:
    """The tokens of all examples in order. Behaves as `json_lines.JsonLines` does."""

    def __init__(
        self,
        examples,
        processor: RecordProcessor,
        dtype: str = "i4",
        processes: int = 1,
        chunk_size: int = 32,
        batch_size: int = 1024,
        skip_bad_lines: bool = False,
    ):
        """Tokenizes the examples, or opens what an earlier run made of them.

        Args:
          examples: what is tokenized, as `examples.FileExamples`.
          dtype: item type of the stored ids.
          processes, chunk_size, batch_size: processes that tokenize, examples that each is given at a time, examples
            read ahead.

        Raises:
          UserError: with the address of the first example that is no record, unless those are to be skipped; or if no
            token is left.
        """
        self._examples, self._processor = examples, processor
        produce = functools.partial(
            _produce, examples, processor, processes, chunk_size, batch_size, not skip_bad_lines
        )
        dtypes = {"ids": f"<{dtype}", "masks": "u1", "ends": "<i8", "offsets": "<i8"}
        identity = {"processing": processor.identity(), "dtype": dtype, "examples": examples.name}
        store = cached_columns(examples.source, ".tokens", identity, examples.version(), dtypes, produce)
        if store.metadata["bad_lines"] and not skip_bad_lines:
            raise UserError(store.metadata["first_bad"])
        self._ids, self._masks = store.arrays["ids"], store.arrays["masks"]
        self._ends, self._offsets = store.arrays["ends"], store.arrays["offsets"]
        self.num_tokens, self.num_examples = len(self._ids), len(self._ends)
        self.bad_lines = store.metadata["bad_lines"]
        self.bytes_read = 0

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """As `JsonLines.read`; ids have the store's item type."""
        ids = np.array(self._ids[start:stop])
        self.bytes_read += ids.nbytes
        return ids, None if self._processor.all_in_loss else self._masks[start:stop].astype(np.float32)

    def example_of(self, token: int) -> int:
        """The number of the example that a token of the stream belongs to."""
        return int(np.searchsorted(self._ends, token, side="right"))

    def token_at(self, offset: int) -> int:
        """The first token of the line that begins at a byte offset of the first file; UserError if none does."""
        self._examples.check_line_begins(offset)
        example = int(np.searchsorted(self._offsets, offset))
        return int(self._ends[example - 1]) if example else 0

    def identity(self) -> dict:
        """As `JsonLines.identity`."""
        return {
            "examples": self._examples.identity(),
            "tokens": self.num_tokens,
            "processing": self._processor.identity(),
        }


def _produce(examples, processor, processes, chunk_size, batch_size, strict, append) -> dict:
    tokens = bad_lines = 0
    first_bad = None
    work = functools.partial(_tokenize, processor)
    with (
        tqdm(desc=f"tokenizing {examples.name}", total=examples.total, unit=" examples", delay=2) as bar,
        Workers(processes) as workers,
    ):
        iterator = iter(examples)
        while batch := list(itertools.islice(iterator, batch_size)):
            for (number, offset, _), result in zip(
                batch, workers.map(work, [item for _, _, item in batch], chunksize=chunk_size), strict=True
            ):
                if isinstance(result, str):
                    bad_lines += 1
                    first_bad = first_bad or f"{examples.address(number)}: {result}"[:REASON_CHARACTERS]
                    if strict:
                        raise UserError(first_bad)
                    continue
                ids, masks = result
                tokens += len(ids)
                append(ids=ids, masks=masks, ends=[tokens], offsets=[offset])
            bar.update(len(batch))
    if not tokens:
        raise UserError(f"{examples.name}: holds no tokens" + (f"; {first_bad}" if first_bad else ""))
    return {"bad_lines": bad_lines, "first_bad": first_bad}


def _tokenize(processor: RecordProcessor, item):
    """(ids, masks) of a JSON line (bytes) or an example (dict), or what is wrong with it."""
    try:
        return processor(parse_line(item) if isinstance(item, bytes) else item)
    except RecordError as reason:
        return str(reason)
