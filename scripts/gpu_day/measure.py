"""Records of measurements, and timers."""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

RECORD = "record "  # begins a line of output that holds a record


def emit(section: str, name: str, **values: Any) -> None:
    """Prints a record, which `gpu_day.main` collects. A value `ok` says whether a check passed."""
    print(RECORD + json.dumps({"section": section, "name": name, **values}), flush=True)


def on_gpu() -> bool:
    """Whether JAX computes on a GPU."""
    return jax.default_backend() == "gpu"


def seconds_per_call(function: Callable[[], Any], calls: int = 10, rounds: int = 3) -> float:
    """Returns the seconds of a call: the median over rounds of the mean over calls, after one call to warm up.

    The calls of a round are dispatched without waiting, as in training.
    """
    jax.block_until_ready(function())
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(calls):
            result = function()
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - begin) / calls)
    return statistics.median(seconds)


def peak_bytes() -> int | None:
    """Returns the largest number of bytes in use on the device since the process started; None if unknown."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def reason(error: Exception) -> str:
    """Returns the first line of an error, for a record."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
