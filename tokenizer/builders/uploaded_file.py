"""A file on an object store that a long build writes.

It grows in a folder of $TMPDIR and is uploaded when it is complete. Stores show an object when its last part has
arrived. Then `FILE.report.json` is uploaded: without it, the file does not count. An interrupted file is written again
from its start, so a large build should have many parts.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import orjson

from EasyLM.errors import UnavailableError, UserError, error_line
from EasyLM.storage import (
    HeartbeatLock,
    file_version,
    names_full_disk,
    read_json,
    remote_file_system,
    remove_leftovers,
    scratch_folder,
)

_REPORT = {"identity?": dict, "bytes?": int}


class UploadedFile:
    """A remote file, with the methods of `ResumableFile`.

    Attributes:
      path: its URL.
      finished_report: the report, if an earlier run finished the file with the same fingerprint; otherwise None.
      state: None; nothing is resumed.
    """

    def __init__(self, path: str, fingerprint: Mapping[str, Any], fresh: bool):
        """Looks for a finished file.

        Args:
          path: the URL.
          fingerprint: everything that determines the bytes of the file, as JSON values by name.
          fresh: ignore what an earlier run has finished.

        Raises:
          UnavailableError: naming the URL, if the store cannot be reached.
        """
        self.path, self._fingerprint, self._fresh = path, orjson.loads(orjson.dumps(fingerprint)), fresh
        self._report = f"{path}.report.json"
        self._system, self._name = remote_file_system(path)
        self.state: dict[str, Any] | None = None
        self.finished_report = self._read_report()
        self._scratch = contextlib.ExitStack()
        self._file: BinaryIO | None = None
        self._lock: HeartbeatLock | None = None

    @property
    def scratch_folder(self) -> str:
        """The local folder for temporary files."""
        return tempfile.gettempdir()

    @property
    def _local_path(self) -> str:
        """The path that names the folder of the growing file."""
        return os.path.join(self.scratch_folder, os.path.basename(self.path))

    def _read_report(self) -> dict[str, Any] | None:
        """Returns the report of a finished file with the same fingerprint."""
        if self._fresh:
            return None
        with _names(self.path):
            self._system.invalidate_cache()
            try:
                report = read_json(self._report, _REPORT)
                size = file_version(self.path)["size"]
            except UnavailableError:
                raise
            except (FileNotFoundError, UserError):  # not finished; an unreadable report is replaced
                return None
        return report if (report.get("identity"), report.get("bytes")) == (self._fingerprint, size) else None

    def claim(self) -> None:
        """Locks the file, and reads what another run has done since the construction.

        Raises:
          LockedError: if another process has locked it.
          UnavailableError: naming the URL, if nothing can be written there.
        """
        if self._lock is None:
            with _names(self.path):
                self._lock = HeartbeatLock(self.path, is_output=True)
            remove_leftovers(self._local_path)
            self.finished_report = self._read_report()

    def write(self, data: bytes) -> None:
        """Appends data."""
        self.claim()
        if self._file is None:
            folder = self._scratch.enter_context(scratch_folder(self._local_path))
            self._file = self._scratch.enter_context(open(os.path.join(folder, "content"), "wb"))  # noqa: SIM115
        with names_full_disk(self.scratch_folder):
            self._file.write(data)

    def save_is_due(self) -> bool:
        """Returns False: nothing is saved before the end."""
        return False

    def save(self, state: Mapping[str, Any]) -> None:
        """Does nothing."""

    def finish(self, report: Mapping[str, Any]) -> None:
        """Uploads the file, then the report (JSON values).

        Raises:
          LockedError: if another process has taken over the file.
          UnavailableError: naming the URL, if the upload fails.
        """
        self.write(b"")
        assert self._file is not None and self._lock is not None
        self._file.flush()
        self._lock.check()
        size = self._file.tell()
        content = orjson.dumps({**report, "bytes": size, "identity": self._fingerprint}, option=orjson.OPT_INDENT_2)
        with _names(self.path):
            with contextlib.suppress(FileNotFoundError):
                self._system.rm_file(f"{self._name}.report.json")  # of an earlier file
            self._system.put_file(self._file.name, self._name)
            self._system.pipe_file(f"{self._name}.report.json", content + b"\n")
        self.close()

    def close(self) -> None:
        """Unlocks the file, and discards bytes that have not been uploaded."""
        self._scratch.close()
        if self._lock is not None:
            self._lock.release()


@contextlib.contextmanager
def _names(path: str) -> Iterator[None]:
    """Makes the errors of a store an UnavailableError that names the path."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each package has its own errors of credentials and connections
        raise UnavailableError(f"{path}: cannot be read or written ({error_line(error)})") from error
