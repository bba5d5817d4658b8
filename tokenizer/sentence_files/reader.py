"""The sentences of a file, whatever its form: JSONL, .gz, .zst, packed."""

from collections.abc import Iterator

import numpy as np

from EasyLM.data import packed_file, records
from EasyLM.storage import read_lines
from tokenizer.sentence_files.skipped_inputs import Problems


def read(path: str, vocab_size: int, problems: Problems) -> Iterator[tuple[np.ndarray, dict]]:
    """Yields (ids [n], the JSON object, or of a packed sentence what rode along) of each line that is a record.

    Lines that are none become problems, addressed `file:line`; a packed file has no such lines.

    Raises:
      UserError: if the file is missing or broken, or those are too many.
    """
    if packed_file.is_packed(path):
        yield from packed_file.read(path, vocab_size)
        return
    for number, line in read_lines(path):
        try:
            sentence = records.read_record(line, vocab_size)
        except records.RecordError as reason:
            problems.add(f"{path}:{number}", f"{path}:{number}: {reason}")
            continue
        yield sentence
