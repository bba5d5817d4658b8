"""The line index: its cache, byte ranges and processes, bad lines."""

import base64
import json
import os
import re
import shutil

import numpy as np
import pytest
from data_kit import assert_rows, base64_line, dataset, plain_rows, plain_stream

from EasyLM.data import line_index
from EasyLM.errors import UserError
from EasyLM.storage import columns


def test_index_is_cached_beside_the_file(sentences, monkeypatch):
    dataset(sentences)
    indexes = [name for name in os.listdir(sentences.parent) if name.endswith(".index")]
    assert len(indexes) == 1 and len(os.listdir(sentences.parent)) == 2
    monkeypatch.setattr(line_index, "scan_range", None)
    dataset(sentences, seq_length=64)
    with pytest.raises(TypeError):  # other settings have another index
        dataset(sentences, fields="<|5|>,{tokens}")


def test_index_is_rebuilt_when_the_file_changes(sentences):
    dataset(sentences)
    lines = sentences.read_text().splitlines(keepends=True)
    first_lines, one_line = "".join(lines[:5]), base64_line([1] * 50)
    sentences.write_text(first_lines)
    assert dataset(sentences).num_tokens == len(plain_stream(sentences))
    sentences.write_text(one_line.ljust(len(first_lines), "\n"))
    os.utime(sentences, ns=(1, 1))  # the same size, another time
    assert dataset(sentences).num_tokens == 50


def test_a_file_or_index_that_is_truncated_during_reading_is_named(sentences):
    source = dataset(sentences)
    (index,) = sentences.parent.glob("*.index")
    for path, message in ((index, "was truncated while it was read"), (sentences, "changed since it was indexed")):
        whole = path.read_bytes()
        os.truncate(path, 4200)
        with pytest.raises(UserError, match=f"^{path}: {message}"):
            source.rows(150, 4)
        path.write_bytes(whole)
        source.rows(150, 4)


def test_damaged_index_is_replaced(sentences):
    dataset(sentences)
    (index,) = sentences.parent.glob("*.index")
    index.write_bytes(b"half an index")
    assert dataset(sentences).num_tokens == 25896


def test_index_is_in_the_user_cache_if_the_directory_is_read_only(sentences, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(columns, "_is_writable", lambda path: not path.startswith(str(sentences.parent)))
    assert dataset(sentences).num_tokens == 25896
    assert len(list(cache.rglob("*.index"))) == 1 and os.listdir(sentences.parent) == ["dataset.jsonl"]


@pytest.mark.parametrize("block", [1, 100, 5000])
def test_lines_across_blocks_and_ranges(two_files, tmp_path, monkeypatch, block):
    whole = dataset(two_files / "a.jsonl", 50).rows(0, 60)
    monkeypatch.setattr(line_index, "BLOCK_BYTES", block)
    monkeypatch.setattr(line_index, "RANGE_BYTES", 777)
    copied = shutil.copy(two_files / "a.jsonl", tmp_path / "a.jsonl")
    assert_rows(dataset(copied, 50).rows(0, 60), whole["input_tokens"], whole["target_tokens"])


def test_index_does_not_depend_on_the_number_of_processes(two_files, tmp_path, monkeypatch):
    monkeypatch.setattr(line_index, "RANGE_BYTES", 1000)
    indexes = []
    for processes in (1, 2):
        copied = shutil.copy2(two_files / "a.jsonl", tmp_path / "a.jsonl")
        dataset(copied, tokenizer_processes=processes)
        (index,) = tmp_path.glob("*.index")
        indexes.append(index.read_bytes())
        index.unlink()
    assert indexes[0] == indexes[1]


BAD = {
    "{tokens": r"not JSON \(",
    "[1]": "not a JSON object",
    '{"token": ""}': r"lacks the field 'tokens' \(fields here: token\)",
    '{"tokens": "A"}': "field 'tokens' is not base64",
    '{"tokens": "AAAAAAA="}': "field 'tokens' has 5 bytes, not a multiple of 4",
    base64_line([3, 512]): r"id 512 is outside the vocabulary 0\.\.511",
    base64_line([-1]): r"id -1 is outside the vocabulary 0\.\.511",
}


@pytest.mark.parametrize("others", ["", ', "id": 3'])
@pytest.mark.parametrize("bad", list(BAD)[2:])
def test_bad_line_in_a_sliceable_block(tmp_path, bad, others):
    good = base64_line(range(20), '{"tokens": "%s"' + others + "}")
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([good, good, bad.replace("}", others + "}"), good]))
    with pytest.raises(UserError, match=f"^{path}:3: {BAD[bad]}".partition(r"\(fields")[0]):
        dataset(path)


@pytest.mark.parametrize("bad, processes", [*((bad, 1) for bad in BAD), ("[1]", 2)])
def test_first_bad_line_is_named(tmp_path, monkeypatch, bad, processes):
    monkeypatch.setattr(line_index, "RANGE_BYTES", 100)
    good = base64_line(range(20))
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([good, "", good, good, good, good, bad, good, "[]", good]))
    with pytest.raises(UserError, match=f"^{path}:7: {BAD[bad]}"):
        dataset(path, tokenizer_processes=processes)
    assert os.listdir(tmp_path) == ["bad.jsonl"]  # no temporary file


def test_bad_lines_are_skipped_and_counted(sentences):
    stream = plain_stream(sentences)
    lines = sentences.read_text().splitlines()
    bad = list(BAD)
    sentences.write_text("\n".join(x for pair in zip(bad, lines, strict=False) for x in pair) + "\n" + lines[7])
    source = dataset(sentences, skip_bad_lines=True)
    count = sum(len(base64.b64decode(json.loads(line)["tokens"])) // 4 for line in lines[:8])
    assert source.skipped_lines == source.metrics(0)["dataset_skipped_lines"] == 7
    assert source.num_tokens == count
    assert_rows(source.rows(0, 90), *plain_rows(stream[:count], 128, 0, 90))
    with pytest.raises(UserError, match=f"^{sentences}:1: not JSON"):  # also from the cached index
        dataset(sentences)


def test_index_depends_on_the_vocabulary(sentences):
    assert dataset(sentences, vocab_size=512).num_tokens == 25896
    with pytest.raises(UserError, match=rf"{sentences}:1: id \d+ is outside the vocabulary 0\.\.299"):
        dataset(sentences, vocab_size=300)


def test_truncated_ids_in_two_lines(tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"tokens": "AAAAAAA="}\n{"tokens": "AAAA"}\n')
    with pytest.raises(UserError, match=r"odd.jsonl:1: field 'tokens' has 5 bytes, not a multiple of 4"):
        dataset(tmp_path / "odd.jsonl")


def test_only_bad_lines(tmp_path):
    (tmp_path / "bad.jsonl").write_text("?\n?\n")
    with pytest.raises(UserError, match=r"bad.jsonl: holds no tokens; .*bad.jsonl:1: not JSON"):
        dataset(tmp_path / "bad.jsonl", skip_bad_lines=True)


WARNINGS = {
    ("<i8", "i4"): "every second id is 0; are its ids 64-bit numbers (base64_token_dtype=i8)?",
    ("<i8", "u2"): "every second id is 0; are its ids 64-bit numbers (base64_token_dtype=i8)?",
    ("<i4", "u2"): "every second id is 0; are its ids 32-bit numbers (base64_token_dtype=i4)?",
    (">u2", "u2"): "every id is a multiple of 256; are its ids big-endian? They must be little-endian",
}


@pytest.mark.parametrize("fields", ["{tokens}", "<|bos|>,{tokens},[{tokens}]"])
@pytest.mark.parametrize(("stored", "read"), [*WARNINGS, ("<i4", "i4"), ("<u2", "u2"), ("<i8", "i8")])
def test_ids_read_as_another_type_that_the_vocabulary_allows_are_reported(tmp_path, caplog, stored, read, fields):
    """Fields that are sliced from the lines, and fields that are parsed."""
    ids = np.random.default_rng(0).integers(0, 32, (3, 20)).astype(stored)
    (tmp_path / "a.jsonl").write_text("\n".join(base64_line(row, dtype=stored) for row in ids) + "\n")
    dataset(tmp_path / "a.jsonl", seq_length=8, vocab_size=8292, fields=fields, token_dtype=read)
    warning = WARNINGS.get((stored, read))
    assert [record.getMessage() for record in caplog.records if "its ids" in record.getMessage()] == (
        [f"{tmp_path}/a.jsonl: {warning}"] if warning else []
    )


@pytest.mark.parametrize("fields", ["{tokens}", "{tokens},[{tokens}]"])
@pytest.mark.parametrize(
    ("stored", "read", "asks"),
    [
        ("<u2", "i4", "are they stored as u2, not as i4?"),
        (">i4", "i4", "are they stored as big-endian i4, not as i4?"),
        (">u2", "u2", "are they stored as big-endian u2, not as u2?"),
        ("<i4", "i8", "are they stored as i4, not as i8?"),
        (">i8", "i8", "are they stored as big-endian i8, not as i8?"),
    ],
)
def test_ids_outside_the_vocabulary_of_another_type_are_refused_with_the_type(tmp_path, stored, read, asks, fields):
    ids = np.random.default_rng(0).integers(0, 512, 20).astype(stored)
    (tmp_path / "a.jsonl").write_text(base64_line(ids, dtype=stored))
    with pytest.raises(UserError, match=rf"a.jsonl:1: id -?\d+ is outside the vocabulary 0..511; {re.escape(asks)}$"):
        dataset(tmp_path / "a.jsonl", seq_length=8, fields=fields, token_dtype=read)
