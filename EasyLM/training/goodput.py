"""Goodput: how much of a run's time goes into steps that count, over all its starts.

The seconds of earlier starts are read from the rows that they have written to `metrics.jsonl`. The terms are those of
Google's ML Goodput Measurement, https://github.com/AI-Hypercomputer/ml-goodput-measurement
"""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import orjson

from EasyLM.storage import open_binary
from EasyLM.training.step import Metrics

# Activities that make no progress.
#   start: loading, indexing, and waiting for other processes.
#   repeated: steps that ran twice, because a later start resumed from an older checkpoint.
#   down: no process ran. The time between the last logged step of one start and the beginning of the next start.
BADPUT = ("data", "save", "eval", "compile", "start", "repeated", "down")
_KEYS = ("step", "time", "run_seconds", "goodput", *(f"badput_{name}" for name in BADPUT))


class Goodput:
    """Adds up the seconds of a run by activity, over all its starts.

    Args:
      path: the run's `metrics.jsonl`, local or remote, with the rows of earlier starts. It may be missing.
      first_step: the first step of this start.
      begin: Unix time at which this start began.
    """

    def __init__(self, path: str, first_step: int, begin: float):
        self._begin = begin
        self._earlier, last_time = _earlier_seconds(_logged_rows(path), first_step)
        if last_time is not None:
            self._earlier["down"] += max(0.0, begin - last_time)
        self._compile_seconds = 0.0

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Counts the seconds of the block as compilation."""
        begin = time.time()
        yield
        self._compile_seconds += time.time() - begin

    def metrics(self, loop_seconds: Mapping[str, float]) -> Metrics:
        """Returns the time, the seconds since the run's first start began, and their shares by activity.

        The shares are `goodput`, of steps that count, and `badput_{name}`; their sum is 1.

        Args:
          loop_seconds: seconds of this start by activity since its first step: `step`, `data`, `save` and `eval`.
        """
        now = time.time()
        seconds = {"compile": self._compile_seconds, **loop_seconds}
        seconds["start"] = max(0.0, now - self._begin - sum(seconds.values()))
        seconds = {name: earlier + seconds.get(name, 0.0) for name, earlier in self._earlier.items()}
        total = sum(seconds.values())
        shares = {f"badput_{name}": seconds[name] / total for name in BADPUT}
        return {"time": now, "run_seconds": total, "goodput": seconds["step"] / total, **shares}


def _earlier_seconds(rows: Iterable[Mapping[str, Any]], first_step: int) -> tuple[dict[str, float], float | None]:
    """Returns the seconds of earlier starts by activity, and the time of their last row.

    This start runs `first_step` and later steps again, so their earlier time is `repeated`. If `first_step` lies
    between two logged steps, its time is interpolated.
    """
    before = after = last = None
    for row in rows:
        last = row
        if row["step"] < first_step:
            before, after = row, None
        elif after is None:
            after = row
    seconds = dict.fromkeys(("step", *BADPUT), 0.0)
    if last is None:
        return seconds, None
    seconds |= {name: last[f"badput_{name}"] * last["run_seconds"] for name in BADPUT}
    step, counted = (before["step"], _step_seconds(before)) if before else (-1, 0.0)
    if after:
        counted += (_step_seconds(after) - counted) * (first_step - 1 - step) / (after["step"] - step)
    seconds["step"] = counted
    seconds["repeated"] += _step_seconds(last) - counted
    return seconds, last["time"]


def _step_seconds(row: Mapping[str, Any]) -> float:
    return row["goodput"] * row["run_seconds"]


def _logged_rows(path: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a metrics file that have all numbers. Skips rows of older versions and a truncated row."""
    try:
        file = open_binary(path)
    except FileNotFoundError:
        return
    with contextlib.closing(file):
        for line in file:
            with contextlib.suppress(orjson.JSONDecodeError):
                row = orjson.loads(line)
                if isinstance(row, dict) and all(isinstance(row.get(key), int | float) for key in _KEYS):
                    yield row
