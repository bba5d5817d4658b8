"""The checkpoints of a run on disk: a directory per saved step, seen through links that move all at once.

    RUN/checkpoints/step_00000020/{streaming_train_state, dataset.json, metadata.json}
    RUN/latest                    -> checkpoints/step_00000020
    RUN/streaming_train_state     -> latest/streaming_train_state     (dataset.json, metadata.json likewise)
    RUN/streaming_train_state_20  -> checkpoints/step_00000020/...    (a milestone; dataset_20.json, metadata_20.json)

A checkpoint is written under a temporary name, synced, and renamed when whole; then `latest` is swapped in one rename,
so that its files change together; then what no link names any more is deleted. A kill at any moment leaves the last
whole checkpoint in place.

Where there are no links (object stores, through fsspec) the directories are the same, and `metadata.json`, written
last, makes one count. There `latest` is an object that holds the newest directory's name, and a run deletes of its own
checkpoints the one before the newest, unless that is a milestone.
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Mapping

import fsspec

from EasyLM.errors import UserError
from EasyLM.storage import is_remote

CHECKPOINTS, LATEST, TEMPORARY = "checkpoints", "latest", ".tmp-"
DATASET, METADATA = "dataset.json", "metadata.json"
PREFIX_OF = {"streaming_train_state": "trainstate", "streaming_params": "params"}  # file -> how it is loaded
_STEP = re.compile(r"step_(\d{8,})(_\d+)?")

Writers = Mapping[str, Callable]  # file name -> function that writes it to an open binary file


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint of a run: how to load it, and the files with it."""

    spec: str  # PREFIX::FILE
    dataset_state: str
    metadata: str


def newest(run_dir: str) -> Saved | None:
    """The newest whole checkpoint of a run directory, or None. Its files stay until the run has saved again."""
    return open_run_directory(run_dir).newest() if is_remote(run_dir) or os.path.isdir(run_dir) else None


def open_run_directory(path: str):
    """The run directory at `path`: with links, or without where a remote or mounted store has none."""
    return PlainDirectory(path) if is_remote(path) else LinkedDirectory(path)


def beside(checkpoint_path: str, name: str) -> str | None:
    """The `metadata` or `dataset` file that belongs to a checkpoint file: JSON, or a release's pickle; else None."""
    if is_remote(checkpoint_path):
        directory, base = checkpoint_path.rsplit("/", 1)
        exists = fsspec.url_to_fs(directory)[0].exists
    else:
        directory, base = os.path.split(os.path.realpath(checkpoint_path))  # through the links: files of one save
        exists = os.path.exists
    milestone = re.fullmatch(rf"(?:{'|'.join(PREFIX_OF)})(_\d+)", base)  # a release's: its metadata is metadata_20.pkl
    candidates = [f"{directory}/{name}{milestone[1] if milestone else ''}{ending}" for ending in (".json", ".pkl")]
    return next((path for path in candidates if exists(path)), None)


def _saved(directory: str, names) -> Saved | None:
    state = next((name for name in PREFIX_OF if name in names), None)
    if state is None or METADATA not in names:
        return None
    return Saved(f"{PREFIX_OF[state]}::{directory}/{state}", f"{directory}/{DATASET}", f"{directory}/{METADATA}")


class LinkedDirectory:
    """A run directory on a disk."""

    def __init__(self, path: str):
        self.path = path
        self._steps = os.path.join(path, CHECKPOINTS)

    def newest(self) -> Saved | None:
        """See `newest`."""
        directory = os.path.realpath(os.path.join(self.path, LATEST))
        return _saved(directory, os.listdir(directory)) if os.path.isdir(directory) else None

    def prepare(self) -> None:
        """Makes the directory, and removes what a killed run left half-written.

        Raises:
          UserError: if it cannot be written, or was copied without its links.
        """
        try:
            os.makedirs(self._steps, exist_ok=True)
            self._link(f"{TEMPORARY}probe", "x")
            for directory in (self._steps, self.path):
                for name in os.listdir(directory):
                    if name.startswith(TEMPORARY):
                        _remove(os.path.join(directory, name))
        except OSError as error:
            raise UserError(f"{self.path}: checkpoints cannot be written there ({error.strerror})") from None
        latest = os.path.join(self.path, LATEST)
        if os.path.lexists(latest) and not os.path.islink(latest):
            raise UserError(f"{latest}: not a link, as in a run directory copied without its links; move it away")

    def write(self, step: int, writers: Writers, milestone: bool) -> None:
        """Writes a checkpoint and makes it the newest. On an error nothing of it is left, and nothing else changed."""
        temporary = os.path.join(self._steps, f"{TEMPORARY}{step}")
        try:
            os.mkdir(temporary)
            for name, write in writers.items():
                with open(os.path.join(temporary, name), "wb", buffering=1 << 16) as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
            _sync(temporary)
            whole = self._free_name(step)
            os.rename(temporary, os.path.join(self._steps, whole))
        except BaseException:
            _remove(temporary)
            raise
        _sync(self._steps)
        self._show(whole, step, list(writers), milestone)
        self._prune()

    def _free_name(self, step: int) -> str:
        """A step saved before (by a run that went back) keeps its directory until the links have left it."""
        name, count = f"step_{step:08d}", 0
        while os.path.lexists(os.path.join(self._steps, name)):
            count += 1
            name = f"step_{step:08d}_{count}"
        return name

    def _show(self, whole: str, step: int, names: list[str], milestone: bool) -> None:
        names = sorted(names, key=lambda name: name in PREFIX_OF)  # who sees the state, sees what belongs to it
        if milestone:
            for name in names:
                stem, ending = os.path.splitext(name)
                self._link(f"{stem}_{step}{ending}", f"{CHECKPOINTS}/{whole}/{name}")
        for name in names:
            self._link(name, f"{LATEST}/{name}")
        self._link(LATEST, f"{CHECKPOINTS}/{whole}")  # the one move that changes them all
        _sync(self.path)
        for name in PREFIX_OF:  # of a run that saved the other kind before
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
        """Deletes the steps that no link names."""
        links = [entry.path for entry in os.scandir(self.path) if entry.is_symlink()]
        kept = {
            os.path.relpath(os.path.realpath(link), os.path.realpath(self._steps)).split(os.sep)[0] for link in links
        }
        for name in os.listdir(self._steps):
            if _STEP.fullmatch(name) and name not in kept:
                doomed = os.path.join(self._steps, f"{TEMPORARY}{name}")
                os.rename(os.path.join(self._steps, name), doomed)  # a step's directory is whole or not there
                _remove(doomed)


class PlainDirectory:
    """A run directory on a store without links or renames."""

    def __init__(self, path: str):
        self.path = path.rstrip("/")
        self._files, _ = fsspec.url_to_fs(self.path)
        self._previous = None  # written by this run, and not a milestone

    def newest(self) -> Saved | None:
        """See `newest`."""
        steps = f"{self.path}/{CHECKPOINTS}"
        self._files.invalidate_cache()
        if not self._files.exists(steps):
            return None
        found = {os.path.basename(name.rstrip("/")) for name in self._files.ls(steps, detail=False)}
        order = sorted((name for name in found if _STEP.fullmatch(name)), reverse=True)
        latest = f"{self.path}/{LATEST}"  # not the highest number, where a run has gone back to a milestone
        if self._files.exists(latest) and (name := self._files.cat_file(latest).decode()) in order:
            order.insert(0, name)
        for name in order:
            names = {os.path.basename(path) for path in self._files.ls(f"{steps}/{name}", detail=False)}
            if saved := _saved(f"{steps}/{name}", names):
                return saved
        return None

    def prepare(self) -> None:
        """Checks that the store can be written. Raises UserError if not."""
        probe = f"{self.path}/{TEMPORARY}probe"
        try:
            self._files.makedirs(f"{self.path}/{CHECKPOINTS}", exist_ok=True)
            self._files.pipe_file(probe, b"x")
            self._files.rm_file(probe)
        except Exception as error:  # each store has its own
            raise UserError(f"{self.path}: checkpoints cannot be written there ({error})") from None

    def write(self, step: int, writers: Writers, milestone: bool) -> None:
        """Writes a checkpoint; its metadata comes last and makes it count. One of the same step is there until then."""
        directory, replaced = f"{self.path}/{CHECKPOINTS}/step_{step:08d}", []
        while self._files.exists(f"{directory}/{METADATA}"):
            replaced.append(directory)
            directory = f"{self.path}/{CHECKPOINTS}/step_{step:08d}_{len(replaced)}"
        if self._files.exists(directory):  # half-written
            self._files.rm(directory, recursive=True)
        self._files.makedirs(directory, exist_ok=True)
        for name in sorted(writers, key=lambda name: name == METADATA):
            with self._files.open(f"{directory}/{name}", "wb") as file:
                writers[name](file)
        self._files.pipe_file(f"{self.path}/{LATEST}", os.path.basename(directory).encode())
        previous, self._previous = self._previous, None if milestone else directory
        for doomed in {previous, *replaced} - {None, directory}:
            self._files.rm(doomed, recursive=True)


def _sync(directory: str) -> None:
    """Makes names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        os.remove(path)
