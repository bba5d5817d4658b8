"""Measures the rate and the memory of reading rows: `python scripts/bench_data.py` on an idle machine.

Writes a file of random sentences and prints each measurement with its bound:
- the rate of building the index on one core;
- the rate of indexed rows in order, relative to a plain loop (json.loads, base64.b64decode, numpy);
- the rate of rows of the packed file (tokenizer.pack), relative to a copy of its memory-mapped ids;
- the rates of shuffled rows of both files, where computing the order takes most of the time;
- the peak memory of a process that indexes and reads the file, beyond that of the interpreter.
The two sides of a relative rate alternate over the same lines. Shorter lines lower all rates.
"""

import base64
import json
import os
import re
import subprocess
import sys
import tempfile
import time

import numpy as np
from ml_collections import ConfigDict

from EasyLM.data import packed_file, records
from EasyLM.data.dataset import DATASET_FLAGS, make_dataset
from EasyLM.data.token_rows import TokenRows
from EasyLM.flags import Flag, defaults, run
from EasyLM.storage import open_columns
from EasyLM.vocab import CODEBOOK_SIZE, VOCAB_SIZE

SEQ_LENGTH = 4096
BATCH = 32
TURNS = 8  # the plain loop and the rows alternate, so that other load on the machine slows both

FLAGS = {
    "megabytes": Flag(1100, "Size of the file.", least=1),
    "tokens_per_line": Flag(4096, "Average length of a sentence; 16 images of 256 tokens are 4096.", least=4),
    "directory": Flag("", "Directory of the temporary file; empty: the system's."),
    "read_only": Flag("", "Index and read this file and print the memory; the benchmark runs itself with this flag."),
}


def main(config: ConfigDict) -> None:
    """Prints each measurement with its bound. Exits with code 1 if one is missed."""
    if config.read_only:
        read_all(rows_of(config.read_only))
        with open("/proc/self/status") as status:
            print(status.read())
        return
    with tempfile.TemporaryDirectory(dir=config.directory or None) as directory:
        path = os.path.join(directory, "sentences.jsonl")
        write_sentences(path, config.megabytes * 1e6, config.tokens_per_line)
        memory = memory_beyond_interpreter(path)
        for name in os.listdir(directory):
            if name.endswith(".index"):
                os.unlink(os.path.join(directory, name))
        begin = time.perf_counter()
        source = rows_of(path)
        index_rate = os.path.getsize(path) / 1e6 / (time.perf_counter() - begin)
        plain, ours = rates(path, source)
        packed_path = os.path.join(directory, "sentences.packed")
        packed_file.write(packed_path, [(path, records.read_records(path, CODEBOOK_SIZE))], keep_others=True)
        copied, in_order = packed_rates(packed_path)
        shuffled = {name: shuffled_rate(file) for name, file in (("JSONL", path), ("packed", packed_path))}
    met = [
        report("index", index_rate, "MB/s", at_least=300),
        report(f"rows ({ours:.0f} against {plain:.0f} million tokens/s)", ours / plain, "x a plain loop", at_least=7),
        report(f"packed rows ({in_order:.0f} against {copied:.0f})", in_order / copied, "x a copy", at_least=0.5),
        *(report(f"shuffled, {name}", rate, "million tokens/s", at_least=20) for name, rate in shuffled.items()),
        report("memory beyond the interpreter", memory, "MB", at_most=200),
    ]
    sys.exit(0 if all(met) else 1)


def write_sentences(path: str, size: float, tokens_per_line: int) -> None:
    """Writes at least `size` bytes of random sentences."""
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        while file.tell() < size:
            length = rng.integers(tokens_per_line * 3 // 4, tokens_per_line * 5 // 4 + 1)
            file.write(records.record_line(rng.integers(0, CODEBOOK_SIZE, length)))


def rows_of(path: str, shuffle_seed: int = -1) -> TokenRows:
    """Returns the row source of a file."""
    config = defaults(DATASET_FLAGS)
    config.text_processor.fields = "{tokens}"
    config.json_dataset.update(path=path, seq_length=SEQ_LENGTH, batch_size=BATCH, shuffle_seed=shuffle_seed)
    return make_dataset(config, None, VOCAB_SIZE)


def read_all(source: TokenRows) -> None:
    """Reads one epoch of rows."""
    for row in range(0, source.rows_per_epoch, BATCH):
        source.rows(row, BATCH)


def rates(path: str, source: TokenRows) -> tuple[float, float]:
    """Returns millions of tokens per second of the plain loop and of the row source, which alternate over the file."""
    tokens, seconds = np.zeros(2), np.zeros(2)
    with open(path) as lines:
        for turn in range(TURNS):
            begin = time.perf_counter()
            while tokens[0] < source.num_tokens * (turn + 1) / TURNS:
                tokens[0] += len(np.frombuffer(base64.b64decode(json.loads(lines.readline())["tokens"]), "<i4"))
            middle = time.perf_counter()
            while tokens[1] < source.num_tokens * (turn + 1) / TURNS:
                tokens[1] += source.rows(int(tokens[1]) // SEQ_LENGTH, BATCH)["input_tokens"].size
            seconds += middle - begin, time.perf_counter() - middle
    plain, ours = tokens / seconds / 1e6
    return plain, ours


def shuffled_rate(path: str) -> float:
    """Returns millions of tokens per second of shuffled rows."""
    source = rows_of(path, shuffle_seed=0)
    begin = time.perf_counter()
    read_all(source)
    return source.num_tokens / (time.perf_counter() - begin) / 1e6


def packed_rates(path: str) -> tuple[float, float]:
    """Returns millions of tokens per second of copying mapped ids to int32 and of the row source, which alternate."""
    source = rows_of(path)
    ids = open_columns(path).arrays["ids"]
    batches = len(ids) // (BATCH * SEQ_LENGTH)
    seconds = np.zeros(2)
    for batch in range(batches):
        begin = time.perf_counter()
        ids[batch * BATCH * SEQ_LENGTH : (batch + 1) * BATCH * SEQ_LENGTH].astype(np.int32)
        middle = time.perf_counter()
        source.rows(batch * BATCH, BATCH)
        seconds += middle - begin, time.perf_counter() - middle
    copied, in_order = batches * BATCH * SEQ_LENGTH / seconds / 1e6
    return copied, in_order


def memory_beyond_interpreter(path: str) -> float:
    """Returns the peak megabytes of a process that indexes and reads the file, less those of a bare interpreter."""
    bare = [sys.executable, "-c", "print(open('/proc/self/status').read())"]
    reader = [sys.executable, __file__, f"--read_only={path}"]
    return (_peak_kilobytes(reader) - _peak_kilobytes(bare)) * 1024 / 1e6


def _peak_kilobytes(command: list[str]) -> int:
    """Returns VmHWM of a command that prints /proc/self/status. (ru_maxrss includes memory of the parent process.)"""
    status = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    match = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert match, status
    return int(match[1])


def report(name: str, value: float, unit: str, at_least: float = -np.inf, at_most: float = np.inf) -> bool:
    """Prints a measurement with its bound. Returns whether the bound is met."""
    met = at_least <= value <= at_most
    bound = f"at least {at_least}" if at_most == np.inf else f"at most {at_most}"
    print(f"{name}: {value:.1f} {unit} (required: {bound}) {'ok' if met else 'MISSED'}")
    return met


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
