"""Packing: the same sentences come back, whatever rides along; two bytes a token. (Rows: tests/test_data.py.)"""

import gzip
import os
import pathlib
import re
import types

import numpy as np
import pytest
import tokenizer_kit

from EasyLM.data import records
from EasyLM.errors import UserError
from tokenizer import pack


@pytest.fixture
def sentences(tmp_path):
    """(ids, others) in two files, the second one compressed; an empty sentence among them, and ones without others."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(1500):  # more than are appended at a time
        others = {"kind": f"k{number % 3}", "sources": [f"ü/{number}.png"], "n": {"x": None}} if number % 5 else {}
        made.append((rng.integers(0, 8192, number % 9).tolist(), others))
    lines = [records.record_line(np.array(ids, np.int32), **others) for ids, others in made]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[:700]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[700:])))
    return made


def run(tmp_path, inputs, output, **settings) -> pathlib.Path:
    """Runs the tool in a folder; returns the output's path, beside which nothing is left."""
    named = ",".join(str(tmp_path / name) for name in inputs.split(","))
    before = set(os.listdir(tmp_path))
    tokenizer_kit.run_main(pack, input_files=named, output_file=str(tmp_path / output), **settings)
    assert set(os.listdir(tmp_path)) - before == {output}
    return tmp_path / output


def test_back_again(sentences, tmp_path):
    run(tmp_path, "a.jsonl,b.jsonl.gz", "all.packed")
    back = run(tmp_path, "all.packed", "back.jsonl", unpack=True)
    got = [(ids.tolist(), record) for ids, record in records.read_records(str(back), 8192)]
    assert [(ids, {**others, "tokens": record["tokens"]}) for (ids, others), (_, record) in zip(sentences, got)] == got
    first = (tmp_path / "a.jsonl").read_bytes()
    assert back.read_bytes().startswith(first)  # to the byte, as we write JSONL


def test_without_what_rides_along(sentences, tmp_path):
    run(tmp_path, "a.jsonl", "ids.packed", keep_others=False)
    back = run(tmp_path, "ids.packed", "back.jsonl", unpack=True)
    got = [(ids.tolist(), list(record)) for ids, record in records.read_records(str(back), 8192)]
    assert got == [(ids, ["tokens"]) for ids, _ in sentences[:700]]


def test_two_bytes_a_token(tmp_path, capsys):
    ids = np.arange(100_000) % 8192
    (tmp_path / "a.jsonl").write_bytes(records.record_line(ids) * 3)
    path = run(tmp_path, "a.jsonl", "a.packed")
    assert 2.0 <= os.path.getsize(path) / 300_000 < 2.02
    assert "3 sentences, 300000 tokens, 2.01 bytes a token" in capsys.readouterr().out


def test_bad_lines(sentences, tmp_path):
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "bad.jsonl").write_bytes(b"".join([*lines[:3], b"{}\n", *lines[3:6]]))
    with pytest.raises(UserError, match=r"bad.jsonl:4: lacks the field 'tokens'"):
        run(tmp_path, "bad.jsonl", "bad.packed")
    assert not (tmp_path / "bad.packed").exists()
    run(tmp_path, "bad.jsonl", "bad.packed", max_errors=1)
    back = run(tmp_path, "bad.packed", "back.jsonl", unpack=True)
    assert back.read_bytes() == b"".join(lines[:6])


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"inputs": "none.jsonl"}, "none.jsonl: no such file"),
        ({"output": "x.jsonl"}, "x.jsonl: must end in .packed"),
        ({"output": "x.packed", "unpack": True}, "a.jsonl is no .packed file"),
        ({"inputs": "a.packed", "output": "x.packed"}, "a.packed is packed already"),
        ({"inputs": "a.packed", "output": "x.packed", "unpack": True}, "x.packed: must end in .jsonl"),
        ({"inputs": "a.packed", "output": "x.jsonl", "unpack": True}, "a.packed: is truncated, or not of the format"),
        ({"vocab_size": 65537}, "--vocab_size=65537: must be 1..65536"),
        ({"vocab_size": 8}, r"a.jsonl:1: id 9 is outside the vocabulary 0..7"),
    ],
)
def test_settings(tmp_path, settings, said):
    (tmp_path / "a.jsonl").write_bytes(records.record_line(np.array([9])))
    (tmp_path / "a.packed").write_bytes(b"nothing")
    names = {"inputs": "a.jsonl", "output": "x.packed"} | settings
    with pytest.raises(UserError, match=re.escape(said)):
        run(tmp_path, **names)


def test_disk_is_checked_first(sentences, tmp_path, monkeypatch):
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=9))
    with pytest.raises(UserError, match="of disk space"):
        run(tmp_path, "a.jsonl", "x.packed")


def test_compressed_inputs_need_more_room_than_they_take(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.gz"
    ids_N = np.random.default_rng(0).integers(0, 8192, 5000)
    path.write_bytes(gzip.compress(records.record_line(ids_N)))
    room = int(1.5 * path.stat().st_size)
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda directory: types.SimpleNamespace(free=room))
    with pytest.raises(UserError, match="of disk space"):
        run(tmp_path, "a.jsonl.gz", "x.packed")
