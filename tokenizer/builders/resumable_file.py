"""A file that is written over a long time: whatever stops the writer, the same command goes on, to the same bytes.

`FILE.partial` grows; `FILE.progress.json` says how far it is whole, and what it is made from. When all is written,
`FILE.report.json` appears, and then `FILE` itself, by renaming.
"""

import errno
import fcntl
import os
import sys
import time

import orjson

from EasyLM.errors import UserError
from EasyLM.storage import write_json

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # from file systems that have none
MARK_SECONDS = 10.0  # between two marks of progress: so much work is lost when the writer is killed


class ResumableFile:
    """The file under its temporary name.

    Attributes:
      whole: the report of an earlier run, if it ended, with the same identity; then there is nothing to do.
      state: what the last mark said; None at the beginning.
    """

    def __init__(self, path: str, identity: dict, fresh: bool):
        """Opens the file where a stopped run left it.

        Args:
          identity: JSON values, by flag, that the bytes follow from.
          fresh: begin again, whatever is there.

        Raises:
          UserError: if a run with another identity was stopped here; names what differs.
        """
        self.path, self._identity = path, orjson.loads(orjson.dumps(identity))
        self._partial, self._progress, self._report = (
            f"{path}.{n}" for n in ("partial", "progress.json", "report.json")
        )
        self.whole, self.state, self._file, self._marked = None, None, None, time.monotonic()
        if os.path.isdir(path):
            raise UserError(f"--output_file={path}: is a folder")
        begun = None if fresh else _read_json(self._progress)
        if begun is not None and os.path.exists(self._partial):
            self._continue(begun)
        elif not fresh and os.path.exists(path) and not os.path.exists(self._partial):
            # With a partial file, the report may speak of that one: `finish` was stopped before it got its name.
            report = _read_json(self._report) or {}
            if (report.get("identity"), report.get("bytes")) == (self._identity, os.path.getsize(path)):
                self.whole = report
                _remove(self._progress)

    def _continue(self, begun: dict) -> None:
        before = begun["identity"]
        names = [name for name in sorted({*before, *self._identity}) if before.get(name) != self._identity.get(name)]
        if names:
            told = ", ".join(f"{name}={self._identity.get(name)} (then: {before.get(name)})" for name in names)
            raise UserError(
                f"{self._partial} was begun by a build with other settings or inputs: {told}. "
                "Give those again to go on, another --output_file, or --fresh=True to begin again"
            )
        if os.path.getsize(self._partial) < begun["bytes"]:
            raise UserError(f"{self._partial} is shorter than it was: --fresh=True begins again")
        self.state = begun["state"]
        self._open(begun["bytes"])

    def _open(self, size: int) -> None:
        """Opens the partial file, locks it, and cuts it to `size`: not before, as another build may be writing it."""
        self._file = open(self._partial, "ab")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"--output_file={self.path}: another build is writing it") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(f"warning: {self.path}: not locked against another build ({error.strerror})", file=sys.stderr)
        if not size:
            _remove(self._progress)  # before the file that it speaks of is emptied
        self._file.truncate(size)
        self._file.seek(size)

    def write(self, data: bytes) -> None:
        """Appends."""
        if self._file is None:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            self._open(0)
        self._file.write(data)

    def due(self) -> bool:
        """Whether it is time for a mark."""
        return time.monotonic() - self._marked >= MARK_SECONDS

    def mark(self, state: dict) -> None:
        """All that was written up to here counts, and `state` (JSON values) is how to go on."""
        self.write(b"")
        self._sync()
        write_json(self._progress, {"identity": self._identity, "bytes": self._file.tell(), "state": state})
        self._marked = time.monotonic()

    def finish(self, report: dict) -> None:
        """Gives the file its name, and the report (JSON values) its own."""
        self.write(b"")
        self._sync()
        write_json(self._report, {**report, "bytes": self._file.tell(), "identity": self._identity})
        os.replace(self._partial, self.path)  # before the lock ends: who took it then would cut the file
        self._file.close()
        _remove(self._progress)

    def close(self) -> None:
        """What was written since the last mark is lost."""
        if self._file is not None:
            self._file.close()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def _read_json(path: str) -> dict | None:
    try:
        with open(path, "rb") as file:
            return orjson.loads(file.read())
    except FileNotFoundError:
        return None


def _remove(path: str) -> None:
    if os.path.exists(path):
        os.remove(path)
