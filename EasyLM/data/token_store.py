"""Text as a token stream: tokenized once, then cached in a memory-mapped file."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from EasyLM.data.protocols import Examples
from EasyLM.data.record_fields import RecordProcessor
from EasyLM.data.records import RecordError, parse_line
from EasyLM.errors import UserError
from EasyLM.process_pool import Workers
from EasyLM.progress import progress
from EasyLM.storage import cached_columns

STORE_DTYPES = ("i4", "u4", "i2", "u2")
REASON_CHARACTERS = 1000


@dataclasses.dataclass(frozen=True)
class TokenizationSettings:
    """How examples are divided among processes.

    Attributes:
      processes: processes that tokenize.
      chunk_size: examples in one task of a process.
      batch_size: examples read ahead.
    """

    processes: int = 1
    chunk_size: int = 32
    batch_size: int = 1024


class TokenStore:
    """A `protocols.TokenStream` of tokenized examples."""

    def __init__(
        self,
        examples: Examples,
        processor: RecordProcessor,
        settings: TokenizationSettings,
        dtype: str = "i4",
        skip_bad_lines: bool = False,
    ):
        """Tokenizes the examples, or opens the cached result.

        Args:
          dtype: item type of the stored ids.
          skip_bad_lines: leave out examples that are not records.

        Raises:
          UserError: with the address of the first bad example, unless they are skipped; or if there are no tokens.
        """
        self._examples, self._processor = examples, processor
        produce = functools.partial(_tokenize_all, examples, processor, settings, not skip_bad_lines)
        dtypes = {"ids": f"<{dtype}", "masks": "u1", "ends": "<i8", "offsets": "<i8"}
        cache_settings = {"processing": processor.fingerprint(), "dtype": dtype, "examples": examples.name}
        store = cached_columns(examples.source, ".tokens", cache_settings, examples.version(), dtypes, produce)
        if store.metadata["bad_lines"] and not skip_bad_lines:
            raise UserError(store.metadata["first_bad"])
        self._ids, self._masks = store.arrays["ids"], store.arrays["masks"]
        self._ends, self._offsets = store.arrays["ends"], store.arrays["offsets"]
        self._check_size = store.check_size
        self.num_tokens, self.num_examples = len(self._ids), len(self._ends)
        self.bad_lines = store.metadata["bad_lines"]
        self.bytes_read = 0
        self.tokenizer: str | None = None  # the records hold text

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """See `TokenStream`; ids have the item type of the store."""
        self._check_size()
        ids = np.array(self._ids[start:stop])
        self.bytes_read += ids.nbytes
        return ids, None if self._processor.all_in_loss else self._masks[start:stop].astype(np.float32)

    def example_of(self, token: int) -> int:
        """See `TokenStream`."""
        self._check_size()
        return int(np.searchsorted(self._ends, token, side="right"))

    def example_starts(self, start: int, stop: int) -> np.ndarray:
        """See `TokenStream`."""
        self._check_size()
        starts = self._ends[slice(*np.searchsorted(self._ends, (start, stop)))]
        return np.concatenate([[0], starts]) if start == 0 < stop else np.array(starts)

    def token_at(self, offset: int) -> int:
        """See `TokenStream`."""
        self._examples.check_line_start(offset)
        example = int(np.searchsorted(self._offsets, offset))
        return int(self._ends[example - 1]) if example else 0

    def fingerprint(self) -> dict[str, Any]:
        """See `TokenStream`."""
        return {
            "examples": self._examples.fingerprint(),
            "tokens": self.num_tokens,
            "processing": self._processor.fingerprint(),
        }


def _tokenize_all(
    examples: Examples,
    processor: RecordProcessor,
    settings: TokenizationSettings,
    strict: bool,
    append: Callable[..., None],
) -> dict[str, Any]:
    """Tokenizes examples in batches, appends their tokens in order, and returns the metadata."""
    tokens = bad_lines = 0
    first_bad = None
    tokenize = functools.partial(_tokenize, processor)
    with (
        progress(desc=f"tokenizing {examples.name}", total=examples.total, unit=" examples", delay=2) as bar,
        Workers(settings.processes) as workers,
    ):
        iterator = iter(examples)
        while batch := list(itertools.islice(iterator, settings.batch_size)):
            results = workers.map(tokenize, [example for _, _, example in batch], chunksize=settings.chunk_size)
            for (number, offset, _), result in zip(batch, results, strict=True):
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


def _tokenize(processor: RecordProcessor, example: bytes | dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | str:
    """Returns ids and loss weights of a JSON line or a record, or the reason why it is not a record."""
    try:
        return processor(parse_line(example) if isinstance(example, bytes) else example)
    except RecordError as reason:
        return str(reason)
