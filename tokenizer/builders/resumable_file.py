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
        """Looks whether the file is finished.

        Args:
          path: the file.
          fingerprint: everything that determines the bytes of the file, as JSON values by name.
          fresh: discard what an earlier run left.

        Raises:
          UserError: naming the file, if it is a folder, or its report is invalid.
          LockedError: if another process writes the file again.
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
        if not fresh:
            self.finished_report = self._read_report()
            if self.finished_report is not None and os.path.exists(self._progress):  # `finish` was interrupted
                self.claim()

    @property
    def scratch_folder(self) -> str:
        """The folder of the file, for temporary files."""
        return os.path.dirname(self.path) or "."

    def claim(self) -> None:
        """Locks the file, then looks again whether it is finished, and otherwise opens it at its last saved progress.

        Call it before `write`. Without the lock, another process can change the progress after it has been read.

        Raises:
          LockedError: if another process has locked it.
          UserError: naming the differences, if the partial file has another fingerprint; if it is invalid.
        """
        if self._lock is not None:
            return
        self._lock = HeartbeatLock(self.path, is_output=True)
        try:
            for path in (self._progress, self._report):
                remove_leftovers(path)
            if not self._fresh:
                self._read_earlier_run()
        except BaseException:
            self.close()
            raise

    def _read_earlier_run(self) -> None:
        self.finished_report = self._read_report()
        if self.finished_report is not None:
            _remove(self._progress)
        elif os.path.exists(self._partial):
            progress = _read(self._progress, _PROGRESS, self._partial)
            if progress is not None:
                self._resume(progress)

    def _read_report(self) -> dict[str, Any] | None:
        """Returns the report if the file is finished with the same fingerprint."""
        if not os.path.exists(self.path) or os.path.exists(self._partial):
            return None
        # The report can describe the partial file instead, if `finish` was interrupted before the rename.
        report = _read(self._report, _REPORT, self._report) or {}
        is_of_file = (report.get("identity"), report.get("bytes")) == (self._fingerprint, os.path.getsize(self.path))
        return report if is_of_file else None

    def _resume(self, progress: dict[str, Any]) -> None:
        saved, current = progress["identity"], self._fingerprint
        names = [name for name in sorted({*saved, *current}) if saved.get(name) != current.get(name)]
        if names:
            differences = ", ".join(f"{name}={current.get(name)} (then: {saved.get(name)})" for name in names)
            raise UserError(
                f"{self._partial} was started with other settings or inputs: {differences}. "
                "Resume it with the same ones, write another file, or delete it to start again"
            )
        if not 0 <= progress["bytes"] <= os.path.getsize(self._partial):
            raise UserError(f"{self._partial} does not fit its saved progress: delete it to start again")
        self.state = progress["state"]
        self._open(progress["bytes"])

    def _open(self, size: int) -> None:
        """Opens the partial file and truncates it to `size`."""
        assert self._lock is not None, "claim the file first"
        # Not in append mode: late writes of a process that has lost the lock must not follow those of the new owner.
        self._file = io.BufferedWriter(io.FileIO(self._partial, "r+" if size else "w"))
        if not size:
            _remove(self._progress)  # must not outlive the bytes that it describes
        self._file.truncate(size)
        self._file.seek(size)

    def write(self, data: bytes) -> None:
        """Appends data. The file must be claimed."""
        if self._file is None:
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
        """Writes the report (JSON values), renames the partial file, and unlocks the file."""
        size = self._sync()
        write_json(self._report, {**report, "bytes": size, "identity": self._fingerprint})
        # While locked: the next owner of the lock truncates the partial file and saves its own progress.
        os.replace(self._partial, self.path)
        _remove(self._progress)
        self.close()

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


def _read(path: str, schema: Mapping[str, Any], obstacle: str) -> dict[str, Any] | None:
    """Reads a JSON file; None if there is none. Without the file `obstacle`, a build starts from its beginning."""
    try:
        return read_json(path, schema)
    except FileNotFoundError:
        return None
    except UserError as error:
        raise UserError(f"{error}; delete {obstacle} to start again") from None


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
