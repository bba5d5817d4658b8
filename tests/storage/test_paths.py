"""Comma lists and globs of paths, local and remote; compressed lines."""

import gzip
import pathlib
import re

import fsspec
import pytest
import zstandard
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from EasyLM.errors import UnavailableError, UserError
from EasyLM.storage import (
    check_line_start,
    check_output,
    check_plain_file,
    expand_path_groups,
    expand_paths,
    file_version,
    names_store_errors,
    path_exists,
    read_lines,
    read_text_lines,
    split_paths,
)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "a.jsonl.0123.index", ".a.jsonl.ff.partial", "c.jsonl.partial", "d.txt"):
        (tmp_path / name).touch()
    (tmp_path / "e.jsonl").mkdir()
    return tmp_path


def test_order_and_derived_files(directory):
    assert expand_paths("inputs", "*") == ["a.jsonl", "b.jsonl", "d.txt"]
    assert expand_path_groups("inputs", " d.txt, *.jsonl,") == [
        ("d.txt", ["d.txt"]),
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
    ]


@pytest.mark.parametrize("name", ["a[1].jsonl", "a,b.jsonl", "a?.jsonl", "12:30.jsonl"])
def test_an_existing_file_has_precedence_over_lists_and_globs(directory, name):
    (directory / name).touch()
    assert expand_paths("inputs", name) == [name]
    if "," not in name:
        assert expand_paths("inputs", f"d.txt,{name}") == ["d.txt", name]


@pytest.mark.parametrize(
    "value, message",
    [
        ("", "--inputs is empty"),
        ("a.jsonl,z.jsonl", "--inputs=a.jsonl,z.jsonl: no such file: z.jsonl"),
        ("e.jsonl", r"--inputs=e.jsonl: is a directory \(name files, or a glob such as e.jsonl/\*.jsonl\): e.jsonl"),
        ("*.png", r"--inputs=\*.png: no file matches: \*.png"),
    ],
)
def test_missing_files_are_named(directory, value, message):
    with pytest.raises(UserError, match=f"^{message}"):
        expand_paths("inputs", value)


def test_remote_globs():
    for name in ("2.jsonl", "1.jsonl"):
        with fsspec.open(f"memory://globs/{name}", "wb") as file:
            file.write(b"{}\n")
    assert expand_paths("inputs", "memory://globs/*.jsonl") == ["memory:///globs/1.jsonl", "memory:///globs/2.jsonl"]


def test_a_store_that_cannot_be_reached_is_not_a_missing_file(monkeypatch):
    """fsspec's `isfile` and `exists` do not tell them apart."""
    with fsspec.open("memory://outage/a.jsonl", "wb") as file:
        file.write(b"{}\n")
    assert path_exists("memory://outage/a.jsonl") and not path_exists("memory://outage/b.jsonl")
    with pytest.raises(UserError, match=r"^memory://outage/b.jsonl: no such file$") as e:
        file_version("memory://outage/b.jsonl")
    assert not isinstance(e.value, UnavailableError)

    def info(*arguments, **options):
        raise PermissionError("access denied")

    monkeypatch.setattr(MemoryFileSystem, "info", info)
    monkeypatch.setattr(MemoryFileSystem, "isfile", AbstractFileSystem.isfile)
    for look in (path_exists, file_version, lambda path: expand_paths("inputs", path)):
        with pytest.raises(UnavailableError, match=r"memory://outage/a.jsonl|not reachable \(PermissionError: access"):
            look("memory://outage/a.jsonl")


@pytest.mark.parametrize("pattern", ["?/*.jsonl", "**/*.jsonl", "b/*"])
def test_a_glob_leaves_out_no_folder_that_cannot_be_listed(monkeypatch, pattern):
    """fsspec's `glob` does."""
    root = "memory://partial"
    for name in ("a/1.jsonl", "b/2.jsonl", "b/c/3.jsonl", "4.jsonl"):
        with fsspec.open(f"{root}/{name}", "wb") as file:
            file.write(b"{}\n")
    expected = {"?/*.jsonl": ["a/1", "b/2"], "**/*.jsonl": ["4", "a/1", "b/2", "b/c/3"], "b/*": ["b/2"]}
    paths = expand_paths("inputs", f"{root}/{pattern}")
    assert paths == [f"memory:///partial/{name}.jsonl" for name in expected[pattern]]
    ls = MemoryFileSystem.ls

    def failing(self, path, *arguments, **options):
        if path.endswith("/b"):
            raise ConnectionResetError("connection reset")
        return ls(self, path, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "ls", failing)
    with pytest.raises(UnavailableError, match=r"^--inputs=.*memory://partial/.*not reachable \(ConnectionResetError"):
        expand_paths("inputs", f"{root}/{pattern}")


def test_globs_of_missing_folders_and_of_parts_of_names():
    with pytest.raises(UserError, match="no file matches"):
        expand_paths("inputs", "memory://nowhere/*.jsonl")
    with pytest.raises(UserError, match=r"'\*\*' can only be an entire path component: memory://nowhere/a\*\*$"):
        expand_paths("inputs", "memory://nowhere/a**")


def test_a_failing_read_names_the_file(monkeypatch):
    with fsspec.open("memory://outage/b.jsonl", "wb") as file:
        file.write(b"{}\n" * 9)

    def fail(*arguments):
        raise ConnectionResetError("connection reset")

    monkeypatch.setattr(MemoryFile, "read", fail)
    with pytest.raises(UnavailableError, match=r"^memory://outage/b\.jsonl: not reachable \(ConnectionResetError"):
        list(read_lines("memory://outage/b.jsonl"))


def test_http_calls_a_file_missing_after_any_error():
    class StatusError(Exception):
        def __init__(self, status):
            self.status = status

    for cause, expected in {
        None: FileNotFoundError,
        StatusError(404): FileNotFoundError,
        StatusError(503): UnavailableError,
        ConnectionResetError(): UnavailableError,
    }.items():
        with pytest.raises(expected), names_store_errors("https://host/a.tar"):
            raise FileNotFoundError("https://host/a.tar") from cause


def test_outputs_are_checked(directory):
    check_output("new/directory/out.jsonl", "output_file")
    assert pathlib.Path("new/directory").is_dir() and not list(pathlib.Path("new/directory").iterdir())
    with pytest.raises(UserError, match=r"^--output_file=new: is a folder, name a file"):
        check_output("new", "output_file")
    with pytest.raises(UserError, match=r"^a.jsonl/out: cannot be written \(a.jsonl is a file, not a folder\)$"):
        check_output("a.jsonl/out")
    pathlib.Path("link.jsonl").symlink_to("a.jsonl")
    for path in ("a.jsonl", str(directory / "a.jsonl"), "link.jsonl"):
        check_output(path, "output_json", ["", "b.jsonl", "s3://bucket/a.jsonl"])
        with pytest.raises(UserError, match=rf"^--output_json={path}: is an input of this command, name another file$"):
            check_output(path, "output_json", ["b.jsonl", "a.jsonl"])


@pytest.mark.parametrize("name", ["out.jsonl.gz", "OUT.JSONL.ZST", "."])
def test_plain_text_is_not_written_under_the_name_of_compressed_text(name):
    check_plain_file("out.jsonl", "output_file")
    message = rf"^--output_file={re.escape(name)}: must be a plain file, not a folder, .gz or .zst$"
    with pytest.raises(UserError, match=message):
        check_plain_file(name, "output_file")


def test_comma_lists_of_folders(directory):
    assert split_paths("a, b,,c ") == ["a", "b", "c"] and split_paths("") == []
    pathlib.Path("x, y").mkdir()
    assert split_paths("x, y") == ["x, y"]


@pytest.mark.parametrize(
    "suffix, compress",
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".ZST", lambda data: zstandard.compress(data[:9]) + zstandard.compress(data[9:])),
    ],
)
def test_lines(tmp_path, suffix, compress):
    path = tmp_path / f"lines.txt{suffix}"
    path.write_bytes(compress(b"one\r\n\n  \ntwo words\nlast"))
    assert list(read_lines(str(path))) == [(1, b"one"), (4, b"two words"), (5, b"last")]


@pytest.mark.parametrize("suffix, compress", [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_truncated_compressed_files_are_refused(tmp_path, suffix, compress):
    path = tmp_path / f"lines.txt{suffix}"
    path.write_bytes(compress(b"one\ntwo\n" * 100)[:-5])
    with pytest.raises(UserError, match=rf"^{path}: cannot be decompressed after line \d+ \("):
        list(read_lines(str(path)))


def test_lines_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"good\ncaf\xe9\n")
    with pytest.raises(UserError, match=f"^{path}:2: not UTF-8 text"):
        list(read_text_lines(str(path)))


def test_line_starts(tmp_path):
    path = tmp_path / "two.txt"
    path.write_bytes(b"one\ntwo\n")
    for offset in (0, 4, 8):
        check_line_start(str(path), offset)
    for offset in (-1, 1, 3, 9):
        with pytest.raises(UserError, match=rf"no line of {path} \(8 bytes\) starts at byte {offset}"):
            check_line_start(str(path), offset)
