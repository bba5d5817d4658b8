"""Results per example, appended to a file as they are computed. A stopped run resumes from that file.

The file exists only while a run is unfinished. Its first line holds the run's settings; each other line is a result
with a fingerprint of the example's files.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from EasyLM.errors import UserError
from EasyLM.storage import HeartbeatLock, check_output, is_remote, names_full_disk, parse_json, write_json
from evaluation.runs.example import EXAMPLE_FLAGS, Example
from evaluation.tasks import metrics

UNFINISHED = "unfinished.jsonl"  # end of the file's name
# Settings that do not change a result: a stopped run may resume with other values.
_RESUMABLE_SETTINGS = {
    *("input_file", "input_files", "read_file_list", "shuffle", "output_dir", "output_base_dir", "mesh_dim"),
    *("batch_size", "batch_size_factor", "output_plot", "output_picture", *EXAMPLE_FLAGS),
}


@contextlib.contextmanager
def open_results(path: str, settings: Mapping[str, Any]) -> Iterator["Results"]:
    """Yields `Results`, locked against another run with the same path.

    Raises:
      UserError: as `Results`; or naming the process that uses the path.
    """
    if not path:
        yield Results("", settings)
        return
    check_output(path)
    with HeartbeatLock(path, is_output=True):
        yield Results(path, settings)


class Results:
    """Results per example, kept in memory and, with a path, in a file from which a stopped run resumes."""

    def __init__(self, path: str, settings: Mapping[str, Any]):
        """Reads the results that a stopped run with the same settings left at `path`.

        Args:
          path: the file; empty: results are kept in memory only.
          settings: values of the command's flags.

        Raises:
          UserError: if the file belongs to other settings, or cannot be written.
        """
        self._path = path
        self._values: dict[str, dict] = {}
        if not path:
            return
        self._settings = _fingerprinted(settings)  # the first result creates the file: a failed start leaves none
        if os.path.exists(path):
            self._resume()

    def _resume(self) -> None:
        with open(self._path, "r+b") as file:
            text = file.read()
            text = text[: text.rfind(b"\n") + 1]  # drops a truncated last line
            file.truncate(len(text))
        first, *rest = [self._parse(number, line) for number, line in enumerate(text.splitlines())] or [{}]
        if not rest:
            self.discard()
            return
        for name, value in self._settings.items():
            if value != first.get(name):
                raise UserError(
                    f"{self._path}: left by a stopped run with --{name}={first.get(name)}, now it is {value}: resume "
                    "with the same settings, or delete the file to start again"
                )
        self._values = {values.pop("example"): values for values in rest}

    def _parse(self, number: int, line: bytes) -> dict:
        try:
            return parse_json(line, {"example": str} if number else dict)
        except UserError as error:
            raise UserError(f"{self._path}:{number + 1}: {error}; delete the file to start again") from None

    def missing(self, examples: Sequence[Example]) -> list[Example]:
        """Returns the examples without a valid result.

        A result is invalid if the example or its files have changed, or if one of its output files is missing.
        """

        def is_missing(example: Example) -> bool:
            values = self._values.get(example.name)
            if values is None or values["mark"] != _fingerprint(example.files, example.parameters):
                return True
            return not all(map(os.path.exists, values.get("written", ())))

        return [example for example in examples if is_missing(example)]

    def add(self, example: Example, values: dict) -> None:
        """Stores a result. `values["written"]` lists its output files; they must exist."""
        row = {"mark": _fingerprint(example.files, example.parameters), **values}
        self._values[example.name] = row
        if self._path:
            new = [] if os.path.exists(self._path) else [self._settings]
            new.append({"example": example.name, **row})
            with names_full_disk(self._path), open(self._path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in new))

    def __getitem__(self, example: Example) -> dict:
        """Returns the values that `add` received."""
        return self._values[example.name]

    def finish(self, examples: Sequence[Example], metric_names: Sequence[str], output_json: str) -> None:
        """Prints the mean and standard error of each metric, writes them with all results, and discards the file.

        A metric's mean excludes examples without this metric. A metric that is a list is averaged per example.
        """
        rows = [{"example": example.name, **self._values[example.name]} for example in examples]
        totals: dict[str, Any] = {"examples": len(rows)}
        for name in metric_names:
            values = [_mean(row[name]) for row in rows if name in row]
            result = metrics.with_standard_error(np.array(values))
            totals |= {name: result["mean"], f"{name}_standard_error": result["standard_error"]}
            print(f"{name}: {result['mean']:.6g} ± {result['standard_error']:.2g} ({len(values)} examples)")
        if output_json:
            per_example = [{name: value for name, value in row.items() if name != "mark"} for row in rows]
            write_json(output_json, {**totals, "per_example": per_example})
        self.discard()  # only after the metrics are written

    def discard(self) -> None:
        """Removes the file, if it exists: the next run starts from the first example."""
        if self._path:
            pathlib.Path(self._path).unlink(missing_ok=True)


def unfinished_name(list_path: str) -> str:
    """Returns the file name of unfinished results. Each list has its own: runs may share an output folder."""
    digest = hashlib.blake2b(os.path.realpath(list_path).encode(), digest_size=4).hexdigest()
    return UNFINISHED.replace(".", f".{digest}.")


def _mean(value: float | list[float]) -> float:
    return sum(value) / len(value) if isinstance(value, list) else value


def _fingerprinted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that results depend on. Paths of models include a fingerprint of their files."""
    kept = {name: value for name, value in settings.items() if name not in _RESUMABLE_SETTINGS}
    for name in ("checkpoint", "vqgan"):
        path = kept[name].split("::")[-1]
        files = sorted(map(str, pathlib.Path(path).rglob("*"))) if os.path.isdir(path) else [path]
        kept[name] += f" (files {_fingerprint(files)})"
    if kept.get("dtype") == "auto":
        kept["dtype"] += f" on {jax.default_backend()}"  # the type depends on it
    return kept


def _fingerprint(paths: Sequence[str], parameters: Sequence = ()) -> str:
    """Returns a digest of the parameters and of each file's size and modification time; of remote files, only names."""
    values = list(parameters)
    for path in paths:
        if is_remote(path) or not os.path.exists(path):
            values.append(path)
        else:
            stat = os.stat(path)
            values.append([os.path.realpath(path), stat.st_size, stat.st_mtime_ns])
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()
