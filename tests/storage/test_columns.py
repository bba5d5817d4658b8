"""Column files: round trips, validity of caches, and damaged files."""

import errno
import json
import os
import pathlib
import tempfile

import numpy as np
import orjson
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from EasyLM.errors import UserError
from EasyLM.storage import cached_columns, columns, open_columns, processes, write_columns

DTYPES = {"ids": "<u2", "ends": "<i8", "empty": "u1"}


def produce(append):
    append(ids=np.arange(5), ends=[3])
    append(ids=[7], ends=np.array([6]))
    return {"tokens": 6}


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data" / "data.jsonl"


def cached(source, settings=None, version=None, produce=produce, is_shared=True):
    return cached_columns(str(source), ".index", settings or {}, version or {"size": 1}, DTYPES, produce, is_shared)


def forbidden(append):
    pytest.fail("the cache was not used")


def assert_content(opened):
    np.testing.assert_array_equal(opened.arrays["ids"], [0, 1, 2, 3, 4, 7])
    np.testing.assert_array_equal(opened.arrays["ends"], [3, 6])
    assert [array.dtype for array in opened.arrays.values()] == [np.uint16, np.int64, np.uint8]
    assert len(opened.arrays["empty"]) == 0 and opened.metadata["tokens"] == 6


def test_round_trip(tmp_path):
    path = str(tmp_path / "new" / "a.packed")
    write_columns(path, DTYPES, produce)
    opened = open_columns(path)
    assert_content(opened)
    assert all(opened.arrays[name].ctypes.data % columns.ALIGNMENT == 0 for name in ("ids", "ends"))
    with pytest.raises(ValueError, match="read-only"):
        opened.arrays["ids"][0] = 1
    assert os.listdir(tmp_path / "new") == ["a.packed"]


def test_an_error_leaves_no_file(tmp_path):
    def failing(append):
        append(ids=[1])
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_columns(str(tmp_path / "a.packed"), DTYPES, failing)
    assert not os.listdir(tmp_path)


def test_a_cache_is_used_again(source):
    assert_content(cached(source))
    assert_content(cached(source, produce=forbidden))
    assert len(os.listdir(source.parent)) == 1


def test_each_settings_value_has_its_own_cache(source):
    cached(source, {"vocab_size": 512})
    with pytest.raises(pytest.fail.Exception):
        cached(source, {"vocab_size": 300}, produce=forbidden)
    cached(source, {"vocab_size": 300})
    cached(source, {"vocab_size": 512}, produce=forbidden)


def test_another_version_of_the_source_replaces_the_cache(source):
    cached(source, version={"size": 1})
    with pytest.raises(pytest.fail.Exception):
        cached(source, version={"size": 2}, produce=forbidden)
    cached(source, version={"size": 2})
    assert len(os.listdir(source.parent)) == 1


def test_a_remote_source_is_cached_in_the_users_directory(source, tmp_path, monkeypatch, caplog):
    """A program that runs in another directory uses the same cache."""
    caplog.set_level("INFO")
    url = "memory://large/data.jsonl"
    assert_content(cached(url, is_shared=False))
    monkeypatch.chdir(tmp_path)
    assert_content(cached(url, produce=forbidden, is_shared=False))
    (path,) = (tmp_path / "cache").rglob("*.index")
    assert caplog.messages == [f"{url}: its cache is {path}"]
    assert not MemoryFileSystem().exists("/large")


def on_another_host(monkeypatch, tmp_path, name):
    """Nothing is cached there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_other_hosts_download_the_cache_of_a_remote_source(source, tmp_path, monkeypatch):
    url = "memory://shared/data.jsonl"
    cached(url)
    on_another_host(monkeypatch, tmp_path, "second")
    assert_content(cached(url, produce=forbidden))
    assert len(list((tmp_path / "second").rglob("*.index"))) == 1
    on_another_host(monkeypatch, tmp_path, "third")
    with pytest.raises(pytest.fail.Exception):
        cached(url, version={"size": 2}, produce=forbidden)
    cached(url, version={"size": 2})
    on_another_host(monkeypatch, tmp_path, "fourth")
    assert_content(cached(url, version={"size": 2}, produce=forbidden))


def test_a_damaged_cache_on_a_store_is_replaced(source, tmp_path, monkeypatch):
    url, store = "memory://damaged/data.jsonl", MemoryFileSystem()
    cached(url)
    (name,) = store.ls("/damaged", detail=False)
    data = store.cat_file(name)
    store.pipe_file(name, flipped(data, 8 * columns.HEADER_BYTES))
    on_another_host(monkeypatch, tmp_path, "second")
    assert_content(cached(url))
    assert store.cat_file(name) == data


@pytest.mark.parametrize(
    "url", ["memory://read_only/a.jsonl", "http://example.org/a.jsonl", "hf://datasets/a/b/a.jsonl"]
)
def test_a_store_that_takes_no_files_leaves_the_cache_to_each_host(source, tmp_path, monkeypatch, caplog, url):
    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(MemoryFileSystem, "put_file", refuse)
    assert_content(cached(url))
    on_another_host(monkeypatch, tmp_path, "second")
    assert_content(cached(url))
    assert ("is not shared, so that each host makes it" in caplog.text) == url.startswith("memory")


@pytest.mark.parametrize("keep", [0, 10, columns.HEADER_BYTES, columns.HEADER_BYTES + 20])
def test_truncated_files_are_invalid(source, keep):
    cached(source)
    (path,) = source.parent.iterdir()
    path.write_bytes(path.read_bytes()[:keep])
    assert open_columns(str(path)) is None
    assert_content(cached(source))


@pytest.mark.parametrize("old, new", [(b'"<u2"', b'"xx2"'), (b'"ids":[', b'"ids":{'), (b"4096", b"-999")])
def test_damaged_headers_are_invalid(tmp_path, old, new):
    path = pathlib.Path(tmp_path / "a.packed")
    write_columns(str(path), DTYPES, produce)
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    assert open_columns(str(path)) is None


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_any_flipped_bit_is_noticed(tmp_path):
    """In the header and in the columns. The padding after the header and between columns has no meaning."""
    path = tmp_path / "a.packed"
    write_columns(str(path), DTYPES, produce)
    data = path.read_bytes()
    end, ids, ends = data.index(b" "), columns.HEADER_BYTES, columns.HEADER_BYTES + columns.ALIGNMENT
    for bit in range(8 * end):
        path.write_bytes(flipped(data, bit))
        assert open_columns(str(path)) is None
    for name, start, size in (("ids", ids, 12), ("ends", ends, 16)):
        for bit in range(8 * start, 8 * (start + size)):
            path.write_bytes(flipped(data, bit))
            assert open_columns(str(path)).damaged_column() == name
    path.write_bytes(data)
    assert open_columns(str(path)).damaged_column() is None


def test_a_damaged_cache_is_written_again(source):
    cached(source)
    (path,) = source.parent.iterdir()
    data = path.read_bytes()
    path.write_bytes(flipped(data, 8 * columns.HEADER_BYTES))
    assert_content(cached(source))
    assert path.read_bytes() == data


def test_a_large_cache_is_verified_once(source, monkeypatch):
    monkeypatch.setattr(columns, "VERIFIED_ONCE_BYTES", columns.HEADER_BYTES)  # larger than the record of it
    cached(source)
    (path,) = source.parent.iterdir()
    cached(source, produce=forbidden)
    verified, damaged_column = [], columns.Columns.damaged_column

    def recorded(self):
        verified.extend(self.arrays)
        return damaged_column(self)

    monkeypatch.setattr(columns.Columns, "damaged_column", recorded)
    assert_content(cached(source, produce=forbidden))
    assert verified == []
    path.write_bytes(flipped(path.read_bytes(), 8 * columns.HEADER_BYTES))
    os.utime(path, ns=(1, 1))
    assert_content(cached(source))
    assert verified == ["ids", "ends", "empty"][: len(verified)] and "ids" in verified


@pytest.mark.parametrize("change", [lambda data: data + data, lambda data: data + b"\0", lambda data: data[:-1]])
def test_a_file_of_another_length_is_invalid(tmp_path, change):
    path = tmp_path / "a.packed"
    write_columns(str(path), DTYPES, produce)
    path.write_bytes(change(path.read_bytes()))
    assert open_columns(str(path)) is None


def test_a_file_of_version_0_1_0_opens(tmp_path):
    """It has no digest of the header and no checksums. A key that is repeated there is refused all the same."""
    path = tmp_path / "a.packed"
    write_columns(str(path), DTYPES, produce)
    data = path.read_bytes()
    header = json.loads(data[: columns.HEADER_BYTES])
    del header["checksums"], header["header_digest"]
    path.write_bytes(orjson.dumps(header).ljust(columns.HEADER_BYTES) + data[columns.HEADER_BYTES :])
    assert_content(open_columns(str(path)))
    repeated = b'{"tokens":7,' + orjson.dumps(header)[1:]
    path.write_bytes(repeated.ljust(columns.HEADER_BYTES) + data[columns.HEADER_BYTES :])
    assert open_columns(str(path)) is None


def test_checksums_under_damaged_keys_do_not_count_as_missing(tmp_path):
    path = tmp_path / "a.packed"
    write_columns(str(path), DTYPES, produce)
    damaged = path.read_bytes().replace(b'"checksums"', b'"chdcksums"').replace(b'"header_digest"', b'"haader_digest"')
    path.write_bytes(damaged)
    assert open_columns(str(path)) is None


def fill_directory(monkeypatch, *directories) -> None:
    """Makes the disks of directories full: a file can be created there, but its columns cannot be joined."""
    join = columns._join

    def join_if_space(target, *arguments):
        if os.path.dirname(target.name) in map(str, directories):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        join(target, *arguments)

    monkeypatch.setattr(columns, "_join", join_if_space)


def test_a_full_directory_is_passed_over(source, tmp_path, monkeypatch, caplog):
    fill_directory(monkeypatch, source.parent)
    assert_content(cached(source))
    assert not os.listdir(source.parent) and "No space left on device" in caplog.text
    assert_content(cached(source, produce=forbidden))
    assert len(list((tmp_path / "cache").rglob("*.index"))) == 1


def test_the_last_place_is_the_directory_of_temporary_files(source, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "cache").write_text("a file, where no directory can be made")
    fill_directory(monkeypatch, source.parent)
    assert_content(cached(source))
    assert_content(cached(source, produce=forbidden))
    assert len(list((tmp_path / "tmp").rglob("*.index"))) == 1


def test_without_any_place_all_are_named(source, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    places = source.parent, tmp_path / "cache" / "EasyLM", tmp_path / "tmp" / f"EasyLM-{os.getuid()}"
    fill_directory(monkeypatch, *places)
    with pytest.raises(UserError, match=r"data\.jsonl: no directory for its cache") as error:
        cached(source)
    assert all(f"{place} (No space left on device)" in str(error.value) for place in places)


def test_errors_of_the_source_are_not_those_of_the_cache(source):
    def unreadable(append):
        raise PermissionError(errno.EACCES, "Permission denied", "data.jsonl")

    with pytest.raises(PermissionError, match=r"data\.jsonl"):
        cached(source, produce=unreadable)


def test_leftovers_of_dead_processes_are_deleted(source):
    """A killed process leaves the temporary file of its cache."""
    cached(source)
    (path,) = source.parent.iterdir()
    own = f".{path.name}.{processes.owner_tag()}.00000000.partial"
    dead = own.replace(processes.owner_tag(), processes.owner_tag().rpartition("-")[0] + "-1")
    elsewhere = f".{path.name}.0123abcd-1-1.00000000.partial"
    for name in (own, dead, elsewhere):
        (source.parent / name).touch()
    cached(source, version={"size": 2})
    assert {name.name for name in source.parent.iterdir()} == {path.name, own, elsewhere}


@pytest.mark.parametrize("dtype", ["O", "(2,", "V9", "f" * 1000, None, 3, ["u1"], {"names": ["a"]}])
def test_a_hostile_type_of_a_column_is_refused(tmp_path, dtype):
    path = tmp_path / "a.packed"
    header = {"columns": {"ids": [dtype, columns.HEADER_BYTES, 1]}}
    path.write_bytes(orjson.dumps(header).ljust(columns.HEADER_BYTES) + bytes(64))
    assert open_columns(str(path)) is None


@pytest.mark.parametrize("table", [[], {"a": 3}, {"a": ["u1", -64, 1]}, {"a": ["u1", 0, 2**70]}, {"a": ["u1", "x", 1]}])
def test_a_hostile_table_of_columns_is_refused(tmp_path, table):
    path = tmp_path / "a.packed"
    path.write_bytes(json.dumps({"columns": table}).encode().ljust(columns.HEADER_BYTES) + bytes(64))
    assert open_columns(str(path)) is None
