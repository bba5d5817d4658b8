"""Kinds: JSONL lines, compressed files, packed files and indexes, read by the trainer's pipeline or a command.

The reference reads with the standard library.
"""

import base64
import gzip
import json
import pathlib
import shutil
import zlib
from typing import Any

import numpy as np
import zstandard

from campaign.attempts import Attempt, require, require_equal
from campaign.mutations import mutated, mutated_json
from EasyLM import flags
from EasyLM.data import DATASET_FLAGS, make_dataset, packed_file, records
from tokenizer import mix, pack

_VOCABULARY, _LINES = 512, 12
_SEQUENCE = 8
_MAGIC_BYTES = 3  # the first bytes of a compressed file
# Field lists, and the ids that each puts before and after those of a line.
_FIELDS: dict[str, tuple[list[int], list[int]]] = {"{tokens}": ([], []), "<|3|>,{tokens},<|4|>": ([3], [4])}


def lines(folder: pathlib.Path) -> Attempt:
    """JSONL files with mutated lines."""
    whole = sentence_lines(np.random.default_rng(0))

    def attempt(rng: np.random.Generator, case: pathlib.Path) -> None:
        changed = list(whole)
        for _ in range(int(rng.integers(1, 4))):
            number = int(rng.integers(len(changed)))
            if rng.random() < 0.5:
                changed[number] = mutated_json(rng, json.loads(whole[number])) + b"\n"
            else:
                changed[number] = mutated(rng, changed[number])
        path = case / "lines.jsonl"
        path.write_bytes(b"".join(changed) if rng.random() < 0.9 else mutated(rng, b"".join(changed)))
        content = [line for line in path.read_bytes().split(b"\n") if line.strip()]
        good = [ids for line in content if (ids := _ids(line)) is not None]
        if rng.random() < 0.5:
            _check_stream(path, good, len(content) - len(good), str(rng.choice([*_FIELDS])), rng.random() < 0.7)
        else:
            _check_mixture(path, [line.rstrip(b"\r") for line in content if _ids(line) is not None])

    return attempt


def compressed(folder: pathlib.Path) -> Attempt:
    """Mutated .gz and .zst files."""
    whole = b"".join(sentence_lines(np.random.default_rng(0)))
    files = {
        ".gz": gzip.compress(whole),
        ".zst": zstandard.ZstdCompressor(write_checksum=True).compress(whole),
    }

    def attempt(rng: np.random.Generator, case: pathlib.Path) -> None:
        ending = str(rng.choice([*files]))
        path = case / f"lines.jsonl{ending}"
        path.write_bytes(mutated(rng, files[ending]))
        # Both formats allow a file after a file. The headers of both may differ, as in a time that is not checked.
        times = path.read_bytes().count(files[ending][:_MAGIC_BYTES])
        repeated = times > 1 and _decompressed(path) == times * whole
        _check_mixture(path, whole.splitlines() * (times if repeated else 1))

    return attempt


def _decompressed(path: pathlib.Path) -> bytes | None:
    """Returns the content of a .gz or .zst file; None if it is damaged."""
    try:
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes())
        return zstandard.ZstdDecompressor().stream_reader(path.read_bytes(), read_across_frames=True).read()
    except (OSError, EOFError, zlib.error, zstandard.ZstdError):
        return None


def packed(folder: pathlib.Path) -> Attempt:
    """Mutated packed files."""
    (folder / "lines.jsonl").write_bytes(b"".join(sentence_lines(np.random.default_rng(0))))
    run_command(pack, input_files=folder / "lines.jsonl", output_file=folder / "lines.packed", vocab_size=_VOCABULARY)
    whole = (folder / "lines.packed").read_bytes()
    expected = list(packed_file.read(str(folder / "lines.packed"), _VOCABULARY))

    def attempt(rng: np.random.Generator, case: pathlib.Path) -> None:
        path = case / "lines.packed"
        path.write_bytes(mutated(rng, whole))
        if rng.random() < 0.5:
            _check_stream(path, [ids.astype(np.int32) for ids, _ in expected], 0, str(rng.choice([*_FIELDS])), False)
            return
        got = list(packed_file.read(str(path), _VOCABULARY))
        require_equal(len(got), len(expected), "sentences")
        for number, (sentence, right) in enumerate(zip(got, expected, strict=True)):
            require_equal(sentence[0], right[0], f"ids of sentence {number}")
            require_equal(sentence[1], right[1], f"other fields of sentence {number}")

    return attempt


def indexes(folder: pathlib.Path) -> Attempt:
    """Mutated indexes of a JSONL file. A damaged index is built again."""
    path = folder / "lines.jsonl"
    path.write_bytes(b"".join(sentence_lines(np.random.default_rng(0))))
    _stream(path, "{tokens}", False)
    (index,) = folder.glob("*.index")
    good = [ids for line in path.read_bytes().splitlines() if (ids := _ids(line)) is not None]

    def attempt(rng: np.random.Generator, case: pathlib.Path) -> None:
        shutil.copy2(path, case)  # with the time that the index records
        (case / index.name).write_bytes(mutated(rng, index.read_bytes()))
        _check_stream(case / path.name, good, 0, "{tokens}", False)

    return attempt


def run_command(module: Any, **settings: Any) -> None:
    """Validates the flags of a command and runs its `main`. `settings` replace defaults."""
    config = flags.defaults(module.FLAGS)
    config.update({name: str(value) if isinstance(value, pathlib.Path) else value for name, value in settings.items()})
    flags.validate(module.FLAGS, config)
    module.main(config)


def sentence_lines(rng: np.random.Generator) -> list[bytes]:
    """Returns records with different numbers of ids, some of which are not multiples of three."""
    return [
        records.record_line(rng.integers(0, _VOCABULARY, 16 + i), kind="paired", sources=["a.png", f"{i}.png"], n=i)
        for i in range(_LINES)
    ]


def _ids(line: bytes) -> np.ndarray | None:
    """Returns the ids of a line, or None if it is no record, with the standard library alone."""

    def finite(text: str) -> float:
        if not np.isfinite(number := float(text)):
            raise ValueError(f"{text} is not a number of JSON, or too large for a double")
        return number

    try:
        value = json.loads(line.decode(), parse_constant=finite, parse_int=finite, parse_float=finite)
        json.dumps(value, ensure_ascii=False).encode()  # refuses lone surrogates, which UTF-8 cannot encode
        if len(value["tokens"]) % 4:
            raise ValueError("b64decode accepts superfluous padding, RFC 4648 does not")
        ids = np.frombuffer(base64.b64decode(value["tokens"], validate=True), "<i4")
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return ids if not ids.size or (ids.min() >= 0 and ids.max() < _VOCABULARY) else None


def _stream(path: pathlib.Path, fields: str, skip_bad_lines: bool) -> Any:
    config = flags.defaults(DATASET_FLAGS)
    config.text_processor.fields = fields
    config.json_dataset.update(
        path=str(path), seq_length=_SEQUENCE, batch_size=1, skip_bad_lines=skip_bad_lines and path.suffix == ".jsonl"
    )
    return make_dataset(config, None, _VOCABULARY)


def _check_stream(path: pathlib.Path, good: list[np.ndarray], num_bad: int, fields: str, skip_bad_lines: bool) -> None:
    """Reads all rows of a file as the trainer does, and compares them with the ids of its good lines."""
    rows = _stream(path, fields, skip_bad_lines)
    before, after = _FIELDS[fields]
    expected = np.concatenate([np.concatenate([before, ids, after]).astype(np.int32) for ids in good])
    require_equal(rows.skipped_lines, num_bad, "skipped lines")
    require_equal(rows.num_tokens, len(expected), "number of tokens")
    count = -(-len(expected) // _SEQUENCE)
    tokens = rows.rows(0, count)["input_tokens"].reshape(-1)
    require_equal(tokens, np.resize(expected, len(tokens)), "tokens")


def _check_mixture(path: pathlib.Path, good: list[bytes]) -> None:
    """Mixes a file, and compares the mixture with its good lines."""
    output = path.with_name("mixture.jsonl")
    run_command(mix, inputs=path, output_file=output, vocab_size=_VOCABULARY, max_errors=10**6)
    require(output.exists(), "no output")
    require_equal(sorted(output.read_bytes().splitlines()), sorted(good), "lines of the mixture")
