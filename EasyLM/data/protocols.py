"""Interfaces of the data pipeline below row sources (`EasyLM.training.batches.RowSource`).

The implementations do not inherit from these classes: `token_stream.FileTokenStream` and `token_store.TokenStore` are
token streams, `jsonl_file.JsonlFile` and `packed_file.PackedFile` token files, `text_examples.FileExamples` and
`text_examples.DatasetExamples` examples, `text_tokenizer.TextTokenizer` a tokenizer.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np


class TokenStream(Protocol):
    """The tokens of all examples in order, as one sequence.

    Attributes:
      num_tokens: tokens of the stream.
      num_examples: records of the stream.
      bad_lines: lines that were skipped because they are not records.
      tokenizer: the image tokenizer that the records name, or None.
    """

    num_tokens: int
    num_examples: int
    bad_lines: int
    tokenizer: str | None

    @property
    def bytes_read(self) -> int:
        """Bytes that `read` has read so far in this process."""

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns ids [n] and loss weights float32 [n] of tokens start..stop-1; None means that all weights are 1."""

    def example_of(self, token: int) -> int:
        """Returns the number of the example that contains a token."""

    def example_starts(self, start: int, stop: int) -> np.ndarray:
        """Returns those of the tokens start..stop-1 that are the first of an example: int64 [n], ascending."""

    def token_at(self, offset: int) -> int:
        """Returns the first token of the line that starts at a byte offset of the first file.

        Raises:
          UserError: if no line starts there.
        """

    def fingerprint(self) -> dict[str, Any]:
        """Returns JSON values that are equal for equal streams, whatever the paths of the files."""


class TokenFile(Protocol):
    """One file of a stream: lines whose tokens are literals, the ids of one field, and literals (`TokenLayout`).

    Attributes:
      path: the file.
      num_tokens: tokens of the file, literals included.
      num_lines: lines that are records.
      bad_lines: lines that were skipped because they are not records.
      bytes_read: bytes that `read_ids` has read so far in this process.
      tokenizer: the image tokenizer that the records name, or None.
    """

    path: str
    num_tokens: int
    num_lines: int
    bad_lines: int
    bytes_read: int
    tokenizer: str | None

    def line_of(self, token: int) -> int:
        """Returns the line that contains a token. Call it first for each range that is read.

        Raises:
          UserError: naming a memory-mapped file that was truncated since it was opened.
        """

    def line_bounds(self, first: int, last: int) -> np.ndarray:
        """Returns the first token of each of the lines first..last, and the end of the last one: int64 [lines + 1]."""

    def read_ids(self, first: int, counts: list[int], start: int, ids: np.ndarray) -> None:
        """Fills `ids` with the field ids of consecutive lines.

        Args:
          first: the first line.
          counts: number of field ids in each line.
          start: the first of these ids in the first line.
        """

    def masks(self, line: int) -> np.ndarray:
        """Returns the loss weights of a line whose layout does not give them: float32 [tokens of the line]."""

    def token_at(self, offset: int) -> int:
        """Returns the first token of the line that starts at a byte offset, or raises UserError."""

    def fingerprint(self) -> list[dict[str, Any]]:
        """Returns size, content digest and number of tokens of each JSONL file whose lines this file holds."""


class Examples(Protocol):
    """Records that hold text, before tokenization.

    Attributes:
      name: for messages and progress bars.
      source: path or URL; names the cache of the tokens.
      total: number of examples; None if unknown.
    """

    name: str
    source: str
    total: int | None

    def __iter__(self) -> Iterator[tuple[Any, int, bytes | dict[str, Any]]]:
        """Yields (number, offset, example): a number for `address`, the offset in bytes, a JSON line or a record."""

    def address(self, number: Any) -> str:
        """Returns the name of an example in messages, such as FILE:LINE."""

    def check_line_start(self, offset: int) -> None:
        """Raises UserError unless a line of the first file starts at a byte offset."""

    def version(self) -> dict[str, Any]:
        """Returns JSON values that change when the examples change."""

    def fingerprint(self) -> Any:
        """Returns JSON values that are equal for equal examples, whatever the paths of the files."""


class Tokenizer(Protocol):
    """Text to ids.

    Attributes:
      vocab_size: ids are below it.
      bos_token_id, eos_token_id: special ids; -1 if the tokenizer has none.
    """

    vocab_size: int
    bos_token_id: int
    eos_token_id: int

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text."""

    def fingerprint(self) -> dict[str, Any]:
        """Returns JSON values that the ids depend on."""
