"""Flags of a dataset: wrong paths and settings are named."""

import pytest
from data_kit import base64_line, dataset

from EasyLM.errors import UserError


@pytest.mark.parametrize(
    "path, message",
    [
        ("", r"--train_dataset.json_dataset.path is empty: give a file, a glob"),
        ("DIR/no.jsonl", r"--train_dataset.json_dataset.path=DIR/no.jsonl: no such file"),
        ("DIR/good.jsonl,DIR/no.jsonl", r"no such file: DIR/no.jsonl"),
        ("DIR", r"--train_dataset.json_dataset.path=DIR: is a directory \(name files, or a glob such as DIR/\*"),
        ("DIR/*.txt", r"--train_dataset.json_dataset.path=DIR/\*.txt: no file matches"),
        ("DIR/empty.jsonl", r"DIR/empty.jsonl: holds no tokens \(the file is empty\)"),
        ("DIR/blank.jsonl", r"DIR/blank.jsonl: holds no tokens"),
    ],
)
def test_wrong_paths(tmp_path, path, message):
    (tmp_path / "good.jsonl").write_text(base64_line([1]))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=message.replace("DIR", str(tmp_path))):
        dataset(path.replace("DIR", str(tmp_path)))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"seq_length": 0}, "--json_dataset.seq_length=0: must be at least 1"),
        ({"tokenizer_parallel_chunk_size": 0}, "json_dataset.tokenizer_parallel_chunk_size=0: must be at least 1"),
        ({"start_seek_loc": 5}, r"start_seek_loc=5: no line of .*dataset.jsonl \(138734 bytes\) starts at byte 5"),
        ({"start_seek_loc": -1}, "no line of"),
        ({"start_seek_loc": 10**9}, "no line of"),
        ({"always_start_with_bos": True}, r"always_start_with_bos: bos id 8192 is not in 0\.\.511"),
        ({"fields": ""}, "--train_dataset.text_processor.fields: '' names no field"),
    ],
)
def test_wrong_settings(sentences, settings, message):
    with pytest.raises(UserError, match=message):
        dataset(sentences, **settings)


def test_compressed_files_are_refused(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"a.jsonl.gz is compressed, .* tokenizer.mix or tokenizer.pack"):
        dataset(tmp_path / "a.jsonl.gz")
