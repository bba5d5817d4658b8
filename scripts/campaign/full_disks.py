"""Kinds: a disk without enough room, under commands (calls) and under a training run (a process).

`mounts` says how a disk is limited.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

from campaign import runs
from campaign.attempts import Attempt, RefusedError, UnclearError, is_clear, require, require_equal
from campaign.checkpoint_files import MODEL, random_state
from campaign.data_files import run_command, sentence_lines
from campaign.mounts import limited_disk
from EasyLM import checkpoints
from EasyLM.errors import UserError
from EasyLM.models.llama import convert_easylm_to_hf, hf_layout
from tokenizer import mix, pack

_VOCABULARY = 512


@dataclasses.dataclass(frozen=True)
class _Program:
    """A program that writes into a folder.

    Attributes:
      write: runs it. The same call again, with enough room, completes the output.
      output: the file or folder that appears at once, below the folder; empty if there are several.
    """

    write: Callable[[pathlib.Path], None]
    output: str


def commands(folder: pathlib.Path) -> Attempt:
    """Commands on a full disk: one clear error, no half output, and the right output once there is room."""
    programs = _programs(folder)
    expected, sizes = {}, {}
    for name, program in programs.items():
        (folder / name).mkdir()
        program.write(folder / name)
        expected[name] = _content(folder / name)
        sizes[name] = sum(map(len, expected[name].values()))

    def attempt(rng: np.random.Generator, case: pathlib.Path) -> None:
        name = str(rng.choice([*programs]))
        program, disk = programs[name], case / "disk"
        disk.mkdir()
        with limited_disk(disk, int(rng.uniform(0, 1.5 * sizes[name]))) as free:
            error = None
            try:
                program.write(disk)
            except (UserError, OSError) as raised:
                error = raised
            got = _content(disk)
            if error is None:
                require_equal(got, expected[name], f"files of {name}")
                return
            half = {file for file in got if file.startswith(program.output) and got[file] != expected[name].get(file)}
            require(not program.output or not half, f"{name}: half written after '{error}': {sorted(half)}")
            left = [file for file in got if file not in expected[name]]
            require(not left, f"{name}: files that are no output after '{error}': {left}")
            free()
            program.write(disk)
            require_equal(_content(disk), expected[name], f"files of {name}, written again with enough room")
            raise error

    return attempt


def training(folder: pathlib.Path) -> Attempt:
    """A training run on a full disk: it ends with a clear error, and resumes bit for bit once there is room."""
    whole = runs.TrainingRun(folder)
    reference = whole.reference()
    size = sum(path.stat().st_size for path in (folder / "reference").rglob("*") if path.is_file())

    def attempt(rng: np.random.Generator, case: pathlib.Path) -> None:
        disk = case / "disk"
        disk.mkdir()
        with limited_disk(disk, int(rng.uniform(0, 1.2 * size))) as free:
            code, output = whole.run(disk)
            if code:
                _require_error(code, output, str(disk))
                free()
                again, text = whole.run(disk)
                require(again == 0, f"exit code {again} with enough room: {text[-2000:]}")
            whole.check_equal(disk, reference, has_all_metrics=False)
        if code:
            raise RefusedError(output[-500:])

    return attempt


def _require_error(code: int, output: str, subject: str) -> None:
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if code not in (1, 2) or "Traceback" in output or len(errors) != 1 or not is_clear(errors[0], subject):
        raise UnclearError(f"exit code {code}: {output[-3000:]}")


def _programs(folder: pathlib.Path) -> dict[str, _Program]:
    source = folder / "lines.jsonl"
    source.write_bytes(b"".join(sentence_lines(np.random.default_rng(0)) * 60))
    saver = checkpoints.Checkpointer(str(folder / "run"), float_dtype="fp32")
    metadata = checkpoints.make_metadata(1, {}, llama_config=dataclasses.asdict(MODEL))
    saver.save(random_state(1), 1, {}, metadata)
    saver.wait()
    entries = checkpoints.open_checkpoint(f"params::{folder}/run/streaming_params")
    tensors = hf_layout.hf_tensors(MODEL, entries, "run", None)

    def save(disk: pathlib.Path) -> None:
        saver = checkpoints.Checkpointer(str(disk / "run"), save_optimizer_state=True)
        saver.save(random_state(2), 2, {"rows_consumed": 16}, metadata | {"step": 2})
        saver.wait()

    def write_packed(disk: pathlib.Path) -> None:
        run_command(pack, input_files=source, output_file=disk / "a.packed", vocab_size=_VOCABULARY)

    def write_mixture(disk: pathlib.Path) -> None:
        run_command(mix, inputs=source, output_file=disk / "a.jsonl", vocab_size=_VOCABULARY)

    def export(disk: pathlib.Path) -> None:
        convert_easylm_to_hf.export(MODEL, tensors, str(disk / "model"))

    return {
        "mix": _Program(write_mixture, "a.jsonl"),
        "pack": _Program(write_packed, "a.packed"),
        "export": _Program(export, "model"),
        "checkpoint": _Program(save, ""),
    }


def _content(folder: pathlib.Path) -> dict[str, bytes]:
    """Returns the files of a folder by name. The run directory and times in metadata differ between runs."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("metadata.json", "run_lock.json"):
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files
