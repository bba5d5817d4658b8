"""Many JSONL files into one, shuffled: `python -m tokenizer.mix --inputs=a.jsonl,'b/*.jsonl.gz' --output_file=F.jsonl`.

An input is a path or a glob, whose files are one source; .gz and .zst are unpacked. The lines themselves are copied,
but for carriage returns at their ends. Inputs are read twice: once to check every line and count, once to mix; so
nothing is written before all is known to be good and to fit on the disk. The order is a uniform permutation of all
sentences, which depends on the inputs' order and content, the seed, and how much is taken, not on --memory_mb.
"""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from EasyLM.data import packed_file, records
from EasyLM.data.mixture import parse_numbers, proportional
from EasyLM.errors import UserError, prefix_errors
from EasyLM.flags import Flag, run
from EasyLM.storage import (
    atomic_file,
    check_output,
    expand_path_groups,
    file_version,
    is_compressed,
    is_remote,
    read_lines,
    write_json,
)
from EasyLM.vocab import VOCAB_SIZE
from tokenizer.sentence_files import disk_shuffle
from tokenizer.sentence_files.skipped_inputs import SkippedInputs

FLAGS = {
    "inputs": Flag(
        "", "JSONL files, also .gz and .zst: a comma list of paths and globs; a glob is one input.", required=True
    ),
    "output_file": Flag("", "The JSONL file to write; it appears when it is whole.", required=True),
    "weights": Flag("", "Comma list, one an input: its share of the mixed sentences. Empty: each sentence once."),
    "total": Flag(
        0, "weights: how many sentences to mix; 0: as many as no input has to repeat a sentence for.", least=0
    ),
    "counts": Flag("", "Comma list, one an input: how many of its sentences to take; more than it has: repeated."),
    "seed": Flag(0, "Of the order, and of which sentences are taken.", least=0),
    "vocab_size": Flag(VOCAB_SIZE, "Ids must be below it.", least=1),
    "max_errors": Flag(
        0, "Leave out up to so many lines that are no records, each named; one more is an error.", least=0
    ),
    "memory_mb": Flag(512, "Megabytes of lines held at a time; the rest waits on disk, beside the output.", least=1),
    "output_json": Flag("", "File for a report of what went in."),
}
_DRAWS = 4096  # random numbers drawn at a time
_MARGIN_BYTES = 16 << 20  # of the disk, left free


@dataclasses.dataclass
class Source:
    """One input: its files, and what was found in them."""

    name: str
    paths: list[str]
    bad: set[tuple[str, int]] = dataclasses.field(default_factory=set)  # (path, line number)
    sentences: int = 0
    bytes: int = 0
    taken: int = 0


def main(config) -> None:
    """Mixes, and prints what went in."""
    sources = _sources(config)
    _check_lines(sources, config.vocab_size, SkippedInputs(config.max_errors))
    for source, taken in zip(sources, _taken(sources, config)):
        source.taken = taken
        if taken and not source.sentences:
            raise UserError(f"--inputs={config.inputs}: {source.name} holds no sentence")
    total = sum(source.taken for source in sources)
    if not total:
        raise UserError(f"--inputs={config.inputs}: no sentence is taken")
    # Sentences are as long as the mean of their source, as far as is known.
    expected = sum(source.bytes * source.taken // max(source.sentences, 1) for source in sources)
    directory = os.path.dirname(os.path.abspath(config.output_file))
    _check_disk(directory, expected, config)
    memory = config.memory_mb * 10**6
    with (
        tempfile.TemporaryDirectory(dir=directory, prefix=".mix_") as folder,
        atomic_file(config.output_file) as file,
    ):
        lines = _keyed_lines(sources, config.seed, tqdm(total=total, unit=" sentences", desc="reading"))
        bar = tqdm(total=total, unit=" sentences", desc="writing")
        for line in disk_shuffle.by_key(lines, expected, memory, folder):
            file.write(line + b"\n")
            bar.update()
        bar.close()
    _report(sources, total, config)


def _sources(config) -> list[Source]:
    """The inputs. Checks all settings that can be checked without reading them."""
    if config.weights and config.counts:
        raise UserError(f"--weights={config.weights} and --counts={config.counts}: give one of them")
    if config.total and not config.weights:
        raise UserError(f"--total={config.total}: goes with --weights")
    if os.path.isdir(config.output_file) or is_compressed(config.output_file):
        raise UserError(f"--output_file={config.output_file}: must be a plain file, not a folder, .gz or .zst")
    sources = [Source(name, paths) for name, paths in expand_path_groups("inputs", config.inputs)]
    for source in sources:
        for path in source.paths:
            if packed_file.is_packed(path):
                raise UserError(
                    f"--inputs={config.inputs}: {path} is packed: unpack it first (tokenizer.pack --unpack)"
                )
            if not is_remote(path) and os.path.abspath(path) == os.path.abspath(config.output_file):
                raise UserError(f"--output_file={config.output_file}: is one of --inputs={config.inputs}")
    check_output(config.output_file, "output_file")
    if config.output_json:
        check_output(config.output_json, "output_json")
    return sources


def _check_lines(sources: list[Source], vocab_size: int, skipped: SkippedInputs) -> None:
    """Counts sentences and bytes of each source, and notes its bad lines."""
    known = [(source, path) for source in sources for path in source.paths]
    packed = any(is_compressed(path) for _, path in known)
    total = None if packed else sum(file_version(path)["size"] for _, path in known)
    with tqdm(total=total, unit="B", unit_scale=True, desc="checking") as bar:
        for source, path in known:
            for number, line in read_lines(path):
                bar.update(len(line) + 1)
                try:
                    records.read_record(line, vocab_size)
                except records.RecordError as reason:
                    skipped.add(f"{path}:{number}", f"{path}:{number}: {reason}")
                    source.bad.add((path, number))
                    continue
                source.sentences += 1
                source.bytes += len(line) + 1


def _taken(sources: list[Source], config) -> list[int]:
    """How many sentences of each source go into the mixture."""
    if config.counts:
        with prefix_errors(f"--counts={config.counts}"):
            return parse_numbers(config.counts, len(sources), int)
    if not config.weights:
        return [source.sentences for source in sources]
    with prefix_errors(f"--weights={config.weights}"):
        weights = parse_numbers(config.weights, len(sources))
    weighty = [(source.sentences, weight) for source, weight in zip(sources, weights) if weight]
    total = config.total or int(min(count * sum(weights) / weight for count, weight in weighty))
    return proportional(total, weights)


def _check_disk(directory: str, expected: int, config) -> None:
    """Raises UserError if the mixture, and what waits for its turn, would not fit."""
    # Parts are removed as they are written out, so that beside the whole there is one part, at most what memory holds.
    waiting = config.memory_mb * 10**6 if expected > config.memory_mb * 10**6 else 0
    needed, free = expected + waiting + _MARGIN_BYTES, shutil.disk_usage(directory).free
    if needed > free:
        sizes = f"needs {needed / 1e9:.2f} GB of disk space, {free / 1e9:.2f} GB are free"
        raise UserError(f"--output_file={config.output_file}: {sizes}")


def _keyed_lines(sources: list[Source], seed: int, bar) -> Iterator[tuple[int, bytes]]:
    """(random key, line) of each sentence that is taken, as often as it is."""
    with bar:
        for number, source in enumerate(sources):
            keys = _draws(np.random.default_rng([seed, number, 0]))
            chances = _draws(np.random.default_rng([seed, number, 1]))
            if not source.taken:
                continue
            copies, wanted = divmod(source.taken, source.sentences)
            left = source.sentences
            for line in _good_lines(source):
                # Each of the sentences that are left is as likely to be one of those still wanted (Knuth, algorithm S).
                chosen = next(chances) * left < wanted << disk_shuffle.KEY_BITS
                wanted, left = wanted - chosen, left - 1
                for _ in range(copies + chosen):
                    yield next(keys), line
                    bar.update()
            if left:
                raise UserError(f"{source.name}: changed while it was read")


def _good_lines(source: Source) -> Iterator[bytes]:
    """The lines that were found good, as many as then."""
    count = 0
    for path in source.paths:
        for number, line in read_lines(path):
            if (path, number) not in source.bad and count < source.sentences:
                count += 1
                yield line


def _draws(rng: np.random.Generator) -> Iterator[int]:
    """Random numbers of 64 bits, without end."""
    while True:
        yield from rng.integers(0, 1 << disk_shuffle.KEY_BITS, _DRAWS, np.uint64).tolist()


def _report(sources: list[Source], total: int, config) -> None:
    figures = [
        {
            "input": source.name,
            "files": len(source.paths),
            "sentences": source.sentences,
            "bad_lines": len(source.bad),
            "taken": source.taken,
            "times": source.taken / max(source.sentences, 1),
        }
        for source in sources
    ]
    for figure in figures:
        print("{input}: {taken} of {sentences} sentences ({times:.2f} times), {bad_lines} bad lines".format(**figure))
    print(f"{config.output_file}: {total} sentences")
    if config.output_json:
        write_json(config.output_json, {"sentences": total, "seed": config.seed, "inputs": figures})


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
