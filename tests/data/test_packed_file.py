"""A packed file instead of its JSONL files: the same rows, and a run resumes from either."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from data_kit import assert_rows, base64_line, dataset
from fsspec.implementations.memory import MemoryFileSystem

from EasyLM.data import packed_file, records
from EasyLM.errors import UserError
from EasyLM.storage import columns
from EasyLM.training import batches


@pytest.fixture
def packed_files(two_files, tmp_path):
    """(JSONL paths, packed path): one packed file of both JSONL files, with the other keys of the records."""
    paths = [str(two_files / name) for name in ("b.jsonl", "a.jsonl")]
    sources = [(path, records.read_records(path, 512)) for path in paths]
    totals = packed_file.write(str(tmp_path / "both.packed"), sources, keep_others=True)
    assert totals["sentences"] == 600
    return ",".join(paths), str(tmp_path / "both.packed")


@pytest.mark.parametrize("seed", [-1, 4])
@pytest.mark.parametrize("fields", [",{tokens},", "[{tokens}]", "<|300|>,[{tokens}],[<|301|>],<|302|>"])
def test_rows_equal_those_of_jsonl(packed_files, fields, seed):
    plain, packed = (dataset(path, 33, fields=fields, shuffle_seed=seed) for path in packed_files)
    assert (packed.num_tokens, packed.fingerprint) == (plain.num_tokens, plain.fingerprint)
    for start in range(0, 2 * plain.rows_per_epoch, 7):
        assert_rows(packed.rows(start, 7), *plain.rows(start, 7).values())
        if seed < 0:
            examples = [source.metrics(start)["dataset_example_index"] for source in (plain, packed)]
            assert examples[0] == examples[1]
    assert batches.rows_consumed(batches.dataset_state(plain, 5), packed) == 5


@pytest.mark.parametrize("weights", ["", "2,1"])
def test_packed_and_jsonl_files_combine(packed_files, two_files, tmp_path, weights):
    jsonl, alone = two_files / "a.jsonl", tmp_path / "a.packed"
    packed_file.write(str(alone), [(str(jsonl), records.read_records(str(jsonl), 512))], keep_others=False)
    first, second = (dataset(f"{path},{packed_files[1]}", 20, weights=weights) for path in (jsonl, alone))
    assert first.fingerprint == second.fingerprint
    assert_rows(second.rows(3, 90), *first.rows(3, 90).values())


def test_bytes_read_are_those_of_the_rows(packed_files):
    source = dataset(packed_files[1], 33)
    source.rows(5, 2)
    assert source.bytes_read == 2 * 67


def test_truncation_during_reading_is_an_error(packed_files, tmp_path):
    """Reading a memory map beyond the end of its file would kill the process."""
    path = shutil.copy(packed_files[1], tmp_path / "cut.packed")
    source, sentences = dataset(path, 33, document_mask=True), packed_file.read(str(path), 512)
    source.rows(0, 2)
    next(sentences)
    os.truncate(path, 5000)
    calls = (lambda: source.rows(2, 2), lambda: source.metrics(2), lambda: next(sentences))
    for call in calls:
        with pytest.raises(UserError, match=r"cut.packed: was truncated while it was read, from \d+ to 5000 bytes"):
            call()


@pytest.fixture
def remote_file(packed_files):
    """The packed file on an object store."""
    url = "memory://packed/both.packed"
    MemoryFileSystem().pipe_file(url, pathlib.Path(packed_files[1]).read_bytes())
    return url


@pytest.mark.parametrize("seed", [-1, 4])
def test_a_remote_file_gives_the_same_rows_and_reads_their_bytes_alone(packed_files, remote_file, monkeypatch, seed):
    read, cat_file = [], MemoryFileSystem.cat_file

    def counting(self, path, start=None, end=None):
        data = cat_file(self, path, start, end)
        read.append(len(data))
        return data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counting)
    plain, remote = (dataset(path, 33, shuffle_seed=seed) for path in (packed_files[1], remote_file))
    columns_of = columns.open_columns(packed_files[1]).arrays
    bounds = columns_of["ends"].nbytes + columns_of["origin"].nbytes
    assert bounds <= sum(read) - columns.HEADER_BYTES <= bounds + 16, "and the last item of the two columns of ends"
    assert remote.fingerprint == plain.fingerprint
    read.clear()
    for start in range(0, 2 * plain.rows_per_epoch, 7):
        assert_rows(remote.rows(start, 7), *plain.rows(start, 7).values())
    assert sum(read) == remote.bytes_read == plain.bytes_read


@pytest.mark.parametrize(
    "column, message",
    [("ends", r"both.packed: is damaged: the column ends"), ("origin", r"both.packed: is damaged: the column origin")],
)
def test_damaged_bounds_of_a_remote_file_are_named(remote_file, column, message):
    data = bytearray(MemoryFileSystem().cat_file(remote_file))
    data[json.loads(data[: columns.HEADER_BYTES])["columns"][column][1]] ^= 1
    MemoryFileSystem().pipe_file(remote_file, bytes(data))
    with pytest.raises(UserError, match=message):
        dataset(remote_file)


def test_an_id_of_a_remote_file_that_its_header_excludes_is_named(remote_file):
    source, data = dataset(remote_file), bytearray(MemoryFileSystem().cat_file(remote_file))
    data[columns.HEADER_BYTES : columns.HEADER_BYTES + 2] = (9999).to_bytes(2, "little")
    MemoryFileSystem().pipe_file(remote_file, bytes(data))
    with pytest.raises(UserError, match=r"both.packed: changed since .* at token 0 \(an id is larger than 511"):
        source.rows(0, 1)


def test_remote_files_that_are_refused(packed_files, remote_file):
    with pytest.raises(UserError, match=r"both.packed: id 511 is outside the vocabulary 0\.\.299 \(token"):
        dataset(remote_file, vocab_size=300)
    with pytest.raises(UserError, match="only the trainer reads remote packed files: copy it"):
        next(packed_file.read(remote_file, 512))
    as_version_0_1_0(packed_files[1])
    MemoryFileSystem().pipe_file(remote_file, pathlib.Path(packed_files[1]).read_bytes())
    with pytest.raises(UserError, match=r"both.packed: is of version 0.1.0, without checksums: copy it"):
        dataset(remote_file)


def test_invalid_packed_files(packed_files, tmp_path):
    data = pathlib.Path(packed_files[1]).read_bytes()
    bad = tmp_path / "bad.packed"
    renamed = [data.replace(name, b"x" * len(name), 1) for name in (b"largest_id", b"columns", b"ends", b"<u2")]
    for contents in (b"", b"{}", b"[]", base64_line([1]).encode(), data[:4096], data[:-100], data[100:], *renamed):
        bad.write_bytes(contents)
        with pytest.raises(UserError, match=r"bad.packed: is truncated, or not of the format"):
            dataset(bad)


def test_a_flipped_bit_in_any_column_is_named(packed_files, tmp_path):
    data = pathlib.Path(packed_files[1]).read_bytes()
    bad = tmp_path / "bad.packed"
    table = json.loads(data[: columns.HEADER_BYTES])["columns"]
    for name, (dtype, offset, length) in table.items():
        size = length * np.dtype(dtype).itemsize
        for place in (offset, offset + size // 2, offset + size - 1):
            damaged = bytearray(data)
            damaged[place] ^= 0x80
            bad.write_bytes(damaged)
            # A wrong last end contradicts the length of another column, which is noticed before any column is read.
            with pytest.raises(UserError, match=rf"bad.packed: is (damaged: the column {name} differs|truncated)"):
                dataset(bad)


def test_a_file_joined_to_itself_is_refused(packed_files, tmp_path):
    data = pathlib.Path(packed_files[1]).read_bytes()
    (tmp_path / "twice.packed").write_bytes(data + data)
    with pytest.raises(UserError, match=r"twice.packed: is truncated"):
        dataset(tmp_path / "twice.packed")


def test_a_large_file_is_verified_once(packed_files, monkeypatch):
    monkeypatch.setattr(packed_file, "CACHED_BYTES", 1000)
    dataset(packed_files[1])
    verified = []
    damaged_column = columns.Columns.damaged_column
    monkeypatch.setattr(
        columns.Columns, "damaged_column", lambda self: verified.extend(self.arrays) or damaged_column(self)
    )
    dataset(packed_files[1])
    assert verified == []  # the cached result has no columns
    os.utime(packed_files[1])
    dataset(packed_files[1])
    assert "ids" in verified
    verified.clear()
    monkeypatch.setattr(packed_file, "CACHED_BYTES", 1 << 30)
    dataset(packed_files[1])
    assert "ids" in verified


def as_version_0_1_0(path, ids=None, ends=None, largest_id=511):
    """Rewrites a packed file without digest and checksums, with changed arrays."""
    data = bytearray(pathlib.Path(path).read_bytes())
    header = json.loads(data[: columns.HEADER_BYTES])
    del header["checksums"], header["header_digest"]
    header["largest_id"] = largest_id
    for name, changes in (("ids", ids or {}), ("ends", ends or {})):
        dtype, offset, length = header["columns"][name]
        array = np.frombuffer(data, dtype, length, offset)
        for place, value in changes.items():
            array[place] = value
    data[: columns.HEADER_BYTES] = json.dumps(header).encode().ljust(columns.HEADER_BYTES)
    pathlib.Path(path).write_bytes(data)


def test_a_file_of_version_0_1_0_gives_the_same_rows(packed_files):
    plain = dataset(packed_files[0], 33)
    as_version_0_1_0(packed_files[1])
    assert_rows(dataset(packed_files[1], 33).rows(0, 9), *plain.rows(0, 9).values())


def test_the_largest_id_of_the_header_is_not_trusted(packed_files):
    """The place of the id is named: it is the second token of sentence 4."""
    ends = columns.open_columns(packed_files[1]).arrays["ends"]
    as_version_0_1_0(packed_files[1], ids={int(ends[3]) + 1: 9999}, largest_id=3)
    with pytest.raises(UserError, match=r"both.packed: id 9999 is outside .* 0\.\.511 \(token 1 of sentence 4"):
        dataset(packed_files[1])


def test_ends_that_fall_are_found_without_checksums(packed_files):
    as_version_0_1_0(packed_files[1], ends={300: 0})
    with pytest.raises(UserError, match=r"both.packed: is damaged: the column ends"):
        dataset(packed_files[1])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"fields": "{other}"}, r"both.packed: a packed file has one field, \{tokens\}"),
        ({"fields": "{tokens},{other}"}, "a packed file has one field"),
        ({"vocab_size": 300}, r"both.packed: id 511 is outside the vocabulary 0\.\.299"),
        ({"start_seek_loc": 5}, "start_seek_loc=5: .*both.packed is packed"),
    ],
)
def test_wrong_settings(packed_files, settings, message):
    with pytest.raises(UserError, match=message):
        dataset(packed_files[1], **settings)
