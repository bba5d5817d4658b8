"""JSONL to packed sentences and back: `python -m tokenizer.pack --input_files=a.jsonl --output_file=a.packed`.

A packed file takes two bytes a token instead of 5.33, needs no index, and is read in place of the JSONL file by the
trainer, `tokenizer.inspect` and `tokenizer.detokenize`. Several files become one, in the order given.
"""

import itertools
import os
import shutil
from collections.abc import Iterator

from tqdm import tqdm

from EasyLM.data import packed_file, records
from EasyLM.errors import UserError
from EasyLM.flags import Flag, run
from EasyLM.storage import atomic_file, expand_paths, file_version, is_compressed
from EasyLM.vocab import VOCAB_SIZE
from tokenizer.sentence_files import reader
from tokenizer.sentence_files.skipped_inputs import SkippedInputs

_UNPACKED = 4  # bytes of JSONL in one of .gz or .zst, about: of an id's 43 bits of base64, 13 say something

FLAGS = {
    "input_files": Flag(
        "", "JSONL files, also .gz and .zst, or packed ones: a comma list of paths and globs.", required=True
    ),
    "output_file": Flag(
        "",
        f"The file to write, *{packed_file.ENDING}; with --unpack, JSONL. It appears when it is whole.",
        required=True,
    ),
    "unpack": Flag(False, "Make JSONL of packed files."),
    "keep_others": Flag(True, "Keep what rides along with the ids (kind, sources)."),
    "vocab_size": Flag(
        VOCAB_SIZE, "Ids must be below it; they take two bytes.", least=1, most=packed_file.LARGEST_ID + 1
    ),
    "max_errors": Flag(
        0, "Leave out up to so many lines that are no records, each named; one more is an error.", least=0
    ),
}


def main(config) -> None:
    """Packs or unpacks, and prints what the file holds."""
    paths = _check(config)
    _check_disk(paths, config)
    skipped = SkippedInputs(config.max_errors)
    with tqdm(unit=" sentences", desc="unpacking" if config.unpack else "packing") as bar:

        def sentences(path: str) -> Iterator:
            for sentence in reader.read(path, config.vocab_size, skipped.add):
                bar.update()
                yield sentence

        if config.unpack:
            facts = _unpack(itertools.chain.from_iterable(map(sentences, paths)), config)
        else:
            facts = packed_file.write(
                config.output_file, ((path, sentences(path)) for path in paths), config.keep_others
            )
    size = os.path.getsize(config.output_file)
    each = f"{size / max(facts['tokens'], 1):.2f} bytes a token"
    left_out = f", {len(skipped)} bad lines left out" if len(skipped) else ""
    print(f"{config.output_file}: {facts['sentences']} sentences, {facts['tokens']} tokens, {each}{left_out}")


def _check(config) -> list[str]:
    paths = expand_paths("input_files", config.input_files)
    for path in paths:
        if packed_file.is_packed(path) != config.unpack:
            what = f"is no {packed_file.ENDING} file" if config.unpack else "is packed already (--unpack=True unpacks)"
            raise UserError(f"--input_files={config.input_files}: {path} {what}")
    if packed_file.is_packed(config.output_file) == config.unpack or is_compressed(config.output_file):
        ending = ".jsonl" if config.unpack else packed_file.ENDING
        raise UserError(f"--output_file={config.output_file}: must end in {ending}, by which it is recognised")
    return paths


def _check_disk(paths: list[str], config) -> None:
    """Raises UserError if the output would not fit: a share of the input's size, or thrice that."""
    directory = os.path.dirname(os.path.abspath(config.output_file))
    os.makedirs(directory, exist_ok=True)
    sizes = sum(file_version(path)["size"] * (_UNPACKED if is_compressed(path) else 1) for path in paths)
    # Packing writes columns (2 of 5.33 bytes), then joins them; JSONL has 5.33 bytes for the 2 of a packed token.
    needed, free = int(sizes * (3.0 if config.unpack else 0.8)), shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"--output_file={config.output_file}: needs about {needed / 1e9:.2f} GB of disk space, {free / 1e9:.2f} "
            "GB are free"
        )


def _unpack(sentences: Iterator, config) -> dict:
    counts = {"tokens": 0, "sentences": 0}
    with atomic_file(config.output_file) as file:
        for ids, others in sentences:
            file.write(records.record_line(ids, **(others if config.keep_others else {})))
            counts["tokens"] += len(ids)
            counts["sentences"] += 1
    return counts


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
