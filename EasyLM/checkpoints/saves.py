"""The saves of a run: their directories, numbers, and which of them are superseded. Common to all kinds of storage."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from EasyLM.checkpoints.layout import CHECKPOINTS
from EasyLM.checkpoints.listing import list_checkpoints, list_directory
from EasyLM.checkpoints.metadata import with_digest
from EasyLM.storage import is_remote

Writers = Mapping[str, Callable[[BinaryIO], Any]]  # file name -> function that writes to the open file, in this order


class Saves:
    """The step directories of a run. Subclasses write to one kind of storage."""

    def __init__(self, path: str):
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

    def _record(self, milestone: bool) -> dict[str, Any]:
        """Returns what a new save records about itself."""
        self._last_number += 1
        return {"run_directory": self.path, "number": self._last_number, "milestone": milestone}

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
        return [
            other
            for other, save in self._saves.items()
            if other != name
            and save.get("run_directory") == self.path
            and (save.get("milestone") is False or (newest["milestone"] and other.split("_")[1] == step))
        ]


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Returns a JSON file that people can read."""
    return (json.dumps(value, indent=2) + "\n").encode()


def json_writer(value: Mapping[str, Any]) -> Callable[[BinaryIO], Any]:
    """Returns a function that writes a sidecar."""
    return lambda file: file.write(json_bytes(with_digest(value)))
