"""Token streams over JSONL files: files in order, field lists and loss weights, bytes read."""

import base64
import gc
import json
import os
import warnings

import numpy as np
import pytest
from data_kit import assert_rows, base64_line, dataset, plain_rows, plain_stream
from fsspec.implementations.memory import MemoryFileSystem
from open_files import open_files

from EasyLM import flags
from EasyLM.data import jsonl_file, make_dataset
from EasyLM.data.dataset import DATASET_FLAGS
from EasyLM.errors import UnavailableError, UserError


@pytest.mark.parametrize("window", [1, jsonl_file.WINDOW_BYTES])
@pytest.mark.parametrize("order", ["b.jsonl a.jsonl", "a.jsonl b.jsonl", "*.jsonl"])
def test_files_are_read_in_the_given_order(two_files, monkeypatch, order, window):
    monkeypatch.setattr(jsonl_file, "WINDOW_BYTES", window)
    names = ["a.jsonl", "b.jsonl"] if order == "*.jsonl" else order.split()
    without_blanks = []
    for name in names:
        lines = [line for line in (two_files / name).read_text().split("\n") if line]
        (two_files / f"{name}.plain").write_text("\n".join(lines))
        without_blanks.append(two_files / f"{name}.plain")
    stream = plain_stream(*without_blanks)
    source = dataset(", ".join(str(two_files / name) for name in order.split()), 33)
    for start in range(0, 2 * source.rows_per_epoch, 5):
        assert_rows(source.rows(start, 5), *plain_rows(stream, 33, start, 5))


def test_open_files_are_two_for_each_data_file(tmp_path):
    """These are the file and its index. The limit of open files is raised by as much."""
    for number in range(10):
        (tmp_path / f"{number}.jsonl").write_text(base64_line([number]))
    sources = [dataset(tmp_path / "*.jsonl")]  # opens what stays open for the whole process
    gc.collect()  # closes the files of earlier tests
    before = len(os.listdir("/proc/self/fd"))
    sources.append(dataset(tmp_path / "*.jsonl"))
    assert len(os.listdir("/proc/self/fd")) - before == 2 * 10 and sources[1].num_tokens == 10
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del sources
        gc.collect()
    assert not open_files(tmp_path) and not [warning for warning in caught if str(tmp_path) in str(warning.message)]


@pytest.mark.parametrize(
    "fields, head, body_mask, tail",
    [
        ("{tokens}", [], 1, []),
        ("[{tokens}]", [], 0, []),
        ("<|300|>,{tokens},<|301|>", [(300, 1)], 1, [(301, 1)]),
        ("[<|300|>],[<|301|>],{tokens}", [(300, 0), (301, 0)], 1, []),
        ("<|300|>,[{tokens}],[<|301|>],<|302|>", [(300, 1)], 0, [(301, 0), (302, 1)]),
    ],
)
def test_fields_and_masks(two_files, fields, head, body_mask, tail):
    ids, masks = [], []
    for line in (two_files / "a.jsonl").read_text().split("\n"):
        if line:
            body = np.frombuffer(base64.b64decode(json.loads(line)["tokens"]), "<i4").tolist()
            record = [*head, *((token, body_mask) for token in body), *tail]
            ids += [token for token, _ in record]
            masks += [mask for _, mask in record]
    source = dataset(two_files / "a.jsonl", 9, fields=fields)
    for start, count in ((0, 30), (source.rows_per_epoch - 3, 6)):
        inputs, targets = plain_rows(np.array(ids), 9, start, count)
        _, target_masks = plain_rows(np.array(masks), 9, start, count)
        assert_rows(source.rows(start, count), inputs, targets, target_masks)


def test_nested_field_of_the_same_name_is_ignored(tmp_path):
    nested = '{"more": ' + base64_line([9]) + ", "
    lines = [nested + base64_line([1, 2])[1:], nested + '"tokens": ""}', base64_line([3])]
    (tmp_path / "nested.jsonl").write_text("\n".join(lines))
    np.testing.assert_array_equal(dataset(tmp_path / "nested.jsonl", 3).rows(0, 1)["input_tokens"], [[1, 2, 3]])


def test_two_token_fields(tmp_path):
    line = json.dumps({"a": base64_line([1, 2], "%s"), "b": base64_line([3], "%s")})
    (tmp_path / "two.jsonl").write_text(f"{line}\n{line}\n")
    got = dataset(tmp_path / "two.jsonl", 5, fields="{a},[{b}]").rows(0, 1)
    assert_rows(got, [[1, 2, 3, 1, 2]], [[2, 3, 1, 2, 3]], [[1, 0, 1, 1, 0]])


@pytest.mark.parametrize("dtype", ["u2", "i8"])
def test_item_types(tmp_path, dtype):
    ids = np.arange(500)
    (tmp_path / "ids.jsonl").write_text(base64_line(ids, dtype=f"<{dtype}"))
    config = flags.defaults(DATASET_FLAGS)
    config.text_processor.update(fields="{tokens}", base64_token_dtype=dtype)
    config.json_dataset.update(path=str(tmp_path / "ids.jsonl"), seq_length=7)
    source = make_dataset(config, None, 512)
    for start in range(0, 71, 3):
        assert_rows(source.rows(start, 2), *plain_rows(ids, 7, start, 2))


def test_bytes_read_are_those_of_the_rows(sentences):
    source = dataset(sentences)
    source.rows(50, 4)
    ids = 513 * 16 / 3
    # Groups of base64 are read whole, and so is the text between lines.
    assert ids <= source.bytes_read <= ids + 16 * 3 + 200


def test_remote_paths(golden, tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    local = golden / "lvm_tiny" / "dataset.jsonl"
    with fsspec.open("memory://bucket/part-0.jsonl", "wb") as file:
        file.write(local.read_bytes())
    source = dataset("memory://bucket/*.jsonl")
    assert_rows(source.rows(200, 5), *plain_rows(plain_stream(local), 128, 200, 5))
    with pytest.raises(UserError, match=r"path=memory://bucket/no.jsonl: no such file"):
        dataset("memory://bucket/no.jsonl")


def test_files_on_s3_are_read(golden, tmp_path, monkeypatch):
    """The `cat_file` of its client has another second argument than that of other clients."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cat_file, local = MemoryFileSystem.cat_file, golden / "lvm_tiny" / "dataset.jsonl"

    def s3_cat_file(self, path, version_id=None, start=None, end=None):
        assert version_id is None
        return cat_file(self, path, start, end)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", s3_cat_file)
    MemoryFileSystem().pipe_file("memory://s3/a.jsonl", local.read_bytes())
    assert_rows(dataset("memory://s3/a.jsonl").rows(200, 5), *plain_rows(plain_stream(local), 128, 200, 5))


def test_an_outage_of_a_store_is_no_change_of_the_file(golden, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    MemoryFileSystem().pipe_file("memory://s3/b.jsonl", (golden / "lvm_tiny" / "dataset.jsonl").read_bytes())
    source = dataset("memory://s3/b.jsonl")

    def fail(*arguments, **options):
        raise ConnectionResetError("connection reset")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
    with pytest.raises(UnavailableError, match=r"^memory://s3/b\.jsonl: not reachable \(ConnectionResetError"):
        source.rows(0, 1)


def test_changed_file_is_detected(sentences):
    source = dataset(sentences)
    sentences.write_text("?" * sentences.stat().st_size)
    with pytest.raises(UserError, match=f"{sentences}: changed since it was indexed"):
        source.rows(0, 1)
