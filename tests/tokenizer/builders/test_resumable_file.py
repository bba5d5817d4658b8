"""A resumable file survives SIGKILL, is locked against other builds, and is renamed before its lock is released."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from EasyLM.errors import UserError
from EasyLM.storage import LockedError
from tokenizer.builders import resumable_file


def test_after_a_kill_before_the_rename_an_older_file_does_not_pass_as_finished(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"

    def write(seed):
        with contextlib.closing(resumable_file.ResumableFile(str(path), {"seed": seed}, fresh=False)) as file:
            file.claim()
            if file.finished_report is None:
                file.write(b"seed %d\n" % seed)
                file.finish({})

    write(0)
    with monkeypatch.context() as patch:
        replace = os.replace

        def killed(source, target):
            if target == str(path):
                raise KeyboardInterrupt
            replace(source, target)

        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(1)
    assert path.read_bytes() == b"seed 0\n"
    write(1)
    assert path.read_bytes() == b"seed 1\n" and set(os.listdir(tmp_path)) == {"out.jsonl", "out.jsonl.report.json"}


def test_a_process_that_has_lost_its_lock_writes_nothing_when_it_closes(tmp_path):
    """A suspended process wakes up after another one has taken over the file."""
    path = tmp_path / "out.jsonl"
    suspended = resumable_file.ResumableFile(str(path), {}, fresh=False)
    suspended.claim()
    suspended.write(b"saved\n")
    suspended.save({})
    suspended.write(b"late\n")
    with open(f"{path}.partial", "ab") as of_the_new_owner:
        of_the_new_owner.write(b"new\n")
    suspended.close()
    assert (tmp_path / "out.jsonl.partial").read_bytes() == b"saved\nnew\n"


def test_the_file_is_renamed_before_the_lock_is_released(tmp_path, monkeypatch):
    path, os_replace, refused = str(tmp_path / "out.jsonl"), os.replace, []
    first = resumable_file.ResumableFile(path, {}, fresh=False)
    first.claim()
    first.write(b"a line\n")
    first.save({})

    def replace(source, target):
        if target == path:
            with pytest.raises(LockedError, match=r"out\.jsonl: in use by process"):
                resumable_file.ResumableFile(path, {}, fresh=False).claim()
            refused.append(target)
        os_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    first.finish({})
    assert refused == [path]
    assert (tmp_path / "out.jsonl").read_bytes() == b"a line\n"


def test_two_builds_of_one_file_do_not_mix(tmp_path):
    path = str(tmp_path / "out.jsonl")
    first = resumable_file.ResumableFile(path, {"seed": 0}, fresh=False)
    first.claim()
    first.write(b"one\n")
    first.save({})
    for seed, fresh in ((0, False), (1, True)):
        second = resumable_file.ResumableFile(path, {"seed": seed}, fresh)
        with pytest.raises(LockedError, match=r"out\.jsonl: in use by process"):
            second.claim()
    with pytest.raises(AssertionError, match="claim the file first"):
        resumable_file.ResumableFile(path, {"seed": 1}, fresh=True).write(b"two\n")
    first.write(b"three\n")
    first.finish({})
    assert (tmp_path / "out.jsonl").read_bytes() == b"one\nthree\n"


def test_the_progress_is_that_of_the_claim(tmp_path):
    """After the second process has opened the file, the first one goes on with it, and ends before the claim."""
    path = str(tmp_path / "out.jsonl")
    first = resumable_file.ResumableFile(path, {}, fresh=False)
    first.claim()
    first.write(b"one\n")
    first.save({"lines": 1})
    second = resumable_file.ResumableFile(path, {}, fresh=False)
    assert second.state is None
    first.write(b"two\n")
    first.save({"lines": 2})
    first.close()
    second.claim()
    assert second.state == {"lines": 2}
    second.write(b"three\n")
    second.finish({})
    assert (tmp_path / "out.jsonl").read_bytes() == b"one\ntwo\nthree\n"


def test_nothing_is_removed_without_the_lock(tmp_path, monkeypatch):
    """Another process can have saved its progress as soon as the lock is released."""
    path = str(tmp_path / "out.jsonl")
    is_locked, remove = {}, resumable_file._remove

    def record(name):
        is_locked[os.path.basename(name)] = (tmp_path / ".out.jsonl.lock").exists()
        remove(name)

    monkeypatch.setattr(resumable_file, "_remove", record)
    with contextlib.closing(resumable_file.ResumableFile(path, {}, fresh=False)) as file:
        file.claim()
        file.write(b"a line\n")
        file.save({})
        is_locked.clear()
        file.finish({})
    assert is_locked == {"out.jsonl.progress.json": True}
    is_locked.clear()
    (tmp_path / "out.jsonl.progress.json").write_text("{}")  # as if `finish` had been killed after the rename
    with contextlib.closing(resumable_file.ResumableFile(path, {}, fresh=False)) as file:
        assert file.finished_report["bytes"] == 7
    assert is_locked == {"out.jsonl.progress.json": True}
    assert set(os.listdir(tmp_path)) == {"out.jsonl", "out.jsonl.report.json"}


def test_a_claim_sees_what_another_build_has_finished(tmp_path):
    path = str(tmp_path / "out.jsonl")
    file = resumable_file.ResumableFile(path, {}, fresh=False)
    other = resumable_file.ResumableFile(path, {}, fresh=False)
    other.claim()
    with pytest.raises(LockedError, match=r"out\.jsonl: in use by process"):
        file.claim()
    other.write(b"a line\n")
    other.finish({})
    file.claim()
    file.close()
    assert file.finished_report == {"bytes": 7, "identity": {}}
    assert set(os.listdir(tmp_path)) == {"out.jsonl", "out.jsonl.report.json"}


def test_what_a_killed_build_has_left_is_deleted(tmp_path):
    """Its lock, and the files that it was writing beside the partial file."""
    program = """
import os, signal, sys
from EasyLM.storage import atomic
from tokenizer.builders.resumable_file import ResumableFile
file = ResumableFile(sys.argv[1], {}, fresh=False)
file.claim()
file.write(b"one\\n")
file.save({})
atomic.os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
file.save({})
"""
    path = str(tmp_path / "out.jsonl")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program, path], env=environment).returncode == -signal.SIGKILL
    hidden = sorted(name for name in os.listdir(tmp_path) if name.startswith("."))
    assert len(hidden) == 2 and hidden[0] == ".out.jsonl.lock" and hidden[1].startswith(".out.jsonl.progress.json.")
    with contextlib.closing(resumable_file.ResumableFile(path, {}, fresh=False)) as file:
        file.claim()
        file.write(b"two\n")
        file.finish({})
    assert (tmp_path / "out.jsonl").read_bytes() == b"one\ntwo\n"
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "lacks the key 'identity'"),
        ('{"identity": {}, "bytes": "4", "state": {}}', "bytes must be an integer"),
        ('{"identity": {}, "bytes": 4, "state": []}', "state must be an object"),
    ],
)
def test_damaged_progress_is_named(tmp_path, text, message):
    path = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.partial").write_bytes(b"one\n")
    progress = tmp_path / "out.jsonl.progress.json"
    progress.write_text(text)
    with pytest.raises(UserError, match=rf"^{progress}: {message}.*; delete {path}\.partial to start again"):
        resumable_file.ResumableFile(str(path), {}, fresh=False).claim()
    for fresh in (True, False):
        with contextlib.closing(resumable_file.ResumableFile(str(path), {}, fresh)) as file:
            file.claim()
        (tmp_path / "out.jsonl.partial").unlink(missing_ok=True)  # as the message says


@pytest.mark.parametrize("size", [-1, 5])
def test_progress_that_does_not_fit_the_file_is_named(tmp_path, size):
    (tmp_path / "out.jsonl.partial").write_bytes(b"one\n")
    (tmp_path / "out.jsonl.progress.json").write_text(f'{{"identity": {{}}, "bytes": {size}, "state": {{}}}}')
    with pytest.raises(UserError, match=r"out\.jsonl\.partial does not fit its saved progress: delete it to start"):
        resumable_file.ResumableFile(str(tmp_path / "out.jsonl"), {}, fresh=False).claim()
    assert not (tmp_path / ".out.jsonl.lock").exists()


def test_a_damaged_report_is_named(tmp_path):
    (tmp_path / "out.jsonl").write_bytes(b"one\n")
    report = tmp_path / "out.jsonl.report.json"
    report.write_text('{"bytes": "4"}')
    with pytest.raises(UserError, match=rf"{report}: bytes must be an integer.*; delete {report} to start again"):
        resumable_file.ResumableFile(str(tmp_path / "out.jsonl"), {}, fresh=False)
    report.unlink()
    assert resumable_file.ResumableFile(str(tmp_path / "out.jsonl"), {}, fresh=False).finished_report is None
