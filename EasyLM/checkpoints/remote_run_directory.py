"""A run directory on an object store."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from EasyLM.checkpoints.directories import file_sizes, list_directory
from EasyLM.checkpoints.layout import LATEST, METADATA, SAVE, TEMPORARY, WRITING
from EasyLM.checkpoints.saves import Saves, Writers, json_writer
from EasyLM.errors import UnavailableError, UserError, error_line
from EasyLM.storage import names_store_errors, read_json, remote_file_system


class RemoteRunDirectory(Saves):
    """A run directory on an object store, which has no links and no atomic renames.

    A step directory is a checkpoint from the moment when its metadata is written to the moment when it is deleted. What
    lies in it before and after is marked by the file WRITING, and deleted at the next start.
    """

    def __init__(self, path: str, keep_latest: int, guard: Callable[[], None]):
        super().__init__(path, keep_latest, guard)
        self._files, _ = remote_file_system(self.path)

    def prepare(self) -> None:
        """Checks that the store is writable, and deletes the parts of interrupted saves of this run.

        Raises:
          UserError: if the store is not writable.
        """
        probe = f"{self.path}/{TEMPORARY}probe"
        try:
            self._files.makedirs(self._steps, exist_ok=True)
            self._files.pipe_file(probe, b"x")
            self._files.rm_file(probe)
            for name in list_directory(self._steps):
                self._remove_interrupted(f"{self._steps}/{name}")
        except Exception as error:  # each store has its own exceptions
            raise UserError(f"{self.path}: cannot write checkpoints there ({error_line(error)})") from None
        self._read_saves()

    def _remove_interrupted(self, directory: str) -> None:
        files = list_directory(directory)
        if WRITING not in files or METADATA in files:
            return
        try:
            owner = read_json(f"{directory}/{WRITING}").get("run_directory")
        except UnavailableError:
            raise
        except UserError:  # an unreadable marker may belong to another run
            return
        if owner == self.path:
            self._delete_directory(directory)

    @contextlib.contextmanager
    def visible_file(self) -> Iterator[None]:
        """Yields None: several processes cannot write parts of one object."""
        yield None

    def is_visible(self, path: str) -> bool:
        """Returns False: see `visible_file`."""
        return False

    def begin(self, step: int) -> str:
        """Returns the directory of a new checkpoint, with a marker until it is complete."""
        self._guard()
        directory = f"{self._steps}/{self._free_name(step)}"
        with names_store_errors(directory):
            self._files.makedirs(directory, exist_ok=True)
            self._mark(directory)
        return directory

    def discard(self, directory: str) -> None:
        """Deletes the directory of a failed save."""
        with contextlib.suppress(Exception):  # each store has its own; the next start deletes what remains
            self._delete_directory(directory)

    def commit(self, directory: str, step: int, writers: Writers, metadata: Mapping[str, Any], milestone: bool) -> None:
        """Adds files to the directory of `begin`, the metadata last. Then deletes superseded checkpoints."""
        try:
            save = self._record(directory, milestone)
            with names_store_errors(directory):
                self._write(directory, writers)
            self._guard()  # again: this process may have been suspended while it wrote
            with names_store_errors(directory):
                self._write(directory, {METADATA: json_writer({**metadata, SAVE: save})})
        except BaseException:
            self.discard(directory)
            raise
        name = directory.rpartition("/")[2]
        self._saves[name] = save
        try:
            with names_store_errors(directory):
                self._files.rm_file(f"{directory}/{WRITING}")
                self._files.pipe_file(f"{self.path}/{LATEST}", name.encode())
        except (OSError, UnavailableError) as error:  # the checkpoint is complete, and a resume finds it
            logging.warning("%s is saved; the file `latest` may not name it (%s)", directory, error_line(error))
        else:
            self._prune(name)

    def _delete(self, name: str) -> None:
        directory = f"{self._steps}/{name}"
        with names_store_errors(directory):
            self._delete_directory(directory)

    def _delete_directory(self, directory: str) -> None:
        """Deletes the metadata first and the mark last, so that an interruption leaves nothing like a checkpoint."""
        self._mark(directory)
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(f"{directory}/{METADATA}")
        if rest := [f"{directory}/{name}" for name in file_sizes(directory) if name != WRITING]:
            self._files.rm(rest)
        self._files.rm(directory, recursive=True)

    def _mark(self, directory: str) -> None:
        self._write(directory, {WRITING: json_writer({"run_directory": self.path})})

    def _write(self, directory: str, writers: Writers) -> None:
        for name, write in writers.items():
            with self._files.open(f"{directory}/{name}", "wb") as file:
                write(file)
