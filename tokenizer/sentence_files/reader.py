"""Reads the sentences of a file in any format: JSONL (also .gz and .zst) or packed."""

from collections.abc import Callable, Iterator

import numpy as np

from EasyLM.data import packed_file, records
from EasyLM.errors import UserError
from EasyLM.storage import read_lines


def read_sentences(
    path: str, vocab_size: int, on_bad_line: Callable[[str, str], None] | None = None
) -> Iterator[tuple[np.ndarray, dict]]:
    """Yields (ids [n], JSON object of the record) of each sentence. The object of a packed sentence lacks its ids.

    Args:
      on_bad_line: called with (`file:line`, message) for each bad line, which is then skipped. None: a bad line raises.
        Packed files have no bad lines.

    Raises:
      UserError: if the file is missing or broken, or has a bad line and `on_bad_line` is None.
    """
    if packed_file.is_packed(path):
        yield from packed_file.read(path, vocab_size)
        return
    for number, line in read_lines(path):
        try:
            sentence = records.read_record(line, vocab_size)
        except records.RecordError as reason:
            address = f"{path}:{number}"
            if on_bad_line is None:
                raise UserError(f"{address}: {reason}") from None
            on_bad_line(address, f"{address}: {reason}")
            continue
        yield sentence
