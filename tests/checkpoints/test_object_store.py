"""A run directory on an object store that fails, or whose process is killed."""

import re
from collections.abc import Callable

import pytest
from checkpoint_kit import contents, make_checkpointer, save
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from EasyLM import checkpoints
from EasyLM.checkpoints.directories import file_sizes
from EasyLM.checkpoints.listing import open_saved
from EasyLM.errors import UnavailableError, UserError
from EasyLM.storage import HeartbeatLock

RUN = "memory://bucket/run"


class StoreError(Exception):
    """Clients of stores have errors of their own types: botocore.exceptions.ClientError, gcsfs.retry.HttpError."""


class Killed(BaseException):
    pass


class Objects(dict):
    """The objects of a store. From a given change on, the process counts as killed, and changes nothing."""

    left = 10**9

    def _change(self):
        self.left -= 1
        if self.left < 0:
            raise Killed

    def __setitem__(self, path, value):
        self._change()
        super().__setitem__(path, value)

    def __delitem__(self, path):
        self._change()
        super().__delitem__(path)


@pytest.fixture(autouse=True)
def objects(monkeypatch) -> Objects:
    objects = Objects()
    monkeypatch.setattr(MemoryFileSystem, "store", objects)
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    monkeypatch.setattr(MemoryFileSystem, "makedirs", lambda *arguments, **options: None)  # a store has no directories
    return objects


def fail(*arguments, **options):
    raise StoreError("SlowDown:\nreduce the rate")


def failing_for(function: str, file: str) -> Callable:
    """Returns the function of the store's client, which fails for paths that end with `file`."""
    original = getattr(MemoryFileSystem, function)

    def call(self, path, *arguments, **options):
        return (fail if path.endswith(file) else original)(self, path, *arguments, **options)

    return call


def step_directories() -> set[str]:
    return {saved.name for saved in checkpoints.list_checkpoints(RUN)}


def test_a_kill_at_any_change_leaves_whole_checkpoints_alone(objects):
    """No rest of a save or of a deletion is listed, and the next start deletes it."""
    outcomes = []
    for changes in range(100):
        objects.clear()
        save(make_checkpointer(RUN), 1)
        saver = make_checkpointer(RUN)
        objects.left = changes
        try:
            save(saver, 2)
        except Killed:
            outcomes.append("killed")
        objects.left = 10**9
        listed = checkpoints.list_checkpoints(RUN)
        assert [saved.problem for saved in listed if saved.name != "latest"] == [""] * len(listed), (changes, listed)
        for saved in listed:
            for entry in open_saved(saved, checkpoints.CHECKPOINT_FORMATS).entries:
                entry.read()
        step, *others = contents(RUN)
        assert step in (1, 2) and others == [step, step]
        outcomes.append(step)
        make_checkpointer(RUN)
        kept = {path.split("/checkpoints/")[1].split("/")[0] for path in objects if "/checkpoints/" in path}
        assert {f"checkpoints/{name}" for name in kept} == step_directories()
        if outcomes[-2:] != ["killed", step]:
            break
    assert outcomes.count(1) >= 5 and outcomes.count(2) >= 5 and kept == {"step_00000002"}


@pytest.mark.parametrize("failing", ["rm", "pipe_file", "rm_file"])
def test_an_error_after_a_complete_save_is_a_warning(monkeypatch, caplog, failing):
    """What was not done then is done after the next save."""
    saver = make_checkpointer(RUN)
    save(saver, 1)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, failing, fail)
        save(saver, 2)
        assert contents(RUN) == (2, 2, 2)
    assert re.search(r"step_0000000[12]: not reachable \(StoreError: SlowDown:\)", caplog.text)
    save(saver, 3)
    assert step_directories() == {"checkpoints/step_00000003"} and contents(RUN) == (3, 3, 3)


def test_a_save_that_fails_is_one_line(monkeypatch, caplog):
    saver = make_checkpointer(RUN)
    save(saver, 1)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "open", fail)
        reason = f"{RUN}/checkpoints/step_00000002: not reachable (StoreError: SlowDown:)"
        with pytest.raises(UserError, match=re.escape(f"{RUN}: the checkpoint was not saved ({reason}); ")):
            save(saver, 2)
        patch.setattr(MemoryFileSystem, "ls", fail)
        directory = f"{RUN}: not reachable (StoreError: SlowDown:)"
        with pytest.raises(UserError, match=re.escape(f"; the earlier ones cannot be listed ({directory})")):
            save(saver, 2)
        with pytest.raises(UnavailableError, match=f"^{re.escape(directory)}$"):
            checkpoints.list_checkpoints(RUN)
    assert contents(RUN) == (1, 1, 1)


def test_a_store_that_fails_at_the_start_leads_to_no_older_checkpoint(monkeypatch):
    """The newest one may be whole. Each error is one line."""
    saver = make_checkpointer(RUN, keep_latest=2)
    for step in (1, 2):
        save(saver, step)
    state = f"{RUN}/checkpoints/step_00000002/streaming_train_state"
    opened = checkpoints.open_checkpoint(f"trainstate::{state}")
    for function, file, path in (
        ("info", "streaming_train_state", state),
        ("info", "_METADATA", f"{state}/_METADATA"),
        ("open", "streaming_train_state", state),
        ("open", "step_00000002/metadata.json", f"{RUN}/checkpoints/step_00000002/metadata.json"),
        ("open", "step_00000002/dataset.json", f"{RUN}/checkpoints/step_00000002/dataset.json"),
    ):
        message = f"{path}: not reachable (StoreError: SlowDown:)"
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, function, failing_for(function, file))
            with pytest.raises(UnavailableError, match=f"^{re.escape(message)}$"):
                checkpoints.newest_whole(RUN, checkpoints.CHECKPOINT_FORMATS)
            if (function, path) == ("open", state):
                with pytest.raises(UnavailableError, match=f"^{re.escape(message)}$"):
                    opened[0].read()
    assert contents(RUN) == (2, 2, 2)


def test_an_outage_at_any_call_leads_to_no_older_checkpoint(monkeypatch):
    saver, calls, failing = make_checkpointer(RUN, keep_latest=2), [], []
    for step in (1, 2):
        save(saver, step)

    def counted(method):
        def call(*arguments, **options):
            calls.append(method)
            return (fail if len(calls) in failing else method)(*arguments, **options)

        return call

    for owner, names in {MemoryFileSystem: ("info", "ls", "cat_file", "_open"), MemoryFile: ("read",)}.items():
        for name in names:
            monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    newest, problems = checkpoints.newest_whole(RUN, checkpoints.CHECKPOINT_FORMATS)
    assert newest.saved.name == "checkpoints/step_00000002" and not problems
    count = len(calls)
    for number in range(1, count + 1, 3):
        calls.clear()
        failing[:] = [number]
        with pytest.raises(UnavailableError, match=r"not reachable \(StoreError: SlowDown:\)"):
            checkpoints.newest_whole(RUN, checkpoints.CHECKPOINT_FORMATS)
    assert count > 50


def test_the_files_of_a_state_are_not_missing_in_an_outage(monkeypatch):
    """A run passes over a state of Orbax that lacks files."""
    files = {"d/1": 3, "d/.zarray": 2, "_METADATA": 1}
    for name, size in files.items():
        MemoryFileSystem().pipe_file(f"{RUN}/state/{name}", bytes(size))
    assert file_sizes(f"{RUN}/state") == files and file_sizes(f"{RUN}/none") == {}
    monkeypatch.setattr(MemoryFileSystem, "ls", failing_for("ls", "/d"))
    with pytest.raises(UnavailableError, match=re.escape(f"{RUN}/state: not reachable (StoreError: SlowDown:)")):
        file_sizes(f"{RUN}/state")


def test_the_client_of_s3_is_called_as_it_defines(monkeypatch):
    """Its `cat_file` has another second argument than that of other clients."""
    cat_file = MemoryFileSystem.cat_file

    def s3_cat_file(self, path, version_id=None, start=None, end=None):
        assert version_id is None
        return cat_file(self, path, start, end)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", s3_cat_file)
    save(make_checkpointer(RUN), 1)
    assert contents(RUN) == (1, 1, 1) and checkpoints.latest_checkpoint(RUN).is_latest


def test_a_store_that_refuses_is_named_before_the_first_save(monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", fail)
    with pytest.raises(UserError, match=re.escape(f"{RUN}: cannot write checkpoints there (StoreError: SlowDown:)")):
        make_checkpointer(RUN)
    reason = f"{RUN}/run_lock.json: not reachable (StoreError: SlowDown:)"
    with pytest.raises(UserError, match=re.escape(reason)):
        HeartbeatLock(RUN)


def test_a_lock_that_cannot_be_checked_fails_the_save(monkeypatch):
    with HeartbeatLock(RUN) as lock:
        saver = checkpoints.Checkpointer(RUN, save_optimizer_state=True, guard=lock.check)
        save(saver, 1)
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, "cat_file", failing_for("cat_file", "run_lock.json"))
            reason = f"{RUN}/run_lock.json: not reachable (StoreError: SlowDown:)"
            message = f"{RUN}: the checkpoint was not saved ({reason}); checkpoints/step_00000001 is intact"
            with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
                save(saver, 2)
