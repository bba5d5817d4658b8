"""The saves of a run: their directories, numbers, and which of them are superseded. Common to all kinds of storage."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from EasyLM.checkpoints.directories import list_directory, orbax_record
from EasyLM.checkpoints.layout import CHECKPOINTS
from EasyLM.checkpoints.listing import list_checkpoints
from EasyLM.checkpoints.metadata import with_digest
from EasyLM.storage import is_remote

Writers = Mapping[str, Callable[[BinaryIO], Any]]  # file name -> function that writes to the open file, in this order
# The steps of a save. Process 0 calls `Begin` and `Commit`; every process calls `Finish` in the background.
Begin = Callable[[], str]  # () -> the directory of a new checkpoint, until it is complete
Commit = Callable[[str, Writers], None]  # (that directory, files to add) -> None; completes the checkpoint
Finish = Callable[[Commit], None]  # writes what has been copied


class Saves:
    """The step directories of a run. Subclasses write to one kind of storage.

    Args:
      keep_latest: how many of the latest checkpoints are kept, besides the milestones.
    """

    def __init__(self, path: str, keep_latest: int):
        self._keep_latest = keep_latest
        self.path = path.rstrip("/") if is_remote(path) else os.path.realpath(path)
        self._steps = f"{self.path}/{CHECKPOINTS}"
        self._saves: dict[str, Mapping[str, Any]] = {}  # step directory -> what the save recorded about itself
        self._last_number = 0

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
        """Returns an unused directory name. The step may already exist if the run resumed from a milestone."""
        used = list_directory(self._steps)
        name, count = f"{kind}_{step:08d}", 0
        while name in used:
            count += 1
            name = f"{kind}_{step:08d}_{count}"
        return name

    def _superseded(self, name: str) -> list[str]:
        """Returns the step directories that the save `name` makes superfluous.

        A milestone is superseded only by a milestone of the same step.
        """
        newest, step = self._saves[name], name.split("_")[1]
        own = {other: save for other, save in self._saves.items() if save.get("run_directory") == self.path}
        others = [other for other in own if other == name or other.split("_")[1] != step]
        latest = sorted(others, key=lambda other: own[other].get("number", 0))[-self._keep_latest :]

        def is_superseded(other: str) -> bool:
            same_step = other.split("_")[1] == step
            if own[other].get("milestone") is False:
                return same_step or other not in latest
            return same_step and newest["milestone"]

        return [other for other in own if other != name and is_superseded(other)]


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Returns a JSON file that people can read."""
    return (json.dumps(value, indent=2) + "\n").encode()


def json_writer(value: Mapping[str, Any]) -> Callable[[BinaryIO], Any]:
    """Returns a function that writes a sidecar."""
    return lambda file: file.write(json_bytes(with_digest(value)))
