"""Atomic writes: a complete file or none, and no temporary file afterwards."""

import errno
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from EasyLM.storage import atomic, atomic_file, atomic_path, processes, write_json


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    return path


def test_the_file_changes_only_at_the_end(target):
    with atomic_file(target) as file:
        file.write(b"new")
        file.flush()
        assert target.read_text() == "old"
    assert target.read_text() == "new" and os.listdir(target.parent) == ["out.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_nothing_else(target, error):
    with pytest.raises(error):
        with atomic_file(target) as file:
            file.write(b"half of the ne")
            raise error
    assert target.read_text() == "old" and os.listdir(target.parent) == ["out.txt"]


def test_a_failed_rename_leaves_no_temporary_file(target, monkeypatch):
    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(target, {})
    assert target.read_text() == "old" and os.listdir(target.parent) == ["out.txt"]


@pytest.mark.parametrize("sync", [True, False])
def test_sync_flushes_before_the_rename(target, monkeypatch, sync):
    calls = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(atomic.os, "fsync", lambda descriptor: calls.append("fsync") or fsync(descriptor))
    monkeypatch.setattr(atomic.os, "replace", lambda *paths: calls.append("rename") or replace(*paths))
    with atomic_path(target, sync=sync) as temporary:
        pathlib.Path(temporary).write_text("new")
    assert calls == ["fsync", "rename"] if sync else ["rename"]
    assert target.read_text() == "new"


def test_two_writers_do_not_share_a_temporary_file(target):
    with atomic_file(target) as first, atomic_file(target) as second:
        first.write(b"first")
        second.write(b"second")
    assert target.read_text() == "first"  # the outer one is renamed last
    assert os.listdir(target.parent) == ["out.txt"]


def test_permissions_are_those_of_an_ordinary_file(target):
    ordinary = target.with_name("ordinary")
    ordinary.touch()
    with atomic_file(target):
        pass
    assert target.stat().st_mode == ordinary.stat().st_mode


def test_write_json(target):
    write_json(target, {"loss": np.float32(0.5), "codes": np.arange(3), "worst": float("inf"), "name": "é"})
    assert json.loads(target.read_text()) == {"loss": 0.5, "codes": [0, 1, 2], "worst": None, "name": "é"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_with_the_file(tmp_path, number):
    path = tmp_path / "out.jsonl"
    with pytest.raises(OSError, match=re.escape(f"{os.strerror(number)}: '{path}'")):
        with atomic_path(path):
            raise OSError(number, os.strerror(number))  # as `write` raises it
    with pytest.raises(OSError, match=r"the other$"):
        with atomic_path(path):
            raise OSError(errno.EIO, "reading the other")
    assert not list(tmp_path.iterdir())


def test_a_scratch_folder_lies_beside_the_path_and_is_deleted(target):
    with pytest.raises(KeyboardInterrupt), atomic.scratch_folder(target) as folder:
        assert os.listdir(folder) == [] and os.path.dirname(folder) == str(target.parent)
        (pathlib.Path(folder) / "part").touch()
        raise KeyboardInterrupt
    assert os.listdir(target.parent) == ["out.txt"]


def test_a_folder_of_another_process_is_not_deleted(target, monkeypatch):
    """Its name is taken: the error comes before anything is removed."""
    monkeypatch.setattr(atomic, "_temporary_name", lambda path: f"{path}.partial")
    other = target.with_name("out.txt.partial")
    other.mkdir()
    (other / "part").touch()
    with pytest.raises(FileExistsError), atomic.scratch_folder(target):
        pytest.fail("the folder is not ours")
    assert os.listdir(other) == ["part"]


def test_leftovers_of_processes_that_are_gone_are_deleted(target):
    """Also of a zombie's successor with the same id; not those of living processes, other hosts or other files."""
    own = processes.owner_tag()
    gone = own.rpartition("-")[0] + "-1"
    kept = {
        f".out.txt.{own}.0.partial",
        ".out.txt.0123abcd-1-1.0.partial",
        f".other.{gone}.0.partial",
        ".out.txt.x.partial",
    }
    for name in (*kept, f".out.txt.{gone}.0.partial"):
        target.with_name(name).touch()
    target.with_name(f".out.txt.{gone}.1.partial").mkdir()
    (target.with_name(f".out.txt.{gone}.1.partial") / "part").touch()
    atomic.remove_leftovers(target)
    assert set(os.listdir(target.parent)) == kept | {"out.txt"}


def test_temporary_files_name_their_process(target):
    with atomic_path(target) as temporary:
        tag = os.path.basename(temporary).removeprefix(".out.txt.").partition(".")[0]
        assert str(os.getpid()) in tag and not processes.is_gone(tag)
    process = subprocess.run(
        [sys.executable, "-c", "from EasyLM.storage.processes import owner_tag; print(owner_tag())"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert processes.is_gone(process.stdout.strip())
