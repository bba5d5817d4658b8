"""A lock on a directory, local or remote, or on an output: a small file that its holder rewrites every few seconds.

The lock of a run directory is the file `run_lock.json` in it; that of an output `NAME` is `.NAME.lock` beside it. Such
a file works where `flock` does not: on NFS of any version, and on object stores. It names the holder (host, process,
start) and counts heartbeats. A holder counts as dead in three cases:

- it ran on this machine, and its process no longer exists;
- its heartbeat does not advance during STALE_SECONDS of waiting, so the clocks of two hosts need not agree;
- its last heartbeat is older than FORGOTTEN_SECONDS, which exceeds the error of any clock.

A process that was suspended while another one took over its lock finds out at its next heartbeat; see `check`. It also
finds out if the other one has released the lock since: the file is missing, and its own last heartbeat is old.
"""

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from typing import Any, NoReturn

from EasyLM.errors import UserError, error_line, prefix_errors
from EasyLM.storage.atomic import remove_leftovers
from EasyLM.storage.lock_file import LockFile
from EasyLM.storage.paths import check_output
from EasyLM.storage.processes import is_alive, process_namespace, process_start

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
FORGOTTEN_SECONDS = 600.0
_POLL_SECONDS = 0.5  # while waiting for a heartbeat
_MOST_TRIES = 10  # to create a file that another process deletes
_SETTLE_SECONDS = 0.5  # after writing over a file: the last of several concurrent writers wins


class LockedError(UserError):
    """A living process holds the lock. The message names it."""


class HeartbeatLock:
    """Holds a directory or an output from the construction until `release`. Also a context manager.

    Args:
      path: an existing local directory, or a remote one, which holds the lock.
      is_output: the path is a local file or folder, which need not exist; the lock is beside it.

    Raises:
      LockedError: if another process holds the lock.
      UserError: if the file cannot be written.
    """

    def __init__(self, path: str, is_output: bool = False):
        self._store = LockFile(path, is_output)
        now = time.time()
        self._content: dict[str, Any] = {
            "token": secrets.token_hex(8),
            "directory": self._store.subject,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "process_start": process_start(os.getpid()),
            "process_namespace": process_namespace(),
            "since": now,
            "heartbeat": now,
            "beats": 0,
        }
        self._lost_to: str | None = None
        self._released = threading.Event()
        try:
            self._acquire()
        except OSError as error:
            raise UserError(f"{self._store.path}: cannot be written ({error_line(error)})") from None
        self._thread = threading.Thread(target=self._beat, name="lock heartbeat", daemon=True)
        self._thread.start()

    def __enter__(self) -> "HeartbeatLock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def check(self) -> None:
        """Raises LockedError if another process has taken over the lock, because this one was suspended for long."""
        self._notice_loss(self._store.read())
        if self._lost_to is not None:
            raise LockedError(
                f"{self._store.path}: this process was suspended, and {self._lost_to} took over the "
                f"{self._store.kind}; nothing more is written"
            )

    def release(self) -> None:
        """Stops the heartbeat and deletes the file, unless another process has taken over the lock."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # each store has its own; what remains of the lock goes stale
            if _is_same(self._store.read(), self._content):
                self._store.delete()

    def _acquire(self) -> None:
        self._store.remove_leftovers()
        for _ in range(_MOST_TRIES):
            if self._store.create(self._content):
                return
            holder = self._dead_holder()
            if holder is not None or not self._store.can_create:
                self._take_over(holder)
                return
            # The lock has been released meanwhile. Only `create` finds out whether another process holds it by now.
            time.sleep(_POLL_SECONDS)
        self._refuse({})

    def _dead_holder(self) -> dict[str, Any] | None:
        """Returns the content of the lock, whose holder is dead; None if there is no lock. Waits to find out."""
        holder = self._store.read()
        if holder is None:
            return None
        self._wait_for_death(holder)
        current = self._store.read()
        if current is not None and current != holder:  # another process has been faster
            self._refuse(current)
        return current

    def _take_over(self, holder: dict[str, Any] | None) -> None:
        """Replaces the lock of a dead holder; None: creates it in a store whose `create` cannot."""
        if holder is not None:
            logging.warning("%s: taking over the lock of %s, which has ended", self._store.path, _describe(holder))
        self._store.write(self._content)
        time.sleep(_SETTLE_SECONDS)
        winner = self._store.read() or {}
        if not _is_same(winner, self._content):
            self._refuse(winner)

    def _wait_for_death(self, holder: dict[str, Any]) -> None:
        """Returns when the holder counts as dead. Raises LockedError if it is alive."""
        if _is_known_to_be_dead(holder):
            return
        same_machine = holder.get("process_namespace") == self._content["process_namespace"]
        is_copy = holder.get("directory") != self._store.subject  # the directory was copied with its lock
        if same_machine and not is_copy and _age(holder) < STALE_SECONDS:
            self._refuse(holder)
        logging.warning(
            "%s: locked by %s; waiting up to %.0f s for its next heartbeat",
            self._store.path,
            _describe(holder),
            STALE_SECONDS,
        )
        deadline = time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            current = self._store.read()
            if current is None:  # released
                return
            if current != holder:
                self._refuse(current)

    def _refuse(self, holder: dict[str, Any]) -> NoReturn:
        raise LockedError(f"{self._store.subject}: in use by {_describe(holder)}; wait until it ends")

    def _beat(self) -> None:
        failed = False
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                self._notice_loss(self._store.read())
                if self._lost_to is not None:
                    return
                content = self._content | {"heartbeat": time.time(), "beats": self._content["beats"] + 1}
                self._store.write(content)
                self._content = content  # only now: others see the written heartbeat, see `_notice_loss`
                failed = False
            except Exception as error:  # each store has its own exceptions; the next heartbeat tries again
                if not failed:
                    logging.warning("%s: the heartbeat could not be written (%s)", self._store.path, error)
                failed = True

    def _notice_loss(self, current: dict[str, Any] | None) -> None:
        """Records that another process has taken over. A missing or unreadable file is written again.

        But a file is missing also if that process has released the lock, which it can have taken over after
        STALE_SECONDS without a heartbeat.
        """
        if current and not _is_same(current, self._content):
            self._lost_to = _describe(current)
        elif current is None and _age(self._content) > STALE_SECONDS:
            self._lost_to = "another process"


class LockWatch:
    """Reports, without waiting, which outputs are locked by processes that may be alive.

    Use one object for all outputs and all checks: it remembers the heartbeats that it has read. A holder on another
    machine is alive if its heartbeat advances.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[dict[str, Any], float]] = {}  # path -> content, when it was seen first

    def is_held(self, path: str) -> bool:
        """Whether the lock of an output exists and its holder may be alive. False: it can be acquired."""
        holder = LockFile(path, is_output=True).read()
        if holder is None or _is_known_to_be_dead(holder):
            return False
        content, since = self._seen.get(path, (None, 0.0))
        if content != holder:
            self._seen[path] = holder, time.monotonic()
            return True
        return time.monotonic() - since < STALE_SECONDS


def lock_output(path: str, flag: str) -> HeartbeatLock:
    """Locks an output file until `release`, after `check_output`. Deletes what killed processes have left of it.

    Raises:
      UserError: naming the flag, if the file cannot be written, or the process that is writing it.
    """
    check_output(path, flag)
    return _lock_and_clean(path, flag)


def lock_output_folder(path: str, flag: str) -> HeartbeatLock:
    """Locks an output folder, which need not exist, as `lock_output` locks a file.

    The lock of a folder in a directory that is not writable, such as a mount point, is in the folder itself.

    Raises:
      UserError: naming the flag, if the folder is a file or cannot be created, or the process that is writing it.
    """
    if os.path.isfile(path):
        raise UserError(f"--{flag}={path}: is a file, name a folder")
    parent = os.path.dirname(os.path.realpath(path))
    try:
        os.makedirs(parent, exist_ok=True)
    except OSError as error:
        raise UserError(f"--{flag}={path}: cannot be written ({error.strerror})") from None
    return _lock_and_clean(path, flag, is_output=os.access(parent, os.W_OK) or not os.path.isdir(path))


def _lock_and_clean(path: str, flag: str, is_output: bool = True) -> HeartbeatLock:
    with prefix_errors(f"--{flag}", separator="="):
        lock = HeartbeatLock(path, is_output)
    remove_leftovers(path)
    return lock


def _age(holder: dict[str, Any]) -> float:
    """Returns the seconds since the last heartbeat, by the clocks of two machines; 0 for an unreadable lock."""
    return time.time() - holder["heartbeat"] if holder else 0.0


def _is_known_to_be_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended, or is forgotten."""
    is_local = holder.get("process_namespace") == process_namespace()
    has_ended = is_local and not is_alive(holder["process"], holder.get("process_start"))
    return has_ended or _age(holder) > FORGOTTEN_SECONDS


def _is_same(content: dict[str, Any] | None, own: dict[str, Any]) -> bool:
    return content is not None and content.get("token") == own["token"]


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "an unknown process"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
    return f"process {holder['process']} on host {holder['host']} since {since}"
