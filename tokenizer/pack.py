"""Packs JSONL files, or unpacks packed ones: `python -m tokenizer.pack --input_files=a.jsonl --output_file=a.packed`.

A packed file takes two bytes per token instead of 5.33, and needs no index. The trainer, `tokenizer.inspect` and
`tokenizer.detokenize` read it in place of the JSONL file. Several files become one, in the given order.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from EasyLM.data import packed_file, records
from EasyLM.data.tokenizer_names import TOKENIZER_KEY
from EasyLM.errors import UserError, prefix_errors
from EasyLM.flags import Flag, run
from EasyLM.progress import progress
from EasyLM.skipped_inputs import SkippedInputs
from EasyLM.storage import atomic_file, expand_paths, file_version, is_compressed, lock_output
from EasyLM.vocab import NUM_SPECIAL_IDS, VOCAB_SIZE
from tokenizer.sentence_files import read_sentences
from tokenizer.sentence_files.disk_space import check_disk_space
from tokenizer.sentence_files.parts import check_parts

_DECOMPRESSED = 4  # approximate bytes of JSONL per byte of .gz or .zst: an id takes 43 bits, 13 of them information
# Bytes on disk per byte of input. Packing writes 2 bytes per 5.33 bytes of JSONL twice: as columns, then joined.
# Unpacking writes 5.33 bytes per 2.
_PACKED_SHARE, _UNPACKED_SHARE = 0.8, 3.0

FLAGS = {
    "input_files": Flag(
        "", "JSONL files, also .gz and .zst, or packed files: a comma list of paths and globs.", required=True
    ),
    "output_file": Flag(
        "", f"The *{packed_file.ENDING} file, or *.jsonl with --unpack; written atomically.", required=True
    ),
    "unpack": Flag(False, "Convert packed files to JSONL."),
    "keep_others": Flag(True, "Keep the fields of the records besides the tokens and the tokenizer."),
    "vocab_size": Flag(
        VOCAB_SIZE,
        f"Ids must be below it: codes, and {NUM_SPECIAL_IDS} special ids. They take two bytes.",
        least=1,
        most=packed_file.LARGEST_ID + 1,
    ),
    "max_errors": Flag(0, "Maximum number of bad lines to skip; each is reported.", least=0),
}


def main(config: ConfigDict) -> None:
    """Packs or unpacks the files, and prints the size of the result."""
    paths = _input_paths(config)
    with lock_output(config.output_file, "output_file"):
        _write(paths, config)


def _write(paths: Sequence[str], config: ConfigDict) -> None:
    with prefix_errors("--output_file", separator="="):
        check_disk_space(config.output_file, _needed_space(paths, config.unpack))
    skipped = SkippedInputs(config.max_errors)
    with progress(unit=" sentences", desc="unpacking" if config.unpack else "packing") as bar:

        def sentences(path: str) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
            for sentence in read_sentences(path, config.vocab_size, skipped.add):
                bar.update()
                yield sentence

        if config.unpack:
            unpacked = (sentence for path in paths for sentence in sentences(path))
            counts = unpack(unpacked, config.output_file, config.keep_others)
        else:
            sources = ((path, sentences(path)) for path in paths)
            counts = packed_file.write(config.output_file, sources, config.keep_others)
    bytes_per_token = os.path.getsize(config.output_file) / max(counts["tokens"], 1)
    bad_lines = f", {len(skipped)} bad lines skipped" if len(skipped) else ""
    print(
        f"{config.output_file}: {counts['sentences']} sentences, {counts['tokens']} tokens, "
        f"{bytes_per_token:.2f} bytes per token{bad_lines}"
    )


def unpack(sentences: Iterator[tuple[np.ndarray, dict[str, Any]]], path: str, keep_others: bool) -> dict[str, int]:
    """Atomically writes (ids, other fields) of sentences as JSONL; returns {"tokens", "sentences"}."""
    counts = {"tokens": 0, "sentences": 0}
    with atomic_file(path) as file:
        for ids, others in sentences:
            kept = others if keep_others else {key: others[key] for key in (TOKENIZER_KEY,) if key in others}
            file.write(records.record_line(ids, **kept))
            counts["tokens"] += len(ids)
            counts["sentences"] += 1
    return counts


def _input_paths(config: ConfigDict) -> list[str]:
    """Returns the input files. Raises UserError unless inputs and output have the forms that --unpack requires."""
    paths = expand_paths("input_files", config.input_files)
    for path in paths:
        if packed_file.is_packed(path) != config.unpack:
            reason = f"is not a {packed_file.ENDING} file" if config.unpack else "is packed (--unpack=True unpacks it)"
            raise UserError(f"--input_files={config.input_files}: {path} {reason}")
    ending = ".jsonl" if config.unpack else packed_file.ENDING
    if not config.output_file.endswith(ending):
        raise UserError(f"--output_file={config.output_file}: must end in {ending} with --unpack={config.unpack}")
    with prefix_errors(f"--input_files={config.input_files}"):
        check_parts(paths)
    return paths


def _needed_space(paths: Sequence[str], is_unpacking: bool) -> int:
    """Estimates the disk space in bytes that the output needs."""
    sizes = sum(file_version(path)["size"] * (_DECOMPRESSED if is_compressed(path) else 1) for path in paths)
    return int(sizes * (_UNPACKED_SHARE if is_unpacking else _PACKED_SHARE))


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
