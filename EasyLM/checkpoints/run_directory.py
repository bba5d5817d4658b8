"""Writes the checkpoints of a run: one directory per saved step, and symbolic links with atomic updates.

    RUN/checkpoints/step_00000020/{streaming_train_state, checksums.json, dataset.json, metadata.json}
    RUN/latest                    -> checkpoints/step_00000020
    RUN/streaming_train_state     -> latest/streaming_train_state     (the other files likewise)
    RUN/streaming_train_state_20  -> checkpoints/step_00000020/...    (a milestone; dataset_20.json, metadata_20.json)

A checkpoint of Orbax has the directory `orbax_train_state` in place of the state file, and no checksums.json.

A save has three stages. It writes the files to a temporary directory, calls fsync, and renames the directory. It then
replaces the link `latest` by one rename, which switches all files of the checkpoint atomically. Last, it deletes older
step directories. If the process is killed at any moment, the last complete checkpoint remains.

Object stores (accessed through fsspec) and some local file systems have no links. There the object or file `latest`
holds the name of the newest directory. On an object store, which cannot rename, a save writes `metadata.json` last, so
a checkpoint with this file is complete.

A run deletes only what it has written itself: step directories whose metadata names this run directory, which are not
milestones, and which no link points to. It replaces only its own links. A file in the place of a link, as in a copied
run directory or in one of the LVM release, moves into a step directory `kept_*`.
"""

import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from EasyLM.checkpoints import displaced
from EasyLM.checkpoints.directories import is_own_link
from EasyLM.checkpoints.layout import CHECKPOINTS, LATEST, LINKS, METADATA, ORBAX_STATES, PREFIX_OF, SAVE, TEMPORARY
from EasyLM.checkpoints.remote_run_directory import RemoteRunDirectory
from EasyLM.checkpoints.saves import Saves, Writers, json_writer
from EasyLM.errors import UserError
from EasyLM.storage import atomic_file, flush_to_disk, flush_tree_to_disk, is_remote, is_running, owner_tag


def open_run_directory(path: str, keep_latest: int = 1, guard: Callable[[], None] = lambda: None) -> "RunDirectory":
    """Returns the run directory at `path`, which need not exist.

    Args:
      keep_latest, guard: see `Saves`.
    """
    return (RemoteRunDirectory if is_remote(path) else LocalRunDirectory)(path, keep_latest, guard)


class LocalRunDirectory(Saves):
    """A run directory on a local file system, with symbolic links where the file system supports them."""

    def __init__(self, path: str, keep_latest: int, guard: Callable[[], None]):
        super().__init__(path, keep_latest, guard)
        self._has_links = True

    def prepare(self) -> None:
        """Creates the directory and deletes the temporary files of interrupted saves.

        Those of a process that runs on this machine stay: it may have lost the lock while it was suspended in a save.

        Raises:
          UserError: if the directory is not writable, or holds a foreign file in the place of a link.
        """
        probe = os.path.join(self._steps, _temporary_name("probe"))
        try:
            os.makedirs(self._steps, exist_ok=True)
            for directory in (self._steps, self.path):
                for name in os.listdir(directory):
                    if name.startswith(TEMPORARY) and not is_running(_owner(name)):
                        _remove_at_once(os.path.join(directory, name))
            os.mkdir(probe)
            self._has_links = _can_link(os.path.join(probe, "link"))
            _remove(probe)
        except OSError as error:
            raise UserError(f"{self.path}: cannot write checkpoints there ({error.strerror})") from None
        displaced.check_replaceable(self.path)
        self._read_saves()
        if not self._has_links:
            logging.warning(
                "%s: no symbolic links; the file `latest` names the directory of the newest state", self.path
            )

    @contextlib.contextmanager
    def visible_file(self) -> Iterator[str | None]:
        """Yields the path, within this directory, of a temporary file. Processes that share the disk see it."""
        path = f"{CHECKPOINTS}/{_temporary_name('visible')}"
        with open(os.path.join(self.path, path), "wb"):
            pass
        try:
            yield path
        finally:
            _remove(os.path.join(self.path, path))

    def is_visible(self, path: str) -> bool:
        """Whether this process can see the `visible_file` of another process.

        An NFS client caches for up to a minute that a directory is missing. Creating the directory makes it ask the
        server.
        """
        with contextlib.suppress(OSError):  # the disk is another one, and read-only
            os.makedirs(self._steps, exist_ok=True)
        return os.path.exists(os.path.join(self.path, path))

    def begin(self, step: int) -> str:
        """Returns a new temporary directory for the files of a checkpoint."""
        self._guard()
        temporary = os.path.join(self._steps, _temporary_name(f"{step}"))
        os.mkdir(temporary)
        return temporary

    def discard(self, temporary: str) -> None:
        """Deletes the directory of a failed save."""
        _remove(temporary)

    def commit(self, temporary: str, step: int, writers: Writers, metadata: Mapping[str, Any], milestone: bool) -> None:
        """Adds files to the directory of `begin`, makes it a checkpoint, and points `latest` to it.

        If this fails, no files remain, and no links have changed.
        """
        try:
            states = [name for name in os.listdir(temporary) if name in ORBAX_STATES]
            for name in states:  # Orbax does not flush all that it writes
                flush_tree_to_disk(os.path.join(temporary, name))
            save = self._record(temporary, milestone)
            for name, write in {**writers, METADATA: json_writer({**metadata, SAVE: save})}.items():
                with open(os.path.join(temporary, name), "wb", buffering=1 << 16) as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
            flush_to_disk(temporary)
            self._guard()  # again: this process may have been suspended while it wrote
            directory_name = self._free_name(step)
            os.rename(temporary, os.path.join(self._steps, directory_name))
        except BaseException:
            _remove(temporary)
            raise
        flush_to_disk(self._steps)
        self._saves[directory_name] = save
        try:
            self._publish(directory_name, step, [*states, *writers, METADATA], milestone)
            self._prune(directory_name, kept=self._linked())
        except OSError as error:  # the checkpoint is complete, and a resume finds it without links
            logging.warning("%s/%s is saved; its links are not up to date: %s", self._steps, directory_name, error)

    def _publish(self, directory_name: str, step: int, names: list[str], milestone: bool) -> None:
        """Makes the links of a new checkpoint; without links, writes the file `latest`."""
        for name in (LATEST, *LINKS):
            self._move_aside(name)
        if not self._has_links:
            with atomic_file(os.path.join(self.path, LATEST)) as file:
                file.write(directory_name.encode())
            return
        names = sorted(names, key=lambda name: name in PREFIX_OF)  # the state is last, so its sidecars exist first
        if milestone:
            for name in names:
                self._move_aside(name, f"_{step}")
                stem, ending = os.path.splitext(name)
                self._link(f"{stem}_{step}{ending}", f"{CHECKPOINTS}/{directory_name}/{name}")
        for name in names:
            self._link(name, f"{LATEST}/{name}")
        self._link(LATEST, f"{CHECKPOINTS}/{directory_name}")  # switches all files atomically
        flush_to_disk(self.path)
        for name in LINKS:  # the link dangles if the run saved the other kind before
            link = os.path.join(self.path, name)
            if is_own_link(link) and not os.path.exists(link):
                os.remove(link)

    def _link(self, name: str, target: str) -> None:
        link = os.path.join(self.path, name)
        if os.path.lexists(link) and not is_own_link(link) and not (name == LATEST and os.path.isfile(link)):
            logging.warning("%s is kept, because this run did not write it; it is not the state in %s", link, target)
            return
        if os.path.islink(link) and os.readlink(link) == target:
            return
        temporary = os.path.join(self.path, _temporary_name("link"))
        os.symlink(target, temporary)
        os.replace(temporary, link)

    def _move_aside(self, name: str, suffix: str = "") -> None:
        """Moves a checkpoint out of the place of a link, into a step directory."""
        step = displaced.step_of(self.path, name, suffix)
        if step is not None and displaced.is_occupied(self.path, name, suffix):
            kept = os.path.join(self._steps, self._free_name(step, "kept"))
            displaced.move(self.path, name, suffix, kept)
            logging.warning(
                "%s: %s%s was a file, not a link: its checkpoint is now in %s", self.path, name, suffix, kept
            )

    def _linked(self) -> set[str]:
        """Returns the step directories that links in the run directory point to."""
        links = [entry.path for entry in os.scandir(self.path) if entry.is_symlink()]
        steps = os.path.realpath(self._steps)  # it may be a link to another disk
        return {os.path.relpath(os.path.realpath(link), steps).split(os.sep)[0] for link in links}

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            _remove_at_once(os.path.join(self._steps, name))  # a step directory is always complete


RunDirectory = LocalRunDirectory | RemoteRunDirectory


def _temporary_name(purpose: str) -> str:
    return f"{TEMPORARY}{purpose}-{owner_tag()}.{secrets.token_hex(4)}"


def _owner(temporary_name: str) -> str:
    """Returns the `owner_tag` in the name; other text for a file of an older version."""
    return temporary_name.removeprefix(TEMPORARY).partition("-")[2].rpartition(".")[0]


def _can_link(path: str) -> bool:
    try:
        os.symlink("target", path)
    except OSError:
        return False
    return True


def _remove_at_once(path: str) -> None:
    """Removes a file or directory under its name in one step, so that a process that uses it finds all of it or none.

    Raises:
      FileNotFoundError: if it does not exist.
    """
    doomed = os.path.join(os.path.dirname(path), _temporary_name("deleted"))
    os.rename(path, doomed)
    _remove(doomed)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        os.remove(path)
