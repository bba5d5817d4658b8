"""How fast JSONL becomes rows, and in how much memory: `python scripts/bench_data.py` on an idle machine.

Writes a file of random sentences, then prints one line for each figure with its bound: the rate of building the index
on one core; the rate of reading rows in order, once indexed, over that of a plain loop (json.loads, base64.b64decode,
numpy), both over the same lines in turn; the rate of rows of the same file packed (tokenizer.pack), over that of
copying its memory-mapped ids, in turn; the rate of shuffled rows of either, for which drawing the order counts most;
and the peak memory of a process that indexes and reads, beyond a bare Python. The shorter the lines, the more Python's
own work a line counts, in all rates.
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

from EasyLM import flags
from EasyLM.data import packed_file, records
from EasyLM.data.dataset import DATASET_FLAGS, make_dataset
from EasyLM.flags import Flag
from EasyLM.storage import open_columns
from EasyLM.vocab import CODEBOOK_SIZE, VOCAB_SIZE

SEQ_LENGTH = 4096
BATCH = 32
TURNS = 8  # in which plain loop and rows alternate, so that a disturbance of the machine meets both

DEFINITIONS = {
    "megabytes": Flag(1100, "Size of the file."),
    "tokens_per_line": Flag(4096, "Average length of a sentence; 16 images of 256 tokens are 4096."),
    "directory": Flag("", "Where the file is put for the time of the benchmark; empty: the system's place for such."),
    "read_only": Flag("", "Used by the benchmark itself: index and read this file, and print what memory that took."),
}


def main(config) -> None:
    """Prints each figure with its bound; exits with code 1 if one is missed."""
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
        shuffled = {name: shuffled_rate(at) for name, at in (("JSONL", path), ("packed", packed_path))}
    met = [
        report("index", index_rate, "MB/s", at_least=300),
        report(f"rows ({ours:.0f} against {plain:.0f} million tokens/s)", ours / plain, "x a plain loop", at_least=7),
        report(f"packed rows ({in_order:.0f} against {copied:.0f})", in_order / copied, "x a copy", at_least=0.5),
        *(report(f"shuffled, {name}", rate, "million tokens/s", at_least=20) for name, rate in shuffled.items()),
        report("memory beyond the interpreter", memory, "MB", at_most=200),
    ]
    sys.exit(0 if all(met) else 1)


def write_sentences(path: str, size: float, tokens_per_line: int) -> None:
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        while file.tell() < size:
            length = rng.integers(tokens_per_line * 3 // 4, tokens_per_line * 5 // 4 + 1)
            file.write(records.record_line(rng.integers(0, CODEBOOK_SIZE, length)))


def rows_of(path: str, shuffle_seed: int = -1):
    config = flags.defaults(DATASET_FLAGS)
    config.text_processor.fields = "{tokens}"
    config.json_dataset.update(path=path, seq_length=SEQ_LENGTH, batch_size=BATCH, shuffle_seed=shuffle_seed)
    return make_dataset(config, None, VOCAB_SIZE)


def read_all(source) -> None:
    for row in range(0, source.rows_per_epoch, BATCH):
        source.rows(row, BATCH)


def rates(path: str, source) -> tuple[float, float]:
    """Million tokens a second of the plain loop and of the row source, over the same parts of the file in turn."""
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
    return tuple(tokens / seconds / 1e6)


def shuffled_rate(path: str) -> float:
    """Million tokens a second of the row source, in a random order."""
    source = rows_of(path, shuffle_seed=0)
    begin = time.perf_counter()
    read_all(source)
    return source.num_tokens / (time.perf_counter() - begin) / 1e6


def packed_rates(path: str) -> tuple[float, float]:
    """Million tokens a second of copying the mapped ids to int32, a batch at a time, and of the row source, in turn."""
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
    return tuple(batches * BATCH * SEQ_LENGTH / seconds / 1e6)


def memory_beyond_interpreter(path: str) -> float:
    """Megabytes at the peak of a process that indexes and reads the whole file, less those of one that does nothing."""
    bare = [sys.executable, "-c", "print(open('/proc/self/status').read())"]
    reader = [sys.executable, __file__, f"--read_only={path}"]
    # VmHWM, the most that was resident. (ru_maxrss begins with the memory of the process that started this one.)
    empty, full = (
        int(
            re.search(r"VmHWM:\s*(\d+) kB", subprocess.run(command, check=True, capture_output=True, text=True).stdout)[
                1
            ]
        )
        for command in (bare, reader)
    )
    return (full - empty) * 1024 / 1e6


def report(name: str, value: float, unit: str, at_least: float = -np.inf, at_most: float = np.inf) -> bool:
    """Prints a figure with its bound; returns whether it is met."""
    met = at_least <= value <= at_most
    bound = f"at least {at_least}" if at_most == np.inf else f"at most {at_most}"
    print(f"{name}: {value:.1f} {unit} (required: {bound}) {'ok' if met else 'MISSED'}")
    return met


def cli() -> None:
    """Runs the command with the flags of the command line."""
    flags.run(main, DEFINITIONS)


if __name__ == "__main__":
    cli()
