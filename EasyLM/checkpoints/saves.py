"""The saves of a run: their directories, numbers, and which of them are superseded. Common to all kinds of storage."""

import abc
import json
import logging
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, BinaryIO

from EasyLM.checkpoints.directories import list_directory, orbax_record
from EasyLM.checkpoints.layout import CHECKPOINTS, STEP_DIRECTORY
from EasyLM.checkpoints.listing import list_checkpoints
from EasyLM.checkpoints.metadata import with_digest
from EasyLM.errors import UnavailableError, error_line
from EasyLM.storage import is_remote

Writers = Mapping[str, Callable[[BinaryIO], Any]]  # file name -> function that writes to the open file, in this order
# The steps of a save. Process 0 calls `Begin` and `Commit`; every process calls `Finish` in the background.
Begin = Callable[[], str]  # () -> the directory of a new checkpoint, until it is complete
Commit = Callable[[str, Writers], None]  # (that directory, files to add) -> None; completes the checkpoint
Finish = Callable[[Commit], None]  # writes what has been copied


class Saves(abc.ABC):
    """The step directories of a run. Subclasses write to one kind of storage.

    Args:
      keep_latest: how many of the latest checkpoints are kept, milestones among them included. Older milestones are
        kept as well.
      guard: called before a save writes, and before it counts. Raises UserError if another run has taken the directory.
    """

    def __init__(self, path: str, keep_latest: int, guard: Callable[[], None]):
        self._keep_latest, self._guard = keep_latest, guard
        self.path = path.rstrip("/") if is_remote(path) else os.path.realpath(path)
        self._steps = f"{self.path}/{CHECKPOINTS}"
        self._saves: dict[str, Mapping[str, Any]] = {}  # step directory -> what the save recorded about itself
        self._last_number = 0

    @property
    def has_saved(self) -> bool:
        """Whether the run has saved a checkpoint here, in this start or an earlier one."""
        return bool(self._saves)

    def _read_saves(self) -> None:
        """Reads what earlier saves recorded about themselves."""
        listed = list_checkpoints(self.path)
        self._saves = {
            os.path.basename(saved.name): saved.save for saved in listed if saved.name.startswith(f"{CHECKPOINTS}/")
        }
        self._last_number = max((saved.number for saved in listed), default=0)

    def _record(self, directory: str, milestone: bool) -> dict[str, Any]:
        """Returns what a new save records about itself.

        Args:
          directory: of the checkpoint.
        """
        self._last_number += 1
        record = {"run_directory": self.path, "number": self._last_number, "milestone": milestone}
        return record | orbax_record(directory)

    def _free_name(self, step: int, kind: str = "step") -> str:
        """Returns an unused directory name. The step may already exist if the run resumed from a milestone.

        Its number is then higher than those in use, so that the names of one step show their order.
        """
        used = [match for name in list_directory(self._steps) if (match := STEP_DIRECTORY.fullmatch(name))]
        numbers = [int(match[3] or 0) for match in used if match[1] == kind and int(match[2]) == step]
        return f"{kind}_{step:08d}" + (f"_{max(numbers) + 1}" if numbers else "")

    def _superseded(self, name: str) -> list[str]:
        """Returns the step directories that the save `name` makes superfluous.

        A milestone is superseded only by a milestone of the same step.
        """
        newest, step = self._saves[name], _step_of(name)
        own = {other: save for other, save in self._saves.items() if save.get("run_directory") == self.path}
        others = [other for other in own if other == name or _step_of(other) != step]
        latest = sorted(others, key=lambda other: own[other].get("number", 0))[-self._keep_latest :]

        def is_superseded(other: str) -> bool:
            same_step = _step_of(other) == step
            if own[other].get("milestone") is False:
                return same_step or other not in latest
            return same_step and newest["milestone"]

        return [other for other in own if other != name and is_superseded(other)]

    def _prune(self, newest: str, kept: Collection[str] = ()) -> None:
        """Deletes the step directories that the save `newest` supersedes, except those in `kept`.

        If one cannot be deleted, a warning is logged; the next save tries again.
        """
        for name in self._superseded(newest):
            if name in kept:
                continue
            try:
                self._delete(name)
            except (OSError, UnavailableError) as error:
                logging.warning("%s/%s: cannot be deleted (%s)", self._steps, name, error_line(error))
            else:
                del self._saves[name]

    @abc.abstractmethod
    def _delete(self, name: str) -> None:
        """Deletes a step directory, which may be gone. If the process is killed, the rest is not a checkpoint.

        Raises:
          OSError, UnavailableError: if it cannot be deleted.
        """


def _step_of(name: str) -> int:
    match = STEP_DIRECTORY.fullmatch(name)
    assert match is not None, name
    return int(match[2])


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Returns a JSON file that people can read."""
    return (json.dumps(value, indent=2) + "\n").encode()


def json_writer(value: Mapping[str, Any]) -> Callable[[BinaryIO], Any]:
    """Returns a function that writes a sidecar."""
    return lambda file: file.write(json_bytes(with_digest(value)))
