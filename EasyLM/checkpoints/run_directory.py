"""The checkpoints of a run on disk: one directory per saved step, and symbolic links with atomic updates.

    RUN/checkpoints/step_00000020/{streaming_train_state, dataset.json, metadata.json}
    RUN/latest                    -> checkpoints/step_00000020
    RUN/streaming_train_state     -> latest/streaming_train_state     (dataset.json, metadata.json likewise)
    RUN/streaming_train_state_20  -> checkpoints/step_00000020/...    (a milestone; dataset_20.json, metadata_20.json)

A save has three stages. It writes the files to a temporary directory, calls fsync, and renames the directory. It then
replaces the link `latest` by one rename, which switches all files of the checkpoint atomically. Last, it deletes the
step directories that no link points to. If the process is killed at any moment, the last complete checkpoint remains.

Object stores (accessed through fsspec) have no links. The step directories are the same. A save writes `metadata.json`
last, so a checkpoint with this file is complete. The object `latest` holds the name of the newest directory. A run
deletes its own previous checkpoint unless it is a milestone.
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from typing import BinaryIO

from EasyLM.errors import UserError
from EasyLM.storage import flush_to_disk, is_remote, remote_file_system

CHECKPOINTS, LATEST, TEMPORARY = "checkpoints", "latest", ".tmp-"
DATASET, METADATA = "dataset.json", "metadata.json"
PREFIX_OF = {"streaming_train_state": "trainstate", "streaming_params": "params"}  # file name -> checkpoint prefix
_STEP_DIRECTORY = re.compile(r"step_(\d{8,})(_\d+)?")

Writers = Mapping[str, Callable[[BinaryIO], None]]  # file name -> function that writes to the open file


@dataclasses.dataclass(frozen=True)
class SavedCheckpoint:
    """The paths of a complete checkpoint of a run."""

    spec: str  # PREFIX::PATH of the state
    dataset_state: str
    metadata: str


def open_run_directory(path: str) -> "LinkedDirectory | PlainDirectory":
    """Returns the run directory at `path`, which need not exist. A local directory has links; a remote one has none."""
    return PlainDirectory(path) if is_remote(path) else LinkedDirectory(path)


def latest_checkpoint(run_dir: str) -> SavedCheckpoint | None:
    """Returns the newest complete checkpoint of a run, or None. The next save of the run may delete its files."""
    return open_run_directory(run_dir).latest() if is_remote(run_dir) or os.path.isdir(run_dir) else None


def sidecar_path(checkpoint_path: str, name: str) -> str | None:
    """Returns the path of the `metadata` or `dataset` file beside a checkpoint file, or None.

    The file is JSON or a pickle of the LVM release.
    """
    if is_remote(checkpoint_path):
        directory, base = checkpoint_path.rsplit("/", 1)
        exists = remote_file_system(directory)[0].exists
    else:
        directory, base = os.path.split(os.path.realpath(checkpoint_path))  # resolved to one save
        exists = os.path.exists
    milestone = re.fullmatch(rf"(?:{'|'.join(PREFIX_OF)})(_\d+)", base)  # LVM release: metadata_20.pkl
    candidates = [f"{directory}/{name}{milestone[1] if milestone else ''}{ending}" for ending in (".json", ".pkl")]
    return next((path for path in candidates if exists(path)), None)


def _saved_checkpoint(directory: str, names: Collection[str]) -> SavedCheckpoint | None:
    state = next((name for name in PREFIX_OF if name in names), None)
    if state is None or METADATA not in names:
        return None
    return SavedCheckpoint(
        f"{PREFIX_OF[state]}::{directory}/{state}", f"{directory}/{DATASET}", f"{directory}/{METADATA}"
    )


class LinkedDirectory:
    """A run directory on a local file system, with symbolic links."""

    def __init__(self, path: str):
        self.path = path
        self._steps = os.path.join(path, CHECKPOINTS)

    def latest(self) -> SavedCheckpoint | None:
        """Returns the checkpoint that the link `latest` points to, or None."""
        directory = os.path.realpath(os.path.join(self.path, LATEST))
        return _saved_checkpoint(directory, os.listdir(directory)) if os.path.isdir(directory) else None

    def prepare(self) -> None:
        """Creates the directory and deletes the incomplete files of an interrupted run.

        Raises:
          UserError: if the directory is not writable, or is a copy that lost its links.
        """
        try:
            os.makedirs(self._steps, exist_ok=True)
            self._link(f"{TEMPORARY}probe", "x")
            for directory in (self._steps, self.path):
                for name in os.listdir(directory):
                    if name.startswith(TEMPORARY):
                        _remove(os.path.join(directory, name))
        except OSError as error:
            raise UserError(f"{self.path}: cannot write checkpoints there ({error.strerror})") from None
        latest = os.path.join(self.path, LATEST)
        if os.path.lexists(latest) and not os.path.islink(latest):
            raise UserError(f"{latest}: not a symbolic link; the run directory was copied without its links: remove it")

    def write(self, step: int, writers: Writers, milestone: bool) -> None:
        """Writes a checkpoint and points `latest` to it. A failed write leaves no files and changes no links."""
        temporary = os.path.join(self._steps, f"{TEMPORARY}{step}")
        try:
            os.mkdir(temporary)
            for name, write in writers.items():
                with open(os.path.join(temporary, name), "wb", buffering=1 << 16) as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
            flush_to_disk(temporary)
            directory_name = self._free_name(step)
            os.rename(temporary, os.path.join(self._steps, directory_name))
        except BaseException:
            _remove(temporary)
            raise
        flush_to_disk(self._steps)
        self._update_links(directory_name, step, list(writers), milestone)
        self._prune()

    def _free_name(self, step: int) -> str:
        """Returns an unused directory name. The step may already exist if the run resumed from a milestone."""
        name, count = f"step_{step:08d}", 0
        while os.path.lexists(os.path.join(self._steps, name)):
            count += 1
            name = f"step_{step:08d}_{count}"
        return name

    def _update_links(self, directory_name: str, step: int, names: list[str], milestone: bool) -> None:
        names = sorted(names, key=lambda name: name in PREFIX_OF)  # the state is last, so its sidecars exist first
        if milestone:
            for name in names:
                stem, ending = os.path.splitext(name)
                self._link(f"{stem}_{step}{ending}", f"{CHECKPOINTS}/{directory_name}/{name}")
        for name in names:
            self._link(name, f"{LATEST}/{name}")
        self._link(LATEST, f"{CHECKPOINTS}/{directory_name}")  # switches all files atomically
        flush_to_disk(self.path)
        for name in PREFIX_OF:  # the link dangles if the run saved the other kind before
            link = os.path.join(self.path, name)
            if os.path.islink(link) and not os.path.exists(link):
                os.remove(link)

    def _link(self, name: str, target: str) -> None:
        link = os.path.join(self.path, name)
        if os.path.islink(link) and os.readlink(link) == target:
            return
        temporary = os.path.join(self.path, f"{TEMPORARY}link")
        _remove(temporary)
        os.symlink(target, temporary)
        os.replace(temporary, link)

    def _prune(self) -> None:
        """Deletes the step directories that no link points to."""
        links = [entry.path for entry in os.scandir(self.path) if entry.is_symlink()]
        kept = {
            os.path.relpath(os.path.realpath(link), os.path.realpath(self._steps)).split(os.sep)[0] for link in links
        }
        for name in os.listdir(self._steps):
            if _STEP_DIRECTORY.fullmatch(name) and name not in kept:
                doomed = os.path.join(self._steps, f"{TEMPORARY}{name}")
                os.rename(os.path.join(self._steps, name), doomed)  # a step directory is always complete
                _remove(doomed)


class PlainDirectory:
    """A run directory on an object store, which has no links and no atomic renames."""

    def __init__(self, path: str):
        self.path = path.rstrip("/")
        self._files, _ = remote_file_system(self.path)
        self._previous: str | None = None  # the directory of the last save; None for a milestone

    def latest(self) -> SavedCheckpoint | None:
        """Returns the checkpoint that `latest` names, or else the complete one with the highest step, or None."""
        steps = f"{self.path}/{CHECKPOINTS}"
        self._files.invalidate_cache()
        if not self._files.exists(steps):
            return None
        directories = {os.path.basename(name.rstrip("/")) for name in self._files.ls(steps, detail=False)}
        order = sorted((name for name in directories if _STEP_DIRECTORY.fullmatch(name)), reverse=True)
        latest = f"{self.path}/{LATEST}"  # not the highest step if the run resumed from a milestone
        if self._files.exists(latest) and (name := self._files.cat_file(latest).decode()) in order:
            order.insert(0, name)
        for name in order:
            names = {os.path.basename(path) for path in self._files.ls(f"{steps}/{name}", detail=False)}
            if saved := _saved_checkpoint(f"{steps}/{name}", names):
                return saved
        return None

    def prepare(self) -> None:
        """Checks that the store is writable.

        Raises:
          UserError: if the store is not writable.
        """
        probe = f"{self.path}/{TEMPORARY}probe"
        try:
            self._files.makedirs(f"{self.path}/{CHECKPOINTS}", exist_ok=True)
            self._files.pipe_file(probe, b"x")
            self._files.rm_file(probe)
        except Exception as error:  # each store has its own exceptions
            raise UserError(f"{self.path}: cannot write checkpoints there ({error})") from None

    def write(self, step: int, writers: Writers, milestone: bool) -> None:
        """Writes a checkpoint, with its metadata last. Then deletes an older checkpoint of the same step."""
        directory, replaced = f"{self.path}/{CHECKPOINTS}/step_{step:08d}", []
        while self._files.exists(f"{directory}/{METADATA}"):
            replaced.append(directory)
            directory = f"{self.path}/{CHECKPOINTS}/step_{step:08d}_{len(replaced)}"
        if self._files.exists(directory):  # an incomplete checkpoint
            self._files.rm(directory, recursive=True)
        self._files.makedirs(directory, exist_ok=True)
        for name in sorted(writers, key=lambda name: name == METADATA):
            with self._files.open(f"{directory}/{name}", "wb") as file:
                writers[name](file)
        self._files.pipe_file(f"{self.path}/{LATEST}", os.path.basename(directory).encode())
        previous, self._previous = self._previous, None if milestone else directory
        for doomed in {previous, *replaced} - {None, directory}:
            self._files.rm(doomed, recursive=True)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        os.remove(path)
