"""A file that a long build writes. After an interruption, the same command resumes it; the bytes do not change.

`FILE.partial` grows. `FILE.progress.json` holds its fingerprint and the number of its valid bytes. At the end
`FILE.report.json` is written, then `FILE.partial` is renamed to `FILE`.
"""

import contextlib
import io
import os
import time
from collections.abc import Mapping
from typing import Any

import orjson

from EasyLM.errors import UserError
from EasyLM.storage import HeartbeatLock, names_full_disk, read_json, remove_leftovers, write_json

SAVE_SECONDS = 10.0  # between saves of the progress: the most work that a killed process loses


_PROGRESS = {"identity": dict, "bytes": int, "state": dict}
_REPORT = {"identity?": dict, "bytes?": int}


class ResumableFile:
    """A file and its saved progress.

    Attributes:
      finished_report: the report, if an earlier run finished the file with the same fingerprint; otherwise None.
      state: the state of the last saved progress; None if there is none.
    """

    def __init__(self, path: str, fingerprint: Mapping[str, Any], fresh: bool):
        """Opens the file at its last saved progress.

        Args:
          path: the file.
          fingerprint: everything that determines the bytes of the file, as JSON values by name.
          fresh: discard what an earlier run left.

        Raises:
          UserError: naming the differences, if the partial file has another fingerprint; if it is invalid or locked.
        """
        self.path, self._fingerprint, self._fresh = path, orjson.loads(orjson.dumps(fingerprint)), fresh
        self._partial, self._progress, self._report = (
            f"{path}.{suffix}" for suffix in ("partial", "progress.json", "report.json")
        )
        self.finished_report: dict[str, Any] | None = None
        self.state: dict[str, Any] | None = None
        self._file: io.BufferedWriter | None = None
        self._lock: HeartbeatLock | None = None
        self._saved_at = time.monotonic()
        if os.path.isdir(path):
            raise UserError(f"{path}: is a folder, name a file")
        try:
            if not fresh:
                self._read_earlier_run()
        except BaseException:
            self.close()
            raise

    @property
    def scratch_folder(self) -> str:
        """The folder of the file, for temporary files."""
        return os.path.dirname(self.path) or "."

    def claim(self) -> None:
        """Locks the file, and reads what another run has done since the construction.

        Raises:
          LockedError: if another process has locked it.
        """
        if self._lock is None:
            self._acquire()
            if not self._fresh:
                self._read_earlier_run()

    def _read_earlier_run(self) -> None:
        if os.path.exists(self._partial):
            self._acquire()  # the progress of a running build changes
        progress = _read(self._progress, _PROGRESS)
        if progress is not None and os.path.exists(self._partial):
            self._resume(progress)
        elif os.path.exists(self.path) and not os.path.exists(self._partial):
            # The report can describe the partial file instead, if `finish` was interrupted before the rename.
            report = _read(self._report, _REPORT) or {}
            if (report.get("identity"), report.get("bytes")) == (self._fingerprint, os.path.getsize(self.path)):
                self.finished_report = report
                _remove(self._progress)

    def _acquire(self) -> None:
        if self._lock is None:
            self._lock = HeartbeatLock(self.path, is_output=True)
            for path in (self._progress, self._report):
                remove_leftovers(path)

    def _resume(self, progress: dict[str, Any]) -> None:
        saved, current = progress["identity"], self._fingerprint
        names = [name for name in sorted({*saved, *current}) if saved.get(name) != current.get(name)]
        if names:
            differences = ", ".join(f"{name}={current.get(name)} (then: {saved.get(name)})" for name in names)
            raise UserError(
                f"{self._partial} was started with other settings or inputs: {differences}. "
                "Resume it with the same ones, write another file, or discard it with --fresh=True"
            )
        if not 0 <= progress["bytes"] <= os.path.getsize(self._partial):
            raise UserError(f"{self._partial} does not fit its saved progress: discard it with --fresh=True")
        self.state = progress["state"]
        self._open(progress["bytes"])

    def _open(self, size: int) -> None:
        """Locks the file, opens the partial file and truncates it to `size`. Another run can write an unlocked file."""
        self._acquire()
        # Not in append mode: late writes of a process that has lost the lock must not follow those of the new owner.
        self._file = io.BufferedWriter(io.FileIO(self._partial, "r+" if size else "w"))
        if not size:
            _remove(self._progress)  # must not outlive the bytes that it describes
        self._file.truncate(size)
        self._file.seek(size)

    def write(self, data: bytes) -> None:
        """Appends data."""
        if self._file is None:
            os.makedirs(self.scratch_folder, exist_ok=True)
            self._open(0)
        assert self._file is not None
        with names_full_disk(self._partial):
            self._file.write(data)

    def save_is_due(self) -> bool:
        """Returns whether SAVE_SECONDS have passed since the last save."""
        return time.monotonic() - self._saved_at >= SAVE_SECONDS

    def save(self, state: Mapping[str, Any]) -> None:
        """Saves the progress: all bytes written so far are valid, and `state` (JSON values) is the resume point.

        Raises:
          LockedError: if this process was suspended, and another one has taken over the file.
        """
        size = self._sync()
        write_json(self._progress, {"identity": self._fingerprint, "bytes": size, "state": state})
        self._saved_at = time.monotonic()

    def finish(self, report: Mapping[str, Any]) -> None:
        """Writes the report (JSON values) and renames the partial file."""
        size = self._sync()
        write_json(self._report, {**report, "bytes": size, "identity": self._fingerprint})
        os.replace(self._partial, self.path)  # while locked: the next owner of the lock would truncate the partial file
        self.close()
        _remove(self._progress)

    def close(self) -> None:
        """Closes and unlocks the file. Bytes written since the last save are discarded on resume."""
        if self._file is not None:
            self._file.raw.close()  # without a flush: another process may own the file by now
        if self._lock is not None:
            self._lock.release()

    def _sync(self) -> int:
        """Flushes the file to disk, and creates it if it does not exist; returns its size in bytes."""
        self.write(b"")
        assert self._file is not None and self._lock is not None
        self._lock.check()
        with names_full_disk(self._partial):
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._file.tell()


def _read(path: str, schema: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        return read_json(path, schema)
    except FileNotFoundError:
        return None
    except UserError as error:
        raise UserError(f"{error}; discard the earlier build with --fresh=True") from None


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
