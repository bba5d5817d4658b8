"""Which source a value names, and the files of ranges and globs."""

import collections

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from source_kit import tar_bytes, write_remote

from EasyLM.errors import UserError
from tokenizer.media import folders
from tokenizer.sources.detection import expand, find_source
from tokenizer.sources.local import LocalFolder
from tokenizer.sources.remote import RemoteFolder
from tokenizer.sources.tables import Tables
from tokenizer.sources.tars import Tars


def test_ranges_and_globs_name_each_file_once(tmp_path):
    for name in ("a1.tar", "a02.tar", "b1.tar", "c{1..2}.tar", "d12.tar"):
        (tmp_path / name).touch()
    (tmp_path / "folder.tar").mkdir()

    def names(value: str) -> list[str]:
        return [path.removeprefix(f"{tmp_path}/") for path in expand(f"{tmp_path}/{value}", "--input_dir=x")]

    assert names("x{08..11}.tar") == ["x08.tar", "x09.tar", "x10.tar", "x11.tar"]
    assert names("x{8..010}.tar") == names("x{08..010}.tar") == ["x008.tar", "x009.tar", "x010.tar"]  # as in shells
    assert names("x{0..10}.tar") == [f"x{i}.tar" for i in range(11)]
    assert names("x{8..10}_{0..1}.tar") == [f"x{i}_{j}.tar" for i in (8, 9, 10) for j in (0, 1)]
    for name in ("n10.tar", "n9.tar"):
        (tmp_path / name).touch()
    assert names("n*.tar") == names("n{9..10}.tar") == ["n9.tar", "n10.tar"]
    assert names("d*{1..2}*.tar") == ["d12.tar"]  # it matches both
    assert names("c{1..2}.tar") == ["c{1..2}.tar"]  # the file exists
    with pytest.raises(UserError, match="more than 1000000 files"):
        names("{0..999}_{0..9999}.tar")
    write_remote(f"memory:/{tmp_path}", {"r1.tar": b"", "r2.tar": b"", "s.tar": b""})
    remote = [path.removeprefix(f"memory://{tmp_path}/") for path in expand(f"memory:/{tmp_path}/r*.tar", "x")]
    assert remote == ["r1.tar", "r2.tar"]


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_folder_is_what_it_holds(tmp_path, is_remote):
    """Other files beside images change nothing; the parquet files beside tars hold metadata."""
    folders = {
        LocalFolder: {"x.tar": b"", "y.parquet": b"", "below/1.PNG": b""},
        Tars: {"below/x.tar": tar_bytes({"1.png": b"1"}), "x.parquet": b"", "x.json": b""},
        Tables: {"y/train.parquet": b"", "x.json": b""},
    }
    for kind, files in folders.items():
        root = f"memory:/{tmp_path}/{kind.__name__}" if is_remote else str(tmp_path / kind.__name__)
        write_remote(root if is_remote else f"file://{root}", files)
        source = find_source(root, "input_dir", (".png",))
        assert isinstance(source, RemoteFolder if is_remote and kind is LocalFolder else kind)
        if kind is not LocalFolder:
            (name,) = (name for name in files if name.endswith((".tar", ".parquet")) and "/" in name)
            assert source.paths == [f"{root}/{name}"]
    empty = f"memory:/{tmp_path}/empty" if is_remote else str(tmp_path / "empty")
    write_remote(empty if is_remote else f"file://{empty}", {"a.txt": b""})
    with pytest.raises(UserError, match=r"empty: contains no file with extension .png, .tar, .parquet$"):
        find_source(empty, "input_dir", (".png",))


@pytest.mark.parametrize("is_remote", [False, True])
@pytest.mark.parametrize("others", [{}, {"a/0.tar": tar_bytes({"1.png": b"1"})}])
def test_compressed_tars_in_a_folder_of_tars_are_not_left_out(tmp_path, is_remote, others):
    root = f"memory:/{tmp_path}" if is_remote else f"file://{tmp_path}"
    write_remote(root, {"b/1.Tar.GZ": b"", "b/x.json.gz": b"", **others})
    value = root if is_remote else str(tmp_path)
    message = rf"^--input_dir={value}: b/1\.Tar\.GZ: a compressed tar cannot be read at random, decompress it$"
    for keys in ((), ("png",)):
        with pytest.raises(UserError, match=message):
            find_source(value, "input_dir", (".png",), keys)
    write_remote(root, {"0.parquet": b""})
    columns = ("image",) if others else ()  # tables beside tars are metadata, unless a column is given
    assert isinstance(find_source(value, "input_dir", (".png",), (), columns), Tables)
    write_remote(root, {"1.png": b""})
    assert isinstance(find_source(value, "input_dir", (".png",)), RemoteFolder if is_remote else LocalFolder)


def test_a_remote_subfolder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    url = write_remote(f"memory:/{tmp_path}/in", {"a/1.png": b"1", "b/c/2.png": b"2", ".d/3.png": b"3"})
    source = find_source(url, "input_dir", (".png",))
    assert sorted(item.name for item in source.items(collections.Counter(), folders.refuse)) == ["a/1.png", "b/c/2.png"]
    listing = MemoryFileSystem.ls

    def refuses(system, path, **options):
        if path.endswith("/c"):
            raise PermissionError("access denied")
        return listing(system, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "ls", refuses)
    with pytest.raises(UserError, match=r"--input_dir=memory:.*/in: not reachable \(PermissionError: access denied\)"):
        list(source.items(collections.Counter(), folders.refuse))


def test_keys_are_compared_without_case(tmp_path):
    path = tmp_path / "in.tar"
    path.write_bytes(tar_bytes({"a.jpg": b"1"}))
    (item,) = find_source(str(path), "input_dir", (".jpg",), ("JPG",)).items(collections.Counter(), folders.refuse)
    assert item.name == "a.jpg"
