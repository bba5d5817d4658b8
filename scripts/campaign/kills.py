"""Kinds: killed training runs, and killed builds of datasets.

A run is killed once or a few times at random moments: while it starts, between steps, or while it saves. Then it runs
to its end. The result must equal that of an uninterrupted run, bit for bit.
"""

import contextlib
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from campaign.attempts import Attempt, UnclearError, require
from campaign.data_files import sentence_lines
from campaign.runs import SAVE_STEPS, STEPS, TrainingRun, start_program
from EasyLM import checkpoints

_MOST_KILLS = 3  # of one run
_STOPPED = 75  # the exit code after SIGTERM
_SECONDS = 240
_POLL_SECONDS = 0.001
_IMAGES = 400


def training(folder: pathlib.Path) -> Attempt:
    """Killed training runs."""
    whole = TrainingRun(folder)
    begin = time.monotonic()
    reference = whole.reference()
    seconds = time.monotonic() - begin

    def attempt(rng: np.random.Generator, case: pathlib.Path) -> int:
        run, newest, kills = case / whole.directory, 0, 0
        for _ in range(int(rng.integers(1, _MOST_KILLS + 1))):
            process = whole.start(case)
            with _killed(process):
                _wait(process, _moment(rng, run, newest, seconds))
                is_term = rng.random() < 0.2
                process.send_signal(signal.SIGTERM if is_term else signal.SIGKILL)
                output, _ = process.communicate(timeout=_SECONDS)
            kills += 1
            if "Traceback" in output or (is_term and process.returncode not in (0, _STOPPED, -signal.SIGTERM)):
                raise UnclearError(f"exit code {process.returncode}: {output[-3000:]}")
            saved = checkpoints.latest_checkpoint(str(run))
            step = (saved.step or 0) if saved else 0
            require(step >= newest, f"the newest checkpoint is of step {step}, and was of step {newest}")
            newest = step
        code, output = whole.run(case)
        require(code == 0, f"exit code {code}: {output[-3000:]}")
        require(not newest or f"resuming after step {newest}," in output, f"not resumed after step {newest}")
        whole.check_equal(case, reference)
        return kills

    return attempt


def _moment(rng: np.random.Generator, run: pathlib.Path, newest: int, seconds: float) -> Callable[[float], bool]:
    """Returns a function of the seconds since the start: whether the run is to be killed now."""
    choice, log = rng.random(), run / "metrics.jsonl"
    delay = float(rng.uniform(0, 1))
    if choice < 0.2:  # at any time, mostly before the first step
        return lambda elapsed: elapsed > delay * seconds
    if choice < 0.6:  # after a number of steps
        lines = _lines(log) + 1 + int(delay * (STEPS - newest))
        return lambda elapsed: _lines(log) >= lines
    saves = int(rng.integers(1, 1 + max(1, (STEPS - newest) // SAVE_STEPS)))  # in the n-th save that is seen
    seen: set[str] = set()

    def is_saving(elapsed: float) -> bool:
        with contextlib.suppress(FileNotFoundError):
            seen.update(path.name for path in (run / "checkpoints").iterdir() if path.name.startswith("."))
        if len(seen) < saves:
            return False
        time.sleep(0.004 * delay)
        return True

    return is_saving


def _lines(path: pathlib.Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def builds(folder: pathlib.Path) -> Attempt:
    """Killed builds and mixtures of datasets."""
    (folder / "images").mkdir()
    for number in range(_IMAGES):
        coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(folder / "images" / f"{number}.png")
    lines = sentence_lines(np.random.default_rng(0)) * 4000
    (folder / "lines.jsonl").write_bytes(b"".join(lines))
    programs = {
        "build": ("tokenizer.build", {"kind": "images", "input_dir": folder / "images", "workers": 1}),
        "mix": ("tokenizer.mix", {"inputs": folder / "lines.jsonl", "memory_mb": 1}),
    }

    def start(name: str, output: pathlib.Path) -> subprocess.Popen:
        module, flags = programs[name]
        return start_program(module, {**flags, "output_file": output}, folder / "compiled")

    expected, seconds = {}, {}
    for name in programs:
        begin = time.monotonic()
        start(name, folder / f"{name}.out").communicate(timeout=_SECONDS)
        seconds[name] = time.monotonic() - begin
        expected[name] = (folder / f"{name}.out").read_bytes()

    def attempt(rng: np.random.Generator, case: pathlib.Path) -> int:
        name = str(rng.choice([*programs]))
        path, kills = case / "out.jsonl", int(rng.integers(1, _MOST_KILLS + 1))
        for _ in range(kills):
            delay = float(rng.uniform(0, seconds[name]))
            process = start(name, path)
            with _killed(process):
                _wait(process, lambda elapsed, delay=delay: elapsed > delay)
            require(not path.exists() or path.read_bytes() == expected[name], f"{name}: the output is incomplete")
        process = start(name, path)
        with _killed(process):
            output, _ = process.communicate(timeout=_SECONDS)
        require(process.returncode == 0, f"{name}: exit code {process.returncode}: {output[-3000:]}")
        require(path.read_bytes() == expected[name], f"{name}: the output differs")
        left = {file.name for file in case.iterdir()} - {path.name, f"{path.name}.report.json"}
        require(not left, f"{name}: files are left: {sorted(left)}")
        return kills

    return attempt


def _wait(process: subprocess.Popen, is_now: Callable[[float], bool]) -> None:
    """Waits for a moment, or for the end of the process."""
    begin = time.monotonic()
    while process.poll() is None and not is_now(time.monotonic() - begin):
        time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def _killed(process: subprocess.Popen):
    """Kills the process at the end of the context."""
    try:
        yield
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
