"""Mixes sentences of several sources: checks and counts the lines, samples the sentences to take, shuffles them.

Each source is read twice: once to check and count its lines, once to mix them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from EasyLM.data import records
from EasyLM.data.tokenizer_names import OneTokenizer, tokenizer_of
from EasyLM.errors import UserError
from EasyLM.progress import progress
from EasyLM.skipped_inputs import SkippedInputs
from EasyLM.storage import atomic_file, file_version, is_compressed, read_lines, scratch_folder
from tokenizer.sentence_files import disk_shuffle
from tokenizer.sentence_files.disk_shuffle import KEY_BITS, KeyedLine

_RANDOM_BATCH = 4096  # random numbers per call of the generator
_MARGIN_BYTES = 16 << 20  # left free on the disk


@dataclasses.dataclass
class Source:
    """The files of one input, their counts (set by `count_lines`), and the number of sentences to take.

    Attributes:
      name: the path or glob.
      paths: its files.
      bad_lines: (path, line number) of each.
      sentences: number of good lines.
      bytes: size of the good lines.
      taken: number of sentences to take; if above `sentences`, sentences repeat.
    """

    name: str
    paths: list[str]
    bad_lines: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    sentences: int = 0
    bytes: int = 0
    taken: int = 0

    def statistics(self) -> dict[str, Any]:
        """Returns the report of the source as JSON values."""
        return {
            "input": self.name,
            "files": len(self.paths),
            "sentences": self.sentences,
            "bad_lines": len(self.bad_lines),
            "taken": self.taken,
            "times": self.taken / max(self.sentences, 1),
        }


def count_lines(
    sources: Sequence[Source],
    vocab_size: int,
    skipped: SkippedInputs,
    convert: Callable[[bytes], bytes] = bytes,
) -> OneTokenizer:
    """Counts the sentences and bytes of each source. Adds its bad lines to `source.bad_lines` and `skipped`.

    Args:
      convert: see `write_mixture`. A line for which it raises RecordError is bad.

    Returns:
      The tokenizer that the sentences name.

    Raises:
      UserError: naming two lines with tokens of different tokenizers.
    """
    tokenizer = OneTokenizer()
    files = [(source, path) for source in sources for path in source.paths]
    is_size_known = not any(is_compressed(path) for _, path in files)
    total = sum(file_version(path)["size"] for _, path in files) if is_size_known else None
    with progress(total=total, unit="B", unit_scale=True, desc="checking") as bar:
        for source, path in files:
            for number, line in read_lines(path):
                bar.update(len(line) + 1)
                try:
                    _, record = records.read_record(line, vocab_size)
                    converted = convert(line)
                except records.RecordError as error:
                    skipped.add(f"{path}:{number}", f"{path}:{number}: {error}")
                    source.bad_lines.add((path, number))
                    continue
                tokenizer.add(tokenizer_of(record), f"{path}:{number}")
                source.sentences += 1
                source.bytes += len(converted) + 1
    return tokenizer


def needed_space(sources: Sequence[Source], memory_bytes: int) -> int:
    """Returns the bytes on disk that `write_mixture` needs."""
    size = _mixture_bytes(sources)
    # Each temporary file is removed once it is read: output and files together exceed the mixture by at most one part.
    return size + (memory_bytes if size > memory_bytes else 0) + _MARGIN_BYTES


def _mixture_bytes(sources: Sequence[Source]) -> int:
    """Estimates the size of the mixture from the mean length of each source's sentences."""
    return sum(source.bytes * source.taken // max(source.sentences, 1) for source in sources)


def write_mixture(
    path: str, sources: Sequence[Source], seed: int, memory_bytes: int, convert: Callable[[bytes], bytes] = bytes
) -> int:
    """Atomically writes the sentences to take in random order; returns their number.

    Args:
      path: the JSONL file.
      sources: after `count_lines`, with `taken` set.
      seed: of the order and of the choice of sentences.
      memory_bytes: maximum size of the lines in memory; the others are in temporary files beside `path`.
      convert: returns the line of the mixture for a line of a source; by default, the same line.

    Raises:
      UserError: if a source changed since it was counted.
    """
    total = sum(source.taken for source in sources)
    with scratch_folder(path) as folder, atomic_file(path) as file:
        keyed = progress(keyed_lines(sources, seed, convert), total=total, unit=" sentences", desc="reading")
        lines = disk_shuffle.sort_by_key(keyed, _mixture_bytes(sources), memory_bytes, folder)
        for line in progress(lines, total=total, unit=" sentences", desc="writing"):
            file.write(line + b"\n")
    return total


def keyed_lines(sources: Sequence[Source], seed: int, convert: Callable[[bytes], bytes] = bytes) -> Iterator[KeyedLine]:
    """Yields (random key, converted line) of the sentences to take; a repeated sentence has several keys."""
    for number, source in enumerate(sources):
        keys = _random_numbers(np.random.default_rng([seed, number, 0]))
        draws = _random_numbers(np.random.default_rng([seed, number, 1]))
        if not source.taken:
            continue
        copies, wanted = divmod(source.taken, source.sentences)
        left = source.sentences
        for line in _converted_lines(source, convert):
            # Selection sampling (Knuth, algorithm S) selects each of the remaining sentences with equal probability.
            is_selected = next(draws) * left < wanted << KEY_BITS
            wanted, left = wanted - is_selected, left - 1
            for _ in range(copies + is_selected):
                yield next(keys), line
        if left:
            raise UserError(f"{source.name}: changed while it was read")


def _converted_lines(source: Source, convert: Callable[[bytes], bytes]) -> Iterator[bytes]:
    for line in _good_lines(source):
        try:
            yield convert(line)
        except records.RecordError as error:
            raise UserError(f"{source.name}: changed while it was read: {error}") from None


def _good_lines(source: Source) -> Iterator[bytes]:
    """Yields the counted lines; ignores lines that were appended later."""
    count = 0
    for path in source.paths:
        for number, line in read_lines(path):
            if (path, number) not in source.bad_lines and count < source.sentences:
                count += 1
                yield line


def _random_numbers(rng: np.random.Generator) -> Iterator[int]:
    """Yields random 64-bit numbers without end."""
    while True:
        yield from rng.integers(0, 1 << KEY_BITS, _RANDOM_BATCH, np.uint64).tolist()
