"""Mixing keeps every sentence, all orders are equally likely, memory is bounded, and bad lines have an address."""

import collections
import gzip
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
import types

import numpy as np
import pytest
import tokenizer_kit
import zstandard

from EasyLM.data import mixture, records
from EasyLM.errors import UserError
from EasyLM.storage import read_lines
from tokenizer import mix
from tokenizer.sentence_files import disk_shuffle, mixing


def sentence(source: int, number: int) -> bytes:
    """Returns a line whose ids identify it. Lines differ in length."""
    return records.record_line([source, number, *range(number % 7)], kind="k", sources=[f"{source}/é{number}"])


def write(path, source: int, count: int) -> list[bytes]:
    """Writes a file of `sentence`s, compressed as its extension says; returns the lines."""
    lines = [sentence(source, number) for number in range(count)]
    data = b"".join(lines)
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(compress(data))
    return lines


def mixed(tmp_path, inputs, **settings) -> list[bytes]:
    """Runs the command; returns the lines of its output."""
    paths = ",".join(str(tmp_path / name) for name in inputs.split(","))
    tokenizer_kit.run_main(mix, inputs=paths, output_file=str(tmp_path / "out" / "m.jsonl"), **settings)
    assert [name for name in os.listdir(tmp_path / "out") if name != "m.jsonl"] == []
    return (tmp_path / "out" / "m.jsonl").read_bytes().splitlines(keepends=True)


class TestTakenSentences:
    def test_every_sentence_once(self, tmp_path):
        """Inputs are plain and compressed files and globs. Blank lines and carriage returns are ignored."""
        lines = [
            *write(tmp_path / "a.jsonl", 0, 40),
            *write(tmp_path / "b1.jsonl.gz", 1, 30),
            *write(tmp_path / "b2.jsonl.zst", 2, 20),
        ]
        (tmp_path / "c.jsonl").write_bytes(sentence(3, 0).replace(b"\n", b"\r\n\n \n") + sentence(3, 1).rstrip(b"\n"))
        lines_out = mixed(tmp_path, "a.jsonl,b*,c.jsonl", output_json=str(tmp_path / "report.json"))
        assert collections.Counter(lines_out) == collections.Counter([*lines, sentence(3, 0), sentence(3, 1)])
        report = json.loads((tmp_path / "report.json").read_text())
        assert [(part["files"], part["sentences"], part["taken"]) for part in report["inputs"]] == [
            (1, 40, 40),
            (2, 50, 50),
            (1, 2, 2),
        ]

    @pytest.mark.parametrize(
        "settings, taken",
        [
            ({"counts": "10,45"}, (10, 45)),
            ({"counts": "0,20"}, (0, 20)),
            ({"weights": "1,1"}, (20, 20)),  # no sentence twice
            ({"weights": "3,1"}, (40, 13)),
            ({"weights": "0,2.5"}, (0, 20)),
            ({"weights": "1,2", "total": 100}, (33, 67)),
        ],
    )
    def test_weights_and_counts(self, tmp_path, settings, taken):
        """Each sentence of an input is taken floor or ceil of taken/size times; the total is exact."""
        write(tmp_path / "a.jsonl", 0, 40)
        write(tmp_path / "b.jsonl", 1, 20)
        counts = collections.Counter(mixed(tmp_path, "a.jsonl,b.jsonl", **settings))
        for source, (count, size) in enumerate(zip(taken, (40, 20))):
            times = [counts.pop(sentence(source, number), 0) for number in range(size)]
            assert sum(times) == count
            assert set(times) <= {count // size, -(-count // size)}
        assert not counts

    def test_taken_sentences_are_a_uniform_choice(self, tmp_path):
        write(tmp_path / "a.jsonl", 0, 10)
        source = mixing.Source("a", [str(tmp_path / "a.jsonl")], sentences=10, taken=3)
        counts, runs = collections.Counter(), 3000
        for seed in range(runs):
            lines = [line for _, line in mixing.keyed_lines([source], seed)]
            assert len(set(lines)) == 3
            counts.update(lines)
        expected = runs * 3 / 10
        chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
        assert len(counts) == 10 and chi_square < 9 + 5 * np.sqrt(18)


class TestOrder:
    def test_orders_are_equally_likely(self, tmp_path):
        """Chi-square over the 24 orders of 4 sentences of two files."""
        write(tmp_path / "a.jsonl", 0, 3)
        write(tmp_path / "b.jsonl", 1, 1)
        sources = [
            mixing.Source("a", [str(tmp_path / "a.jsonl")], sentences=3, taken=3),
            mixing.Source("b", [str(tmp_path / "b.jsonl")], sentences=1, taken=1),
        ]
        orders, runs = collections.Counter(), 2400
        for seed in range(runs):
            keyed = mixing.keyed_lines(sources, seed)
            orders[tuple(disk_shuffle.sort_by_key(keyed, 0, 1, ""))] += 1
        expected = runs / 24
        chi_square = sum((count - expected) ** 2 / expected for count in orders.values())
        assert len(orders) == 24 and abs(chi_square - 23) < 5 * np.sqrt(46)

    def test_the_order_does_not_depend_on_the_memory_limit(self, tmp_path):
        """Sorting in memory and with one or several levels of files gives the same lines."""
        lines = [sentence(0, number) for number in range(500)]
        total = sum(map(len, lines))
        keys = np.random.default_rng(0).integers(0, 1 << 64, len(lines), np.uint64).tolist()
        keys[10:20] = [keys[0]] * 10  # equal keys keep their order
        expected = [line for _, line in sorted(zip(keys, lines), key=lambda pair: pair[0])]
        for memory in (10 * total, total - 1, total // 5, total // 300, 1):
            assert list(disk_shuffle.sort_by_key(zip(keys, lines), total, memory, str(tmp_path))) == expected
            assert not os.listdir(tmp_path)

    def test_the_order_follows_from_the_seed(self, tmp_path):
        write(tmp_path / "a.jsonl", 0, 60)
        first, again, other = (mixed(tmp_path, "a.jsonl", seed=seed) for seed in (1, 1, 2))
        assert first == again != other
        positions = [first.index(line) for line in other]
        assert abs(np.corrcoef(positions, range(60))[0, 1]) < 0.5


class TestErrors:
    def test_bad_lines_are_reported_by_address(self, tmp_path):
        lines = write(tmp_path / "a.jsonl", 0, 10)
        broken = [*lines[:4], b"{\n", b"\n", *lines[4:7], b'{"tokens": "AAAAAQ=="}\n', *lines[7:]]
        (tmp_path / "a.jsonl").write_bytes(b"".join(broken))
        with pytest.raises(UserError, match=r"a.jsonl:5: not JSON .* \(--max_errors=0"):
            mixed(tmp_path, "a.jsonl")
        with pytest.raises(UserError, match=r"a.jsonl:10: id 16777216 is outside .*, after 1 others \(--max_errors=1"):
            mixed(tmp_path, "a.jsonl", max_errors=1)
        assert not os.listdir(tmp_path / "out")
        assert sorted(mixed(tmp_path, "a.jsonl", max_errors=2)) == sorted(lines)

    @pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
    def test_truncated_and_corrupt_compressed_files_are_reported(self, tmp_path, name):
        write(tmp_path / name, 0, 500)
        whole = (tmp_path / name).read_bytes()
        for damaged in (whole[: len(whole) // 2], b"no packed file", whole[:40] + b"????" + whole[44:]):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(UserError, match=rf"^{tmp_path / name}:"):
                mixed(tmp_path, name)

    def test_disk_space_is_checked_first(self, tmp_path, monkeypatch):
        write(tmp_path / "a.jsonl", 0, 60)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
        with pytest.raises(UserError, match=r"--output_file=.*: needs about 0.02 GB of disk space, 0.00 GB are free"):
            mixed(tmp_path, "a.jsonl")
        assert not os.listdir(tmp_path / "out")

    def test_a_failure_leaves_no_file(self, tmp_path, monkeypatch):
        write(tmp_path / "a.jsonl", 0, 60)

        def first_lines(source):
            return (line for _, line in itertools.islice(read_lines(source.paths[0]), 5))

        monkeypatch.setattr(mixing, "_good_lines", first_lines)
        with pytest.raises(UserError, match="changed while it was read"):
            mixed(tmp_path, "a.jsonl")
        assert not os.listdir(tmp_path / "out")

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"inputs": "none.jsonl"}, "no such file"),
            ({"inputs": "*.txt"}, "no file matches"),
            ({"inputs": "a.packed"}, "a.packed is packed: unpack it first (tokenizer.pack --unpack)"),
            ({"weights": "1"}, "--weights=1: 1 numbers for 2 inputs"),
            ({"weights": "1,x"}, "--weights=1,x: not a comma list of numbers"),
            ({"weights": "0,0"}, "--weights=0,0: none may be negative, and not all may be 0"),
            ({"counts": "-1,2"}, "--counts=-1,2: none may be negative"),
            ({"counts": "1.5,2"}, "--counts=1.5,2: not a comma list of whole numbers"),
            ({"counts": "1,1", "weights": "1,1"}, "give one of them"),
            ({"total": 5}, "--total=5: requires --weights"),
            ({"seed": -1}, "--seed=-1: must be at least 0"),
            ({"output": "a.jsonl"}, "a.jsonl: is an input of this command"),
            ({"output_json": "m.jsonl"}, "--output_json=m.jsonl: is an input of this command"),
            ({"output": "m.jsonl.gz"}, "must be a plain file"),
            ({"memory_mb": 0}, "--memory_mb=0: must be at least 1"),
            ({"output_json": "/dev/null/f.json"}, "--output_json=/dev/null/f.json: cannot be written"),
        ],
    )
    def test_invalid_settings_are_reported(self, tmp_path, monkeypatch, settings, message):
        monkeypatch.chdir(tmp_path)
        for number, name in enumerate("ab"):
            write(tmp_path / f"{name}.jsonl", number, 2)
        (tmp_path / "a.packed").touch()
        inputs = ",".join(str(tmp_path / name) for name in settings.pop("inputs", "a.jsonl,b.jsonl").split(","))
        output = str(tmp_path / settings.pop("output", "m.jsonl"))
        with pytest.raises(UserError, match=re.escape(message)):
            tokenizer_kit.run_main(mix, inputs=inputs, output_file=output, **settings)


@pytest.mark.parametrize("total", [0, 1, 7, 1000])
def test_proportional_numbers(total):
    rng = np.random.default_rng(total)
    for _ in range(50):
        weights = rng.uniform(0, 5, rng.integers(1, 9)).tolist()
        numbers = mixture.proportional(total, weights)
        assert sum(numbers) == total
        shares = total * np.array(weights) / sum(weights)
        assert (np.abs(numbers - shares) < 1).all()


def test_short_lines_have_little_overhead_in_memory(tmp_path):
    count, line = 50_000, b"x" * 29
    tracemalloc.start()
    try:
        keyed = ((i * 2**40 + 2**39, line) for i in range(count))
        lines = disk_shuffle.sort_by_key(keyed, count * 29, 10**9, str(tmp_path))
        assert sum(map(len, lines)) == count * 29
        assert tracemalloc.get_traced_memory()[1] < 3.5 * count * 29
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    """With 300 MB of sentences and a limit of 30 MB the process uses less than 160 MB, 60 for Python and NumPy."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 8192, (64, 4096))
    with open(tmp_path / "a.jsonl", "wb") as file:
        for number in range(300_000_000 // 21_900):
            file.write(records.record_line(ids[number % 64], number=number))
    program = f"""
import re, sys
sys.argv = ["mix", "--inputs={tmp_path}/a.jsonl", "--output_file={tmp_path}/m.jsonl", "--memory_mb=30"]
from EasyLM.flags import run
from tokenizer import mix
assert "jax" not in sys.modules
try:
    run(mix.main, mix.FLAGS)
finally:
    print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""
    process = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    peak = int(process.stdout.split()[-1]) / 1000
    print(f"{peak:.0f} MB at the peak")
    assert peak < 160
    numbers = [record["number"] for _, record in records.read_records(str(tmp_path / "m.jsonl"), 8192)]
    assert sorted(numbers) == list(range(len(numbers))) != numbers


def test_sentences_of_two_tokenizers_are_not_mixed(tmp_path, capsys):
    for name in ("aa", "bb", None):
        others = {"tokenizer": name} if name else {}
        (tmp_path / f"{name}.jsonl").write_bytes(records.record_line([1] * 4, **others) * 3)
    output = tmp_path / "out.jsonl"
    inputs = [str(tmp_path / f"{name}.jsonl") for name in ("aa", "bb", None)]
    with pytest.raises(UserError, match=r"bb\.jsonl:1: tokens of the tokenizer bb, but .*aa\.jsonl:1 are of aa"):
        tokenizer_kit.run_main(mix, inputs=",".join(inputs), output_file=str(output))
    assert not output.exists()
    tokenizer_kit.run_main(mix, inputs=",".join(inputs[1:]), output_file=str(output))
    assert "warning: 3 sentences do not name their tokenizer; the others name bb" in capsys.readouterr().out
    names = [record.get("tokenizer") for _, record in records.read_records(str(output), 8292)]
    assert sorted(map(str, names)) == ["None"] * 3 + ["bb"] * 3
