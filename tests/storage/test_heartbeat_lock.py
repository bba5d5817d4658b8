"""The lock of a directory: one holder at a time; a dead holder is replaced, a living one is named."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from EasyLM.errors import UnavailableError, UserError
from EasyLM.storage import (
    HeartbeatLock,
    LockedError,
    LockWatch,
    heartbeat_lock,
    lock_file,
    lock_output,
    lock_output_folder,
)
from EasyLM.storage.lock_file import LOCK_NAME, LockFile


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """A minute becomes a second."""
    monkeypatch.setattr(heartbeat_lock, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(heartbeat_lock, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(heartbeat_lock, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat_lock, "_SETTLE_SECONDS", 0.1)


@pytest.fixture(params=["local", "remote"])
def directory(request, tmp_path):
    return str(tmp_path) if request.param == "local" else f"memory://locks/{tmp_path.name}"


def change_lock(directory: str, **changes) -> None:
    """Rewrites the file of a lock."""
    store = LockFile(directory)
    store.write(store.read() | changes)


def abandoned(directory: str, **changes) -> None:
    """Leaves the lock of a process that is gone."""
    lock = HeartbeatLock(directory)
    content = dict(lock._content)
    lock.release()
    LockFile(directory).write(content | changes)


def has_waited(caplog) -> bool:
    """Whether a constructor has waited for a heartbeat."""
    return "waiting up to" in caplog.text


ELSEWHERE = {"host": "node7", "process_namespace": "node7 boot pid:[1]"}


def test_one_holder_at_a_time(directory, caplog):
    with HeartbeatLock(directory) as lock:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime())
        with pytest.raises(
            UserError, match=rf"in use by process {os.getpid()} on host {socket.gethostname()} since"
        ) as e:
            HeartbeatLock(directory)
        assert not has_waited(caplog), "a process on the same machine needs no waiting"
        assert since in str(e.value) or since[:-2] in str(e.value)
        lock.check()
    HeartbeatLock(directory).release()


def test_release_deletes_the_file(tmp_path):
    HeartbeatLock(str(tmp_path)).release()
    assert os.listdir(tmp_path) == []


def test_a_living_holder_on_another_host_is_noticed_by_its_heartbeat(directory, caplog):
    with HeartbeatLock(directory) as lock:
        lock._content |= ELSEWHERE
        change_lock(directory, **ELSEWHERE)
        with pytest.raises(UserError, match=r"in use by process .* on host node7 since"):
            HeartbeatLock(directory)
    assert "on host node7" in caplog.text and has_waited(caplog) and "up to 1 s" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("clock_error", [-300, 0, 300])
def test_a_dead_holder_on_another_host_is_replaced_after_the_stated_time(directory, caplog, clock_error):
    abandoned(directory, **ELSEWHERE, heartbeat=time.time() + clock_error)
    begin = time.monotonic()
    with HeartbeatLock(directory) as lock:
        assert 1.0 <= time.monotonic() - begin < 3.0
        lock.check()
    assert "taking over the lock of process" in caplog.text


def test_a_holder_that_died_long_ago_is_replaced_at_once(directory, caplog):
    abandoned(directory, **ELSEWHERE, heartbeat=time.time() - 3600)
    HeartbeatLock(directory).release()
    assert not has_waited(caplog)


@pytest.mark.slow
@pytest.mark.parametrize("name", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_process_on_the_same_machine_is_replaced_at_once(tmp_path, caplog, name):
    """Also while it is a zombie: its parent has not asked for its exit code."""
    program = "import sys, time\nfrom EasyLM.storage import HeartbeatLock\n"
    program += "lock = HeartbeatLock(sys.argv[1])\nprint('locked', flush=True)\ntime.sleep(60)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=f"in use by process {process.pid} on host"):
        HeartbeatLock(str(tmp_path))
    process.send_signal(name)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    HeartbeatLock(str(tmp_path)).release()
    assert not has_waited(caplog)
    process.communicate()


def test_a_later_process_with_the_same_id_is_not_the_holder(tmp_path, caplog):
    abandoned(str(tmp_path), process_start="17")
    HeartbeatLock(str(tmp_path)).release()
    assert not has_waited(caplog)


@pytest.mark.slow
def test_the_lock_in_a_copy_of_a_directory_is_replaced(tmp_path):
    """The holder lives, but does not write its heartbeat here."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with HeartbeatLock(str(tmp_path / "a")):
        (tmp_path / "b" / LOCK_NAME).write_bytes((tmp_path / "a" / LOCK_NAME).read_bytes())
        HeartbeatLock(str(tmp_path / "b")).release()


@pytest.mark.slow
def test_a_suspended_holder_finds_out(directory, monkeypatch):
    first = HeartbeatLock(directory)
    first._released.set()  # suspended: no heartbeat
    first._thread.join()
    change_lock(directory, **ELSEWHERE)
    with HeartbeatLock(directory) as second:
        with pytest.raises(UserError, match=r"was suspended, and process .* took over the directory"):
            first.check()
        first._released.clear()
        first.release()
        second.check()
        assert LockFile(directory).read()["token"] == second._content["token"]


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"token": 3}', b"[" * 100_000])
def test_an_unreadable_lock_is_replaced_after_the_stated_time(tmp_path, content):
    (tmp_path / LOCK_NAME).write_bytes(content)
    begin = time.monotonic()
    HeartbeatLock(str(tmp_path)).release()
    assert time.monotonic() - begin >= 1.0


def _try_to_lock(directory, barrier, winners):
    for name, value in (("HEARTBEAT_SECONDS", 0.1), ("STALE_SECONDS", 1.0), ("_SETTLE_SECONDS", 0.3)):
        setattr(heartbeat_lock, name, value)
    barrier.wait()
    try:
        lock = HeartbeatLock(directory)
    except UserError:
        return
    winners.put(os.getpid())
    time.sleep(1.5)
    lock.release()


@pytest.mark.slow
@pytest.mark.parametrize("dead_holder", [False, True])
def test_of_many_processes_one_wins(tmp_path, dead_holder):
    if dead_holder:
        abandoned(str(tmp_path), process_start="17")
    context = multiprocessing.get_context("spawn")
    barrier, winners = context.Barrier(6), context.Queue()
    processes = [context.Process(target=_try_to_lock, args=(str(tmp_path), barrier, winners)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert winners.get(timeout=5) and winners.empty()
    assert os.listdir(tmp_path) == []


def test_the_last_of_two_concurrent_writers_wins(directory, monkeypatch):
    """Both have found the lock of a dead process."""
    abandoned(directory, **ELSEWHERE, heartbeat=time.time() - 3600)
    sleep = time.sleep

    def other_writes(seconds):
        change_lock(directory, token="other", host="node8")
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", other_writes)
    with pytest.raises(UserError, match=r"in use by process .* on host node8"):
        HeartbeatLock(directory)
    assert LockFile(directory).read()["token"] == "other"


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_lock_that_is_released_during_the_look_at_it_gets_one_holder(tmp_path, monkeypatch, is_taken):
    """The holder releases it after it was found to exist. Another process takes it after it was found missing."""
    monkeypatch.setattr(heartbeat_lock, "HEARTBEAT_SECONDS", 60)
    first, others, read = HeartbeatLock(str(tmp_path)), [], LockFile.read

    def read_when_released(store):
        monkeypatch.setattr(LockFile, "read", read)
        first.release()
        content = read(store)
        others.extend([HeartbeatLock(str(tmp_path))] if is_taken else [])
        return content

    monkeypatch.setattr(LockFile, "read", read_when_released)
    if is_taken:
        with pytest.raises(LockedError, match="in use by process"):
            HeartbeatLock(str(tmp_path))
    else:
        others.append(HeartbeatLock(str(tmp_path)))
    (holder,) = others
    assert LockFile(str(tmp_path)).read()["token"] == holder._content["token"]
    holder.release()


def test_a_lock_that_never_stays_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat_lock, "_POLL_SECONDS", 0)
    monkeypatch.setattr(LockFile, "create", lambda store, content: False)
    with pytest.raises(LockedError, match="in use by an unknown process"):
        HeartbeatLock(str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_a_suspended_holder_finds_out_also_if_the_next_one_has_ended(directory):
    lock = HeartbeatLock(directory)
    lock._released.set()  # suspended: no heartbeat
    lock._thread.join()
    LockFile(directory).delete()
    lock._content["heartbeat"] = time.time() + 60  # not so long that another process can have held the lock
    lock.check()
    lock._content["heartbeat"] = time.time() - heartbeat_lock.STALE_SECONDS
    with pytest.raises(LockedError, match="was suspended, and another process took over the directory"):
        lock.check()


@pytest.mark.parametrize("method", ["cat_file", "pipe_file"])
def test_a_store_that_cannot_be_reached_is_named(tmp_path, monkeypatch, method):
    def lose_connection(*arguments, **options):
        raise ConnectionResetError("connection reset")

    monkeypatch.setattr(MemoryFileSystem, method, lose_connection)
    with pytest.raises(UnavailableError, match=rf"^memory:/{tmp_path}/\.a\.lock: not reachable \(ConnectionResetError"):
        HeartbeatLock(f"memory:/{tmp_path}/a", is_output=True)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    """The file can be created, but not written. It does not remain."""
    monkeypatch.setattr(lock_file, "_encode", lambda content: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(UserError, match=rf"{tmp_path}/{LOCK_NAME}: .*No space left"):
        HeartbeatLock(str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_heartbeats_go_on_after_a_failure(directory, monkeypatch, caplog):
    with HeartbeatLock(directory) as lock:
        with monkeypatch.context() as patch:
            patch.setattr(lock._store, "write", lambda content: os.close(-1))
            time.sleep(0.5)
            beats = LockFile(directory).read()["beats"]
            assert lock._content["beats"] == beats  # its age is that of the last one that others can see
        deadline = time.monotonic() + 5
        while LockFile(directory).read()["beats"] <= beats:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert caplog.text.count("heartbeat could not be written") == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "lock heartbeat"]


def test_the_file_tells_who_holds_it(tmp_path):
    with HeartbeatLock(str(tmp_path)):
        content = json.loads((tmp_path / LOCK_NAME).read_text())
    assert (content["host"], content["process"]) == (socket.gethostname(), os.getpid())
    assert abs(content["since"] - time.time()) < 60


def test_the_lock_of_an_output_is_beside_it(tmp_path, monkeypatch):
    """That of a mount point, whose directory is not writable, is in it."""
    for name, lock in (("out.jsonl", lock_output), ("folder", lock_output_folder), ("a/b/new", lock_output_folder)):
        with lock(str(tmp_path / name), "output"):
            assert [path.name for path in tmp_path.rglob("*.lock")] == [f".{os.path.basename(name)}.lock"]
            with pytest.raises(UserError, match=rf"^--output={tmp_path}/{name}: in use by process {os.getpid()} "):
                lock(str(tmp_path / name), "output")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(tmp_path) and access(path, mode))
    (tmp_path / "mount").mkdir()
    with lock_output_folder(str(tmp_path / "mount"), "output"):
        assert os.listdir(tmp_path / "mount") == [LOCK_NAME]
        with pytest.raises(UserError, match="in use by process"):
            lock_output_folder(f"{tmp_path}/mount/", "output")
    assert not os.listdir(tmp_path / "mount")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"^--output={tmp_path}/file: is a file, name a folder$"):
        lock_output_folder(str(tmp_path / "file"), "output")


def test_a_watch_sees_holders_without_waiting(tmp_path, monkeypatch):
    """A lock of another machine whose heartbeat stands still is free after the stated time, and not before."""
    monkeypatch.setattr(heartbeat_lock, "STALE_SECONDS", 0.2)
    path = str(tmp_path / "out.jsonl")
    watch = LockWatch()
    assert not watch.is_held(path)
    with HeartbeatLock(path, is_output=True) as lock:
        assert watch.is_held(path)
        content = dict(lock._content)
    assert not watch.is_held(path)
    store = LockFile(path, is_output=True)
    store.write(content | {"process_start": "17"})
    assert not watch.is_held(path)  # its process has ended
    store.write(content | ELSEWHERE | {"heartbeat": time.time() - 3600})
    assert not watch.is_held(path)
    begin = time.monotonic()
    for beats in range(2):
        store.write(content | ELSEWHERE | {"beats": beats})
        begin = time.monotonic()
        assert watch.is_held(path)
    while watch.is_held(path):
        assert time.monotonic() - begin < 30
        time.sleep(0.02)
    assert time.monotonic() - begin >= heartbeat_lock.STALE_SECONDS
    HeartbeatLock(path, is_output=True).release()
