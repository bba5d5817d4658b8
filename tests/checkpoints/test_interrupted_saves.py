"""A save that fails or is killed leaves the previous checkpoint."""

import errno
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import pytest
from checkpoint_kit import (
    METADATA,
    contents,
    make_checkpointer,
    save,
    small_state,
)

from EasyLM.checkpoints import SavedPart, has_interrupted_save, listing, run_directory, streaming
from EasyLM.checkpoints.run_directory import open_run_directory
from EasyLM.errors import UserError


def test_temporary_files_of_a_killed_run_are_deleted(tmp_path):
    save(make_checkpointer(tmp_path), 1)
    leftover = tmp_path / "checkpoints" / ".tmp-7"
    leftover.mkdir()
    (leftover / "streaming_train_state").write_bytes(b"half")
    os.symlink("nowhere", tmp_path / ".tmp-link")
    save(make_checkpointer(tmp_path), 2)
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000002"]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".tmp")]


def test_another_start_leaves_the_files_of_a_running_process(tmp_path, monkeypatch):
    """The process may have lost its lock while it was suspended. The other start prepares in the middle of its save."""
    saver, write_rows = make_checkpointer(tmp_path), streaming.write_rows

    def prepare_another(*arguments):
        open_run_directory(str(tmp_path)).prepare()
        write_rows(*arguments)

    monkeypatch.setattr(streaming, "write_rows", prepare_another)
    save(saver, 1)
    assert contents(str(tmp_path)) == (1, 1, 1)


def test_files_of_other_hosts_are_deleted_in_one_step(tmp_path, monkeypatch):
    """Such a process cannot be asked whether it runs. If it does, its save finds all of its files, or none."""
    saver, rmtree = make_checkpointer(tmp_path), shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "owner_tag", lambda: "0123abcd-77-123")
        interrupted = saver._directory.begin(7)
    (pathlib.Path(interrupted) / "streaming_train_state").write_bytes(b"half")

    def check(path, **options):
        assert not os.path.exists(interrupted) or "probe" in path
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", check)
    make_checkpointer(tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("run_dir", ["memory://guarded/run", None])
def test_a_run_that_loses_its_directory_during_a_save_publishes_nothing(tmp_path, run_dir):
    run_dir, calls = run_dir or str(tmp_path), []

    def guard():
        calls.append(len(listing.list_checkpoints(run_dir)))
        if len(calls) == 4:
            raise UserError("another process took over the directory")

    saver = make_checkpointer(run_dir, guard=guard)
    save(saver, 1)
    with pytest.raises(UserError, match="took over"):
        save(saver, 2)
    assert contents(run_dir) == (1, 1, 1) and calls == [0, 0, 1, 1]
    assert not has_interrupted_save(run_dir)


@pytest.mark.parametrize("gone", ["", "checkpoints"])
@pytest.mark.parametrize(
    "first_step, outcome", [(1, "the earlier ones no longer exist"), (2, "there is no earlier one")]
)
def test_a_directory_that_is_deleted_during_the_run_is_named(tmp_path, gone, first_step, outcome):
    saver = make_checkpointer(tmp_path / "run")
    for step in range(first_step, 2):
        save(saver, step)
    shutil.rmtree(tmp_path / "run" / gone)
    missing = rf"No such file or directory: {tmp_path}/run/checkpoints/\.tmp-2-\S+"
    with pytest.raises(UserError, match=rf"^{tmp_path}/run: the checkpoint was not saved \({missing}\); {outcome}$"):
        save(saver, 2)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_disk_without_room_for_a_checkpoint_is_named_before_the_first_step(tmp_path, monkeypatch, caplog, missing):
    state, part = small_state(1), SavedPart(save_optimizer_state=True)
    usage = shutil.disk_usage(tmp_path)._replace(free=part.sizes(state)[0] - missing)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    saver = make_checkpointer(tmp_path)
    saver.prepare(state)
    saver.close()
    assert (f"{tmp_path}: a checkpoint needs " in caplog.text) == bool(missing)


def test_disk_full_leaves_the_previous_checkpoint(tmp_path, monkeypatch, caplog):
    saver = make_checkpointer(tmp_path)
    save(saver, 1)
    written, write_rows = [], streaming.write_rows

    def full(file, layout, *rows):
        written.append(layout.key)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_rows(file, layout, *rows)

    monkeypatch.setattr(streaming, "write_rows", full)
    before = sorted(os.walk(tmp_path))
    saver.save(small_state(2), 2, {"step": 2}, {"step": 2}, milestone=True)
    reason = r"was not saved \(No space left on device\); checkpoints/step_00000001 is intact"
    with pytest.raises(UserError, match=f"{tmp_path}: the checkpoint {reason}"):
        saver.save(small_state(3), 3, {}, METADATA)
    assert sorted(os.walk(tmp_path)) == before and contents(str(tmp_path)) == (1, 1, 1)
    save(saver, 4)
    assert contents(str(tmp_path)) == (4, 4, 4)


@pytest.mark.slow
def test_file_size_limit_leaves_the_previous_checkpoint(tmp_path):
    """With a limit of the operating system instead of a mock."""
    program = f"""
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        from checkpoint_kit import make_checkpointer, save
        from EasyLM.errors import UserError
        saver = make_checkpointer({str(tmp_path)!r})
        save(saver, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        try:
            save(saver, 2)
        except UserError as error:
            print(error)
    """
    message = run_python(program)
    assert "the checkpoint was not saved (File too large)" in message
    assert contents(str(tmp_path)) == (1, 1, 1) and os.listdir(tmp_path / "checkpoints") == ["step_00000001"]


def run_python(program: str) -> str:
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("milestone", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path, milestone):
    """Kills a save of step 2 before its first, second, ... change to the disk, until one completes."""
    program = f"""
        import os, signal, sys
        from checkpoint_kit import contents, make_checkpointer, save, streaming

        def killed_at(moment, run_dir):
            count = 0

            def tick(event, arguments=()):
                nonlocal count
                names = ("os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir", "open", "write")
                if event in names:
                    count += 1
                    if count == moment:
                        os.kill(os.getpid(), signal.SIGKILL)

            write_rows = streaming.write_rows

            def write(file, *rows):
                write_rows(file, *rows)
                file.flush()
                tick("write")

            streaming.write_rows = write
            saver = make_checkpointer(run_dir)
            sys.addaudithook(tick)
            save(saver, 2, {milestone})

        old = new = 0
        for moment in range(1, 100):
            run_dir = os.path.join({str(tmp_path)!r}, str(moment))
            save(make_checkpointer(run_dir), 1, True)
            child = os.fork()
            if child == 0:
                killed_at(moment, run_dir)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            state, data, metadata = contents(run_dir)
            assert state == data == metadata and state in (1, 2), (moment, state, data, metadata)
            old, new = old + (state == 1), new + (state == 2)
            save(make_checkpointer(run_dir), 3)
            assert contents(run_dir) == (3, 3, 3)
            assert not [name for name in os.listdir(run_dir + "/checkpoints") if "tmp" in name]
            if status == 0:
                break
        print(old, new, status)
    """
    old, new, status = map(int, run_python(program).split())
    assert status == 0 and old > 10 and new >= 2  # kills before and after the one move that counts
