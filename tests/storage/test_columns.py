"""Column files: round trips, validity of caches, and damaged files."""

import json
import os
import pathlib

import numpy as np
import orjson
import pytest

from EasyLM.storage import cached_columns, columns, open_columns, write_columns

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


def cached(source, settings=None, version=None, produce=produce):
    return cached_columns(str(source), ".index", settings or {}, version or {"size": 1}, DTYPES, produce)


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


def test_a_remote_source_is_cached_in_the_users_directory(source, tmp_path):
    for _ in range(2):
        assert_content(cached("memory://bucket/data.jsonl"))
    assert len(list((tmp_path / "cache").rglob("*.index"))) == 1


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


def test_any_flipped_bit_of_a_header_is_noticed(tmp_path):
    """The cache is written again; a packed file is refused."""
    path = tmp_path / "a.packed"
    write_columns(str(path), DTYPES, produce)
    data = bytearray(path.read_bytes())
    end = data.index(b" ")  # the rest of the header is padding
    for place in range(end):
        for bit in range(8):
            data[place] ^= 1 << bit
            path.write_bytes(data)
            opened = open_columns(str(path))
            if opened is not None:  # the flip has renamed the digest itself, as an older file has none
                assert_content(opened)
                assert b'"header_digest"' not in data[:end]
            data[place] ^= 1 << bit


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
