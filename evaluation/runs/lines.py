"""Examples of an evaluation: named by the lines of a file, read ahead by threads, their results safe from a kill.

A line of the file is one example, `{"input": [paths], "target": [paths], "output": path}`; what a program has no use
for may be left out. Results are appended, as they come, to a file that only a stopped run leaves behind: started again
with the same settings, the program goes on from there.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from tqdm import tqdm

from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.storage import check_output, is_remote, read_text_lines, write_json
from evaluation.tasks import metrics

LINE_FLAGS = {
    "input_file": Flag("", "JSONL file, an example a line."),
    "input_base_dir": Flag("", "Folder that the pictures' paths are relative to; empty: the current one."),
    "json_input_key": Flag("input", "Key of a line's list of prompt pictures."),
    "json_target_key": Flag("target", "Key of a line's list of true pictures."),
}
EXAMPLE_FLAGS = {
    "max_examples": Flag(0, "Only the first so many examples; 0: all."),
    "n_workers": Flag(8, "Threads that read pictures."),
    "output_json": Flag("", "Write the figures, in total and per example, to this file."),
}
# Settings that change no result: a stopped run may go on with others.
_FREE = {"input_file", "input_files", "read_file_list", "shuffle", "output_dir", "output_base_dir", "mesh_dim"}
_FREE |= {"batch_size", "batch_size_factor", "output_plot", "output_picture", *EXAMPLE_FLAGS}
_AHEAD = 2  # batches whose pictures are in memory while one is computed


class Example(Protocol):
    """What the functions below need to know of an example."""

    name: str  # in messages and results, as FILE:LINE
    files: tuple[str, ...]  # that its result follows from
    facts: tuple  # what else of it the result follows from


@dataclasses.dataclass(frozen=True)
class Line:
    """An example of a JSONL file, its paths complete."""

    name: str
    inputs: tuple[str, ...]
    targets: tuple[str, ...] = ()
    output: str = ""  # as the line has it
    truths: tuple[str, ...] = ()  # what it names as targets, used or not: nothing may be written there

    @property
    def files(self) -> tuple[str, ...]:
        return self.inputs + self.targets

    @property
    def facts(self) -> tuple:
        return len(self.inputs), self.output


def read_lines(config, *, target: str = "left out", output: bool = False) -> list[Line]:
    """The examples of `--input_file`; empty lines do not count.

    Args:
      config: values of LINE_FLAGS and EXAMPLE_FLAGS (and of `json_output_key`, if there are outputs).
      target: "needed", "optional" or "left out".
      output: whether a line says where its answer goes.

    Raises:
      UserError: naming FILE:LINE and what is wrong with it, or the flag.
    """
    if not config.input_file:
        raise UserError("--input_file is missing: a JSONL file, an example a line")
    lines = []
    for number, text in read_text_lines(config.input_file):
        if config.max_examples and len(lines) == config.max_examples:
            break
        name = f"{config.input_file}:{number}"
        try:
            line = _parse(name, text, config, target, output)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None
        lines.append(line)
    if not lines:
        raise UserError(f"--input_file={config.input_file}: no example there")
    return lines


def _parse(name: str, text: str, config, target: str, output: bool) -> Line:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"a {type(values).__name__}, not an object")
    inputs = _paths(values, config.json_input_key, config.input_base_dir)
    targets = ()
    if target == "needed" or (target == "optional" and config.json_target_key in values):
        targets = _paths(values, config.json_target_key, config.input_base_dir)
    place = values.get(config.json_output_key, "") if output else ""
    if output and not (isinstance(place, str) and place):
        raise UserError(f"{config.json_output_key!r} must be the path of a picture to write, not {place!r}")
    named = values.get(config.json_target_key)
    named = [path for path in named if isinstance(path, str)] if isinstance(named, list) else []
    return Line(name, inputs, targets, place, tuple(os.path.join(config.input_base_dir, path) for path in named))


def _paths(values: dict, key: str, base_dir: str) -> tuple[str, ...]:
    given = values.get(key)
    if not isinstance(given, list) or not given or not all(isinstance(path, str) and path for path in given):
        raise UserError(f"{key!r} must be a list of paths of pictures, not {given!r}")
    paths = tuple(os.path.join(base_dir, path) for path in given)
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"{key}: no such file: {path}")
    return paths


def loaded_batches(
    examples: Sequence[Example], batch_size: int, load: Callable, workers: int, kind: Callable
) -> Iterator[tuple[list[Example], list]]:
    """Yields (examples, what `load` makes of each) in batches of one `kind`, so that each kind is compiled once.

    The last batch of a kind that has several is filled up with copies of its last example's value: there may be more
    values than examples.

    Raises:
      UserError: with the example's name before what `load` has to say.
    """
    groups = collections.defaultdict(list)
    for example in examples:
        groups[kind(example)].append(example)
    batches = [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
    with ThreadPoolExecutor(workers) as pool:
        waiting = collections.deque()
        for batch in itertools.chain(batches, itertools.repeat(None, _AHEAD)):
            if batch is not None:
                waiting.append((batch, [pool.submit(_named, load, example) for example in batch]))
            if waiting and (batch is None or len(waiting) > _AHEAD):
                ready, futures = waiting.popleft()
                values = [future.result() for future in futures]
                size = min(batch_size, len(groups[kind(ready[0])]))
                yield ready, values + values[-1:] * (size - len(values))


def _named(load: Callable, example: Example):
    try:
        return load(example)
    except UserError as error:
        raise UserError(f"{example.name}: {error}") from error


class Results:
    """Results by example. With a path they are appended to that file, and those of a stopped run are taken up."""

    def __init__(self, path: str, config):
        """Reads what a stopped run with the same settings left at `path` (empty: nothing is kept).

        Raises:
          UserError: if the file belongs to other settings, or cannot be written.
        """
        self._path, self._values = path, {}
        if not path:
            return
        # Written with the first result: a start that fails leaves nothing that the corrected command stumbles over.
        self._settings = _settings(config)
        check_output(path)
        if os.path.exists(path):
            self._take_up(self._settings)

    def _take_up(self, settings: dict) -> None:
        with open(self._path, "r+b") as file:
            whole = file.read()
            whole = whole[: whole.rfind(b"\n") + 1]  # a line that a kill cut off does not count
            file.truncate(len(whole))
        first, *rest = [json.loads(line) for line in whole.splitlines()] or [{}]
        if not rest:
            self.discard()
            return
        changed = [name for name in settings if settings[name] != first.get(name)]
        if changed:
            name = changed[0]
            raise UserError(
                f"{self._path}: left by a stopped run with --{name}={first.get(name)}, now it is {settings[name]}: go "
                "on with the same settings, or delete the file to begin anew"
            )
        self._values = {values.pop("example"): values for values in rest}

    def missing(self, examples: Sequence[Example]) -> list[Example]:
        """Those without a result, or whose line or files have changed since, or what they had written is gone."""

        def is_missing(example):
            values = self._values.get(example.name)
            if values is None or values["mark"] != _mark(example.files, example.facts):
                return True
            return not all(map(os.path.exists, values.get("written", ())))

        return [example for example in examples if is_missing(example)]

    def add(self, example: Example, values: dict) -> None:
        """Keeps a result; `written` in it names files that belong to it, which are there by now."""
        self._values[example.name] = {"mark": _mark(example.files, example.facts), **values}
        if self._path:
            new = [] if os.path.exists(self._path) else [self._settings]
            new.append({"example": example.name, **self._values[example.name]})
            with open(self._path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in new))

    def __getitem__(self, example: Example) -> dict:
        """What `add` was given."""
        return self._values[example.name]

    def finish(self, examples: Sequence[Example], figures: Sequence[str], output_json: str) -> None:
        """Prints the mean of each figure with its standard error, and writes them with each example's result.

        A figure that an example lacks is averaged over the others; a list counts by its mean.
        """
        rows = [{"example": e.name, **self._values[e.name]} for e in examples]
        totals = {"examples": len(rows)}
        for name in figures:
            values = [_mean(row[name]) for row in rows if name in row]
            result = metrics.with_standard_error(values)
            totals |= {name: result["mean"], f"{name}_standard_error": result["standard_error"]}
            print(f"{name}: {result['mean']:.6g} ± {result['standard_error']:.2g} ({len(values)} examples)")
        if output_json:
            per_example = [{name: value for name, value in row.items() if name != "mark"} for row in rows]
            write_json(output_json, {**totals, "per_example": per_example})
        self.discard()  # after the figures are safe

    def discard(self) -> None:
        """Removes the file, if there is one: a program that has ended begins anew."""
        if self._path:
            pathlib.Path(self._path).unlink(missing_ok=True)


def _mean(value) -> float:
    return sum(value) / len(value) if isinstance(value, list) else value


def _settings(config) -> dict:
    """What the results follow from, besides the examples' own files. Of a model it is its files, not only its name."""
    settings = {name: value for name, value in config.items() if name not in _FREE}
    for name in ("checkpoint", "vqgan"):
        path = settings[name].split("::")[-1]
        files = sorted(map(str, pathlib.Path(path).rglob("*"))) if os.path.isdir(path) else [path]
        settings[name] += f" (files {_mark(files)})"
    return settings


def _mark(paths: Sequence[str], facts: Sequence = ()) -> str:
    """A digest that changes with the facts, and when a file is written. Remote ones are taken to stay as they are."""
    facts = list(facts)
    for path in paths:
        if is_remote(path) or not os.path.exists(path):
            facts.append(path)
        else:
            stat = os.stat(path)
            facts.append([os.path.realpath(path), stat.st_size, stat.st_mtime_ns])
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()


def progress_bar(done: int, total: int) -> tqdm:
    """Counts examples; those of a stopped run are there from the beginning."""
    return tqdm(total=total, initial=done, unit="example")
