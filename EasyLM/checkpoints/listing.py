"""Finds the checkpoints of a run directory in every form in which they occur.

The forms: step directories; the newest state and milestones as links, or as files where a copy (`cp -rL`, rsync, an
object store) has replaced the links; a directory `latest` of such a copy; the files of a run of the LVM release. A link
whose file no longer exists counts as a checkpoint that cannot be used.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from EasyLM.checkpoints.directories import file_sizes, list_directory
from EasyLM.checkpoints.entries import Entry
from EasyLM.checkpoints.formats import CHECKPOINT_FORMATS, Reader, open_checkpoint
from EasyLM.checkpoints.layout import (
    CHECKPOINTS,
    LATEST,
    METADATA,
    MILESTONE,
    PREFIX_OF,
    SAVE,
    STEP_DIRECTORY,
    TEMPORARY,
    WRITING,
)
from EasyLM.checkpoints.metadata import load_dataset_state, load_metadata
from EasyLM.errors import UnavailableError, UserError
from EasyLM.storage import is_remote, names_store_errors, remote_file_system


@dataclasses.dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint in a run directory, which may be incomplete or damaged.

    Attributes:
      name: the path of its directory or of its state file, relative to the run directory.
      spec: PREFIX::PATH of the state; empty if there is none.
      dataset_state, metadata: the paths of its sidecars; empty if there is none.
      contents: the content of the metadata; empty if it cannot be read.
      problem: why it cannot be used, as far as it is known without reading the state; empty if nothing is known.
      is_latest: whether `latest` names it.
    """

    name: str
    spec: str = ""
    dataset_state: str = ""
    metadata: str = ""
    contents: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problem: str = ""
    is_latest: bool = False

    @property
    def step(self) -> int | None:
        """Micro-steps done, from the metadata or else from the name; None if unknown."""
        step = self.contents.get("step")
        if isinstance(step, int):
            return step
        name = os.path.basename(self.name)
        in_name = STEP_DIRECTORY.fullmatch(name) or MILESTONE.fullmatch(name)
        return int(in_name[2]) if in_name else None

    @property
    def save(self) -> Mapping[str, Any]:
        """What the save recorded about itself; empty for files of older versions and of the LVM release."""
        section = self.contents.get(SAVE)
        return section if isinstance(section, Mapping) else {}

    @property
    def number(self) -> int:
        """The number of the save; 0 for files of older versions and of the LVM release."""
        number = self.save.get("number")
        return number if isinstance(number, int) else 0

    @property
    def order(self) -> tuple:
        """Sorts the checkpoints of a run by age.

        Saves are numbered, because a run that goes back to a milestone saves lower steps later. Older files have no
        number; among them the link `latest` decides, then the step.
        """
        unreadable = self.is_latest and not self.contents
        is_step_directory = self.name.startswith(CHECKPOINTS)
        return math.inf if unreadable else self.number, self.is_latest, self.step or 0, is_step_directory


@dataclasses.dataclass(frozen=True)
class OpenCheckpoint:
    """A whole checkpoint: its headers and sidecars have been read, its arrays have not."""

    saved: SavedCheckpoint
    entries: list[Entry]
    dataset_state: Mapping[str, Any]


def list_checkpoints(run_dir: str) -> list[SavedCheckpoint]:
    """Returns every checkpoint in a run directory, whole or not, the newest first.

    Raises:
      OSError: if a directory or a sidecar exists and cannot be read.
      UnavailableError: if an object store cannot be reached.
    """
    files = list_directory(run_dir)
    steps = list_directory(f"{run_dir}/{CHECKPOINTS}") if CHECKPOINTS in files else {}
    latest = _latest_name(run_dir, files)
    checkpoints = []
    for name, kind in steps.items():
        if STEP_DIRECTORY.fullmatch(name) and kind == "directory":
            checkpoints += _in_directory(run_dir, f"{CHECKPOINTS}/{name}", is_latest=name == latest)
    if files.get(LATEST) == "directory":
        checkpoints += _in_directory(run_dir, LATEST, is_latest=True)
    elif latest and steps.get(latest) != "directory":
        checkpoints.append(SavedCheckpoint(LATEST, problem=f"{CHECKPOINTS}/{latest} no longer exists", is_latest=True))
    for name, kind in files.items():
        milestone = MILESTONE.fullmatch(name)
        if name not in PREFIX_OF and not milestone:
            continue
        if kind in ("file", "directory"):
            suffix = f"_{milestone[2]}" if milestone else ""
            checkpoints.append(_group(run_dir, "", files, name, suffix, is_latest=False))
        elif kind == "dangling" and (milestone or not latest):  # with `latest`, the others dangle because of it
            checkpoints.append(
                SavedCheckpoint(name, problem=f"{os.readlink(os.path.join(run_dir, name))} no longer exists")
            )
    return sorted(checkpoints, key=lambda saved: saved.order, reverse=True)


def newest_whole(run_dir: str, formats: Mapping[str, Reader]) -> tuple[OpenCheckpoint | None, list[str]]:
    """Opens the newest checkpoint of a run directory that is whole.

    Args:
      formats: the allowed prefixes and their readers.

    Returns:
      The checkpoint or None, and why each newer one cannot be used.

    Raises:
      UnavailableError, OSError: if a disk or a store fails, so that a checkpoint can be neither used nor passed over.
    """
    problems: list[str] = []
    for saved in list_checkpoints(run_dir):
        try:
            return open_saved(saved, formats), problems
        except UnavailableError:  # the checkpoint may be whole
            raise
        except UserError as error:
            problems.append(f"{saved.name}: {error}")
    return None, problems


def latest_checkpoint(run_dir: str) -> SavedCheckpoint | None:
    """Returns the newest whole checkpoint of a run, or None. The next save of the run may delete its files."""
    newest, _ = newest_whole(run_dir, CHECKPOINT_FORMATS)
    return newest.saved if newest else None


def has_interrupted_save(run_dir: str) -> bool:
    """Whether a save has left files without completing its checkpoint."""
    steps = f"{run_dir}/{CHECKPOINTS}"
    names = list_directory(steps)
    return any(name.startswith(TEMPORARY) for name in names) or any(
        _is_interrupted(list_directory(f"{steps}/{name}")) for name in names
    )


def open_saved(saved: SavedCheckpoint, formats: Mapping[str, Reader]) -> OpenCheckpoint:
    """Opens a checkpoint of a list.

    Raises:
      UserError: if it is incomplete or damaged.
    """
    if saved.problem:
        raise UserError(saved.problem)
    dataset_state = load_dataset_state(saved.dataset_state)
    _check_files(saved)
    return OpenCheckpoint(saved, open_checkpoint(saved.spec, formats), dataset_state)


def _check_files(saved: SavedCheckpoint) -> None:
    """Checks that the files of a state of Orbax have the sizes that the save recorded.

    Raises:
      UserError: naming a file that is missing or has another size.
    """
    directory = saved.spec.partition("::")[2]
    saved_sizes = saved.save.get("files", {})
    sizes = file_sizes(directory) if saved_sizes else {}
    for name, size in saved_sizes.items():
        if name not in sizes:
            raise UserError(f"{directory}/{name} is missing")
        if sizes[name] != size:
            raise UserError(f"{directory}/{name}: has {sizes[name]} bytes, but {size} were saved")


def _latest_name(run_dir: str, files: Mapping[str, str]) -> str:
    """Returns the name of the step directory that `latest` names, as a link or as a file; or an empty string."""
    path = f"{run_dir}/{LATEST}"
    if files.get(LATEST) in ("link", "dangling"):
        return os.path.basename(os.readlink(path))
    if files.get(LATEST) == "file":
        return read_latest_file(path)
    return ""


def read_latest_file(path: str) -> str:
    """Returns the name of the step directory in a file `latest`; or an empty string, if it holds something else."""
    if is_remote(path):
        system, inner = remote_file_system(path)
        with names_store_errors(path):
            name = system.cat_file(inner, start=0, end=100)  # by name: s3fs has another order
    else:
        with open(path, "rb") as file:
            name = file.read(100)
    text = name.decode(errors="replace").strip()
    return text if STEP_DIRECTORY.fullmatch(text) else ""


def _in_directory(run_dir: str, name: str, is_latest: bool) -> list[SavedCheckpoint]:
    """Returns the checkpoint in a directory of its own, unless it is the rest of an interrupted save."""
    files = list_directory(f"{run_dir}/{name}")
    if _is_interrupted(files):
        return []
    state = next((state for state in PREFIX_OF if state in files), "")
    return [_group(run_dir, name, files, state, "", is_latest)]


def _is_interrupted(files: Mapping[str, str]) -> bool:
    return WRITING in files and METADATA not in files


def _group(
    run_dir: str, directory: str, files: Mapping[str, str], state: str, suffix: str, is_latest: bool
) -> SavedCheckpoint:
    """Returns the checkpoint of a state file and of the sidecars with the same suffix in its directory."""
    path = f"{run_dir}/{directory}".rstrip("/")
    sidecars, contents, problems = {}, {}, []
    for kind in ("metadata", "dataset"):
        both = f"{kind}{suffix}.json", f"{kind}{suffix}.pkl"
        names = [name for name in both if files.get(name, "dangling") != "dangling"]
        sidecars[kind] = f"{path}/{names[0]}" if names else ""
        if not names:
            problems.append(f"{kind}{suffix}.json is missing")
    if not state:
        problems.append(f"the state is missing: none of {', '.join(PREFIX_OF)}")
    try:
        contents = load_metadata(sidecars["metadata"]) if sidecars["metadata"] else {}
        if sidecars["metadata"] and not (isinstance(contents, dict) and isinstance(contents.get("step"), int)):
            contents = {}
            problems.append(f"{sidecars['metadata']}: not the metadata of a run: it has no step")
    except UnavailableError:
        raise
    except UserError as error:
        problems.append(str(error))
    spec = f"{PREFIX_OF[state.removesuffix(suffix)]}::{path}/{state}" if state else ""
    name = directory or state
    return SavedCheckpoint(
        name, spec, sidecars["dataset"], sidecars["metadata"], contents, "; ".join(problems), is_latest
    )
