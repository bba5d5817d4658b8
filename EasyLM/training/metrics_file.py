"""`metrics.jsonl`, local or on an object store: the `MetricsSink` of every run."""

import contextlib
import io
import json
import os
import time

from EasyLM.errors import UserError
from EasyLM.storage import names_store_errors, remote_file_system
from EasyLM.training.metrics_sinks import FLUSH_SECONDS, Row, counts_lost_steps

_MOST_LINE_BYTES = 1 << 20


class JsonLinesSink:
    """Appends one JSON object per line. Removes the truncated last line that a kill or a full disk has left.

    Args:
      path: a local path. A missing directory is created.

    Raises:
      OSError: if the file cannot be opened.
    """

    def __init__(self, path: str):
        self._path, self._file = path, None
        self._file = _open_to_append(path)

    def log(self, row: Row) -> None:
        """Writes a line. The file is opened again after a failure (a handle of NFS can stay unusable) or a deletion."""
        if self._file is None:
            self._file = _open_to_append(self._path)
        line = memoryview(json.dumps(row).encode() + b"\n")
        try:
            if not os.fstat(self._file.fileno()).st_nlink:
                self._file.close()
                self._file = _open_to_append(self._path)
            while line:  # a disk that becomes full takes a part
                line = line[self._file.write(line) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
            raise

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def abandon(self) -> None:
        """Does nothing: the file needs no end."""


def _open_to_append(path: str) -> io.FileIO:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    file = io.FileIO(path, "ab+")  # without a buffer, which would keep the rest of a line after an error
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _MOST_LINE_BYTES))
        last = file.readall().rpartition(b"\n")[2]
        if _is_json(last):
            file.write(b"\n")
        elif last:
            file.truncate(size - len(last))
        file.seek(0, os.SEEK_END)
    except OSError:
        file.close()
        raise
    return file


class RemoteJsonLinesSink:
    """A `JsonLinesSink` on an object store, which cannot append: it uploads the whole file once a minute, and at last.

    Raises:
      UnavailableError: if the store cannot be reached.
    """

    def __init__(self, path: str):
        self._path, (self._store, self._name) = path, remote_file_system(path)
        content = b""
        with contextlib.suppress(FileNotFoundError), names_store_errors(path):  # not `exists`: any error is "no" to it
            content = self._store.cat_file(self._name)
        whole, _, last = content.rpartition(b"\n")
        self._content = bytearray(content + b"\n" if _is_json(last) else whole + b"\n" * bool(whole))
        self._uploaded, self._new_rows = time.monotonic(), 0

    def log(self, row: Row) -> None:
        """Adds a line, and uploads the file if the last upload is a minute ago."""
        size = len(self._content)
        self._content += json.dumps(row).encode() + b"\n"
        if time.monotonic() - self._uploaded > FLUSH_SECONDS:
            try:
                self._upload()
            except UserError:
                del self._content[size:]
                raise
        else:
            self._new_rows += 1

    def close(self) -> None:
        """Uploads the file.

        Raises:
          UnavailableError: if that fails, with the number of logged steps that are lost.
        """
        if self._new_rows:
            with counts_lost_steps(self._new_rows):
                self._upload()

    def _upload(self) -> None:
        with names_store_errors(self._path):
            self._store.pipe_file(self._name, bytes(self._content))
        self._uploaded, self._new_rows = time.monotonic(), 0

    def abandon(self) -> None:
        """Does nothing: an upload does not keep the process from exiting."""


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
