"""The file of a lock, local or remote: created, read, replaced and deleted as a whole."""

import contextlib
import json
import os
from typing import Any

from EasyLM.errors import UserError
from EasyLM.storage.atomic import atomic_path, remove_leftovers
from EasyLM.storage.json_files import parse_json
from EasyLM.storage.remote import is_remote, names_store_errors, remote_file_system

LOCK_NAME = "run_lock.json"
_SCHEMA = {"token": str, "directory": str, "host": str, "process": int, "since": float, "heartbeat": float}


class LockFile:
    """The file of a lock on its file system. Its content is a JSON object.

    The methods raise UnavailableError naming the file, if a remote file system cannot be reached.

    Attributes:
      subject: what is locked.
      kind: "output" or "directory".
      path: of the file.
      can_create: whether `create` can create it.
    """

    def __init__(self, path: str, is_output: bool = False):
        remote = is_remote(path)
        self.can_create = not remote
        self.subject = path.rstrip("/") if remote else os.path.realpath(path)
        self.kind = "output" if is_output else "directory"
        folder, name = os.path.split(self.subject)
        self.path = os.path.join(folder, f".{name}.lock") if is_output else f"{self.subject}/{LOCK_NAME}"
        self._remote: Any = None
        self._name = self.path
        if remote:
            self._remote, self._name = remote_file_system(self.path)

    def create(self, content: dict[str, Any]) -> bool:
        """Creates the file if it does not exist, atomically. Returns False if it exists, or the store cannot do it."""
        if not self.can_create:
            return False
        try:
            file = open(self.path, "xb")  # noqa: SIM115  (closed below)
        except FileExistsError:
            return False
        try:
            with file:
                file.write(_encode(content))
        except OSError:
            self.delete()
            raise
        return True

    def read(self) -> dict[str, Any] | None:
        """Returns the content; None if there is no file; an empty dict if it cannot be parsed."""
        try:
            if self._remote is not None:
                with names_store_errors(self.path):
                    self._remote.invalidate_cache()
                    data = self._remote.cat_file(self._name)
            else:
                with open(self.path, "rb") as file:
                    data = file.read()
        except FileNotFoundError:
            return None
        with contextlib.suppress(UserError):
            return parse_json(data, _SCHEMA)
        return {}

    def write(self, content: dict[str, Any]) -> None:
        """Replaces the file."""
        if self._remote is not None:
            with names_store_errors(self.path):
                self._remote.pipe_file(self._name, _encode(content))
            return
        with atomic_path(self.path, sync=False) as temporary, open(temporary, "wb") as file:
            file.write(_encode(content))

    def remove_leftovers(self) -> None:
        """Deletes what killed processes have left while they wrote the file."""
        if self._remote is None:
            remove_leftovers(self.path)

    def delete(self) -> None:
        """Deletes the file."""
        if self._remote is not None:
            with names_store_errors(self.path):
                self._remote.rm_file(self._name)
        else:
            os.remove(self.path)


def _encode(content: dict[str, Any]) -> bytes:
    return (json.dumps(content) + "\n").encode()
