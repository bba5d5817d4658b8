"""Packing and unpacking keeps sentences and their other fields. A packed token takes two bytes."""

import gzip
import os
import pathlib
import re
import shutil
import types

import numpy as np
import pytest
import tokenizer_kit

from EasyLM.data import records
from EasyLM.errors import UserError
from tokenizer import pack


@pytest.fixture
def sentences(tmp_path):
    """(ids, other fields) in two files, one of them compressed; some sentences are empty or have no other fields."""
    rng = np.random.default_rng(0)
    sentences = []
    for number in range(1500):  # more than one block of packed_file
        others = {"kind": f"k{number % 3}", "sources": [f"ü/{number}.png"], "n": {"x": None}} if number % 5 else {}
        sentences.append((rng.integers(0, 8192, number % 9).tolist(), others))
    lines = [records.record_line(np.array(ids, np.int32), **others) for ids, others in sentences]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[:700]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[700:])))
    return sentences


def run(tmp_path, inputs, output, **settings) -> pathlib.Path:
    """Runs the command in a folder; returns the path of the output, the only new file."""
    paths = ",".join(str(tmp_path / name) for name in inputs.split(","))
    before = set(os.listdir(tmp_path))
    tokenizer_kit.run_main(pack, input_files=paths, output_file=str(tmp_path / output), **settings)
    assert set(os.listdir(tmp_path)) - before == {output}
    return tmp_path / output


def test_unpacked_sentences_are_equal(sentences, tmp_path):
    run(tmp_path, "a.jsonl,b.jsonl.gz", "all.packed")
    back = run(tmp_path, "all.packed", "back.jsonl", unpack=True)
    unpacked = [(ids.tolist(), record) for ids, record in records.read_records(str(back), 8192)]
    for (ids, others), (unpacked_ids, record) in zip(sentences, unpacked, strict=True):
        assert ids == unpacked_ids and record == {**others, "tokens": record["tokens"]}
    first = (tmp_path / "a.jsonl").read_bytes()
    assert back.read_bytes().startswith(first)  # the bytes of record_line


def test_other_fields_can_be_dropped(sentences, tmp_path):
    run(tmp_path, "a.jsonl", "ids.packed", keep_others=False)
    back = run(tmp_path, "ids.packed", "back.jsonl", unpack=True)
    unpacked = [(ids.tolist(), list(record)) for ids, record in records.read_records(str(back), 8192)]
    assert unpacked == [(ids, ["tokens"]) for ids, _ in sentences[:700]]


def test_a_token_takes_two_bytes(tmp_path, capsys):
    ids = np.arange(100_000) % 8192
    (tmp_path / "a.jsonl").write_bytes(records.record_line(ids) * 3)
    path = run(tmp_path, "a.jsonl", "a.packed")
    assert 2.0 <= os.path.getsize(path) / 300_000 < 2.02
    assert "3 sentences, 300000 tokens, 2.01 bytes per token" in capsys.readouterr().out


def test_bad_lines_are_reported_and_skipped(sentences, tmp_path):
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "bad.jsonl").write_bytes(b"".join([*lines[:3], b"{}\n", *lines[3:6]]))
    with pytest.raises(UserError, match=r"bad.jsonl:4: lacks the field 'tokens'"):
        run(tmp_path, "bad.jsonl", "bad.packed")
    assert not (tmp_path / "bad.packed").exists()
    run(tmp_path, "bad.jsonl", "bad.packed", max_errors=1)
    back = run(tmp_path, "bad.packed", "back.jsonl", unpack=True)
    assert back.read_bytes() == b"".join(lines[:6])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"inputs": "none.jsonl"}, "none.jsonl: no such file"),
        ({"output": "x.jsonl"}, "x.jsonl: must end in .packed"),
        ({"output": "x.packed", "unpack": True}, "a.jsonl is not a .packed file"),
        ({"inputs": "a.packed", "output": "x.packed"}, "a.packed is packed (--unpack=True"),
        ({"inputs": "a.packed", "output": "x.packed", "unpack": True}, "x.packed: must end in .jsonl"),
        ({"inputs": "a.packed", "output": "x.txt", "unpack": True}, "x.txt: must end in .jsonl with --unpack=True"),
        ({"inputs": "a.packed", "output": "x.jsonl", "unpack": True}, "a.packed: is truncated, or not of the format"),
        ({"vocab_size": 65537}, "--vocab_size=65537: must be 1..65536"),
        ({"vocab_size": 8}, r"a.jsonl:1: id 9 is outside the vocabulary 0..7"),
    ],
)
def test_invalid_settings_are_reported(tmp_path, settings, message):
    (tmp_path / "a.jsonl").write_bytes(records.record_line(np.array([9])))
    (tmp_path / "a.packed").write_bytes(b"nothing")
    names = {"inputs": "a.jsonl", "output": "x.packed"} | settings
    with pytest.raises(UserError, match=re.escape(message)):
        run(tmp_path, **names)


def test_disk_space_is_checked_first(sentences, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=9))
    with pytest.raises(UserError, match="of disk space"):
        run(tmp_path, "a.jsonl", "x.packed")


def test_needed_space_of_compressed_inputs_is_that_of_their_content(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.gz"
    ids_N = np.random.default_rng(0).integers(0, 8192, 5000)
    path.write_bytes(gzip.compress(records.record_line(ids_N)))
    free = int(1.5 * path.stat().st_size)
    monkeypatch.setattr(shutil, "disk_usage", lambda directory: types.SimpleNamespace(free=free))
    with pytest.raises(UserError, match="of disk space"):
        run(tmp_path, "a.jsonl.gz", "x.packed")
