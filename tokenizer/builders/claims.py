"""Gives out the parts of a build to processes on any number of machines.

There is no server. The processes share the folder of the parts' files. A process claims a part by the lock of its file.
A part whose process has died is resumed by another one, from its last saved progress.
"""

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence

from EasyLM.errors import UnavailableError, UserError
from EasyLM.storage import HeartbeatLock, LockedError, LockWatch, path_exists

_POLL_SECONDS = 5.0  # between checks of the parts of other processes


def build_parts(
    paths: Sequence[str], first: int, build: Callable[[int], None], begun_only: bool, waiting_lock: str
) -> list[int]:
    """Builds parts until each is finished, or in progress in another process.

    When no part is left to begin, one idle process waits for the parts in progress, and takes them over if their
    processes die. The other idle processes end, so that their devices are free. Therefore all parts get finished,
    unless all remaining processes die.

    Args:
      paths: the files of the parts.
      first: the part to begin with. The following ones come next, then those before it.
      build: builds a part, or returns at once if it is finished. Raises LockedError if another process builds it.
      begun_only: build only `first`, and parts that other processes have begun and left unfinished.
      waiting_lock: a path beside the files. The process that waits holds the lock of this path.

    Returns:
      The parts that are not finished.

    Raises:
      UserError: that of the first part that cannot be built, when nothing else is left to do.
      UnavailableError: at once, if a store, a package or disk space is not there.
    """
    watch = LockWatch()
    failed: dict[int, UserError] = {}
    parts = [*range(first, len(paths)), *range(first)]

    def may_build(part: int) -> bool:
        return not begun_only or part == first or _is_begun(paths[part])

    with contextlib.ExitStack() as stack:
        is_waiting = False
        while parts:
            left, in_progress = _build_free_parts(parts, paths, build, may_build, watch, failed)
            if len(left) == len(parts):
                if not in_progress:
                    break
                if not is_waiting:
                    try:
                        stack.enter_context(HeartbeatLock(waiting_lock, is_output=True))
                    except LockedError:
                        break
                    is_waiting = True
                    print(f"waiting for {len(left)} parts that other processes build", flush=True)
                time.sleep(_POLL_SECONDS)
            parts = left
        if not parts and not is_waiting:
            _remove_dead_lock(waiting_lock, watch)
    if failed:
        raise _joined_error(paths, failed)
    return parts


def _build_free_parts(
    parts: Sequence[int],
    paths: Sequence[str],
    build: Callable[[int], None],
    may_build: Callable[[int], bool],
    watch: LockWatch,
    failed: dict[int, UserError],
) -> tuple[list[int], bool]:
    """Builds the parts that no living process builds.

    Args:
      parts: their numbers, in the order in which to build them.
      paths: of all parts.
      build: see `build_parts`.
      may_build: whether a part is to be built.
      watch: of the parts' locks.
      failed: takes the errors of the parts that cannot be built.

    Returns:
      The parts that are left, and whether another process builds one of them.
    """
    left, in_progress = [], False
    for part in parts:
        if watch.is_held(paths[part]):
            in_progress = True
        elif may_build(part):
            try:
                build(part)
                continue
            except LockedError:  # another process was faster, or has taken over
                in_progress = True
            except UnavailableError:  # no other part could be built either
                raise
            except UserError as error:
                failed[part] = error
                continue
        left.append(part)
    return left, in_progress


def _joined_error(paths: Sequence[str], failed: Mapping[int, UserError]) -> UserError:
    """Returns the error of the first part that cannot be built, with the number of such parts."""
    part, first_error = next(iter(failed.items()))
    others = f" ({len(failed)} parts could not be built)" if len(failed) > 1 else ""
    return UserError(f"{paths[part]}: {first_error}{others}")


def _is_begun(path: str) -> bool:
    """Whether a process has begun a part: it is finished, or it has left its lock or a part of the file."""
    return any(map(path_exists, (path, f"{path}.partial", _lock_path(path))))


def _remove_dead_lock(path: str, watch: LockWatch) -> None:
    """Removes the lock of a process that was killed while it waited, or while it built what it had taken over."""
    if path_exists(_lock_path(path)) and not watch.is_held(path):
        with contextlib.suppress(LockedError):
            HeartbeatLock(path, is_output=True).release()


def _lock_path(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.lock")
