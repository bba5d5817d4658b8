"""Throughput of training: items per second, seconds by activity, and MFU."""

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

import jax

# Dense bf16 TFLOP/s of one device (vendors' data sheets, without sparsity), by a part of `device_kind`.
PEAK_TFLOPS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "GH200": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "TPU v6": 918,
    "TPU v5p": 459,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5": 459,  # v5p, which has both names
    "TPU v4": 275,
    "TPU v3": 123,
}


class WaitCounter(Protocol):
    """An iterator of batches that counts the seconds spent waiting for it."""

    wait_seconds: float


def peak_flops(peak_tflops: float, kind: str) -> float | None:
    """Returns the peak FLOP/s of one device.

    Args:
      peak_tflops: the peak in TFLOP/s; 0: look it up in `PEAK_TFLOPS`.
      kind: `device_kind` of the device.

    Returns:
      FLOP/s, or None for an unknown kind, such as a CPU.
    """
    tflops = peak_tflops or next((peak for part, peak in PEAK_TFLOPS.items() if part in kind), 0)
    return tflops * 1e12 or None


class Throughput:
    """Measures the throughput and the seconds by activity between two logged steps.

    Args:
      batches: the source of batches.
      unit: the name of an item, such as "tokens".
      items_per_step: items of one global batch.
      flops_per_step: model FLOPs of one step over all devices.
      peak_tflops: see `peak_flops`.

    Attributes:
      total_seconds: seconds by activity of all finished intervals: `step`, `data`, `save` and `eval`.
    """

    def __init__(self, batches: WaitCounter, unit: str, items_per_step: int, flops_per_step: float, peak_tflops: float):
        self.unit = unit
        self._batches, self._items_per_step, self._flops_per_step = batches, items_per_step, flops_per_step
        peak = peak_flops(peak_tflops, jax.devices()[0].device_kind)
        self._peak_flops = peak * jax.device_count() if peak else None
        self.total_seconds = dict.fromkeys(("step", "data", "save", "eval"), 0.0)
        self.restart()

    def restart(self) -> None:
        """Starts a new interval."""
        self._begin, self._waited, self._steps = time.perf_counter(), self._batches.wait_seconds, 0
        self._spent = {"save": 0.0, "eval": 0.0}

    @contextlib.contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        """Adds the seconds of the block to an activity that blocks training, `save` or `eval`."""
        begin = time.perf_counter()
        yield
        self._spent[activity] += time.perf_counter() - begin

    def count_step(self) -> None:
        """Counts a finished step."""
        self._steps += 1

    def metrics(self) -> dict[str, float]:
        """Returns means over the steps of the interval and starts the next one.

        MFU is model FLOPs per second over the peak of all devices (PaLM, arXiv 2204.02311, appendix B). It counts the
        FLOPs of the forward and the backward pass. Causal attention counts half; rematerialization does not count. The
        time of evaluation is excluded from all rates.
        """
        steps, elapsed = max(self._steps, 1), time.perf_counter() - self._begin
        seconds = {"data": self._batches.wait_seconds - self._waited, **self._spent}
        seconds["step"] = elapsed - sum(seconds.values())
        for activity, spent in seconds.items():
            self.total_seconds[activity] += spent
        evaluating = seconds.pop("eval")
        elapsed -= evaluating
        rate = self._items_per_step * steps / elapsed
        metrics = {
            f"{self.unit}_per_second": rate,
            f"{self.unit}_per_second_per_device": rate / jax.device_count(),
            **{f"{activity}_seconds": spent / steps for activity, spent in seconds.items()},
            **({"eval_seconds": evaluating / steps} if evaluating else {}),
        }
        if self._peak_flops:
            metrics["mfu"] = self._flops_per_step * steps / elapsed / self._peak_flops
        self.restart()
        return metrics
