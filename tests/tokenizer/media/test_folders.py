"""Folders are listed completely, by extension, and through links without loops. Errors name the flag."""

import os
import pathlib
import socket

import pytest
from tokenizer_kit import write_image

from EasyLM.errors import UserError
from tokenizer.media import folders, images


def test_images_are_listed_by_name(tmp_path):
    for name in ("b/2.png", "b/1.JPG", "a.png", "a-1.png", "notes.txt", ".hidden.png", ".cache/3.png", "c.png/4.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "link.png")
    names = [path.relative_to(tmp_path).as_posix() for path in folders.list_images(str(tmp_path), "input_dir")]
    assert names == ["a-1.png", "a.png", "b/1.JPG", "b/2.png", "c.png/4.gif", "link.png"]
    sizes = {entry.name: entry.size for entry in folders.walk(str(tmp_path), "input_dir", (".txt",))}
    assert sizes == {"notes.txt": 1}
    errors = {"none": "no such folder", "a.png": "is a file, not a folder", "b": "contains no file with extension .mp4"}
    for name, message in errors.items():
        with pytest.raises(UserError, match=f"--input_dir=.*: {message}"):
            list(folders.walk(str(tmp_path / name), "input_dir", (".mp4",)))


def test_ignored_files_are_reported_by_extension(tmp_path, capsys, monkeypatch):
    for name in ("1.png", "a/2.HEIC", "a/3.heic", "notes.txt", "README", ".hidden.txt", ".git/4.txt", "5.1", "5.2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert folders.list_images(str(tmp_path), "input_dir") == [tmp_path / "1.png"]
    listing = "2 .heic, 1 .1, 1 .2, 1 .txt, 1 without extension\n"
    assert capsys.readouterr().err == f"--input_dir={tmp_path}: ignored files with other extensions: {listing}"
    (tmp_path / "5.2").rename(tmp_path / os.fsdecode(b"5.\xe9"))  # a name that is not UTF-8
    folders.list_images(str(tmp_path), "input_dir")
    assert "1 .1, 1 .?, 1 .txt" in capsys.readouterr().err
    monkeypatch.setattr(folders, "_MAX_NAMED_EXTENSIONS", 0)
    folders.list_images(str(tmp_path), "input_dir")
    assert capsys.readouterr().err.endswith(": 6 with further extensions\n")


def test_linked_folders_are_followed_except_loops(tmp_path):
    for name in ("in/own/1.png", "elsewhere/2.png", "elsewhere/deep/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    root = tmp_path / "in"
    for link, target in {
        root / "linked": tmp_path / "elsewhere",
        root / "again": tmp_path / "elsewhere",
        root / "own" / "up": root,
        tmp_path / "elsewhere" / "deep" / "round": tmp_path / "elsewhere",
        root / "self.png": root / "self.png",
    }.items():
        os.symlink(target, link)
    names = [path.relative_to(root).as_posix() for path in folders.list_images(str(root), "input_dir")]
    linked = [f"{link}/{name}" for link in ("again", "linked") for name in ("2.png", "deep/3.png")]
    assert names == [*linked, "own/1.png", "self.png"]


def list_and_report(directory) -> tuple[list[str], dict[str, str]]:
    reported: dict[str, str] = {}
    paths = folders.list_images(str(directory), "input_dir", reported.__setitem__)
    assert all(reason.startswith(f"{path}: ") for path, reason in reported.items())
    return [path.name for path in paths], {os.path.basename(path): reason for path, reason in reported.items()}


def test_names_that_are_not_utf8_are_reported(tmp_path):
    (tmp_path / "good.png").write_bytes(b"x")
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    (tmp_path / os.fsdecode(b"\xff")).mkdir()
    (tmp_path / os.fsdecode(b"\xff/in.png")).write_bytes(b"x")
    names, reported = list_and_report(tmp_path)
    assert names == ["good.png"] and reported.keys() == {r"caf\xe9.png", "in.png"}
    assert r"caf\xe9.png' is not UTF-8; rename the file" in reported[r"caf\xe9.png"]
    with pytest.raises(UserError, match=r"caf\\xe9.png' is not UTF-8|xff/in.png' is not UTF-8"):
        folders.list_images(str(tmp_path), "input_dir")
    with pytest.raises(UserError, match=r"--input_dir=.*\\xff: the name is not UTF-8"):
        folders.list_images(os.fsdecode(bytes(tmp_path) + b"/\xff"), "input_dir")


def test_folders_that_cannot_be_listed_are_reported(tmp_path, monkeypatch):
    """The superuser may list every folder, so the test replaces the system call."""
    for name in ("a/1.png", "closed/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    scandir = os.scandir

    def scan(path):
        if path.endswith("closed/"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    names, reported = list_and_report(tmp_path)
    assert names == ["1.png"]
    assert reported == {"closed": f"{tmp_path}/closed: cannot be listed (Permission denied)"}


def test_files_by_stem_and_names_in_natural_order():
    paths = [pathlib.Path("d/b/2.png"), pathlib.Path("d/a.jpg")]
    assert folders.by_stem(paths, "d", "input_dir") == {"b/2": paths[0], "a": paths[1]}
    with pytest.raises(UserError, match=r"--input_dir=d: a\.jpg and a\.png share the stem 'a'"):
        folders.by_stem([*paths, pathlib.Path("d/a.png")], "d", "input_dir")
    names = ["f10", "f9", "f09", "f9a", "g1"]
    assert sorted(names, key=folders.natural_key) == ["f09", "f9", "f9a", "f10", "g1"]


def test_pipes_sockets_and_devices_are_reported_and_not_read(tmp_path):
    """Opening a pipe without a writer waits forever."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.png"))
    write_image(tmp_path / "image.png", 0)
    (tmp_path / "missing.png").symlink_to("gone.png")  # reported when it is read
    names, reported = list_and_report(tmp_path)
    assert names == ["image.png", "missing.png"]
    assert reported.keys() == {"pipe.png", "link.png", "device.png", "socket.png"}
    for name in reported:
        with pytest.raises(UserError, match=f"{name}: is not a file"):
            images.read(tmp_path / name, 8)
