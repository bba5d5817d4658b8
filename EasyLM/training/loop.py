"""The training loop: it orchestrates data, step, figures and checkpoints, and knows none of them."""

import contextlib
import dataclasses
import logging
import os
import signal
import threading
import time
from collections.abc import Callable

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from EasyLM.errors import UserError
from EasyLM.storage import is_remote

# Dense bf16 FLOP/s of one device (vendors' data sheets, without sparsity), by a part of `device_kind`.
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
    "TPU v4": 275,
    "TPU v3": 123,
}


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """How long to train, and when to log and save. Steps are micro-steps; 0 switches a frequency off."""

    total_steps: int
    log_freq: int
    save_model_freq: int
    save_milestone_freq: int
    max_nonfinite_steps: int  # in a row, then training stops
    units_per_step: int  # tokens (or images) of one global batch
    flops_per_step: float  # model FLOPs of one step over all devices
    peak_tflops: float  # of one device; 0: by the device's kind
    run_dir: str
    unit: str = "tokens"


def peak_flops(peak_tflops: float) -> float | None:
    """FLOP/s of one device: as given, or by its kind; None where the kind is not in the table (a CPU, say)."""
    kind = jax.devices()[0].device_kind
    found = peak_tflops or next((peak for part, peak in PEAK_TFLOPS.items() if part in kind), 0)
    return found * 1e12 or None


def fit(
    state,
    train_step: Callable,
    batches,
    settings: LoopSettings,
    *,
    log: Callable[[dict], None],
    save: Callable,
    evaluate: Callable | None = None,
):
    """Trains from `state.step` to `total_steps` and returns `(state, finished)`: a signal may stop it early.

    Args:
      state: has `step`; given away.
      train_step: (state, batch) -> (state, {name: scalar}), with the metric `finite`.
      batches: iterator of global batches with `position` (rows consumed) and `wait_seconds` (in total).
      log: takes one step's figures.
      save: (state, steps done, position, milestone) -> None; returns when `state` may be given away.
      evaluate: params -> figures, called at every logged step.

    The figures of step N-1 are fetched after step N has been dispatched, so that the device never waits for the host.

    Raises:
      UserError: after `max_nonfinite_steps` steps in a row whose loss was not finite. None of their updates was
        applied; the state is saved (with the step after them, which was under way), the batches are left in the run
        directory.
    """
    start = int(state.step)
    clock = Clock(settings, batches)
    report = Report(settings, log, clock)
    bar = tqdm(total=settings.total_steps, initial=start, unit="step", disable=jax.process_index() != 0, smoothing=0.1)
    done, stop, saved = start, False, None

    def save_now(milestone=False):
        nonlocal saved
        if saved != (done, milestone):
            with clock.counts("save"):
                save(state, done, batches.position, milestone)  # before next(batches): the position is this step's
            saved = (done, milestone)

    with bar, StopVote() as votes:
        pending = None
        try:
            while done < settings.total_steps and not stop:
                batch = next(batches)
                state, metrics = train_step(state, batch)
                done += 1
                if pending is not None:
                    report(bar, *pending)
                logged = (done - 1) % settings.log_freq == 0 or done == settings.total_steps
                figures = {}
                if evaluate is not None and logged:
                    with clock.counts("eval"):
                        figures = evaluate(state.params)
                pending = (done - 1, metrics | figures, batch, logged)
                if _due(done, settings.save_milestone_freq):
                    save_now(milestone=True)
                elif _due(done, settings.save_model_freq):
                    save_now()
                stop = votes.stop(metrics)
            if pending is not None:
                report(bar, *pending)
        except NonFiniteLossError:
            if pending[0] < done - 1:  # the step that was under way counts, and is saved with the rest
                with contextlib.suppress(NonFiniteLossError):
                    report(bar, done - 1, metrics, batch, True)
            save_now()
            raise
        if stop or settings.save_model_freq or settings.save_milestone_freq:
            save_now(milestone=_due(done, settings.save_milestone_freq) and done > start)
    return state, done >= settings.total_steps


def _due(done: int, frequency: int) -> bool:
    return frequency > 0 and done % frequency == 0


class NonFiniteLossError(UserError):
    """Too many steps in a row gave a loss or gradient that is not finite."""


class Clock:
    """Seconds since the last logged step: waiting for data, for a checkpoint, evaluating, and the steps themselves."""

    def __init__(self, settings: LoopSettings, batches):
        self._settings, self._batches = settings, batches
        peak = peak_flops(settings.peak_tflops)
        self._peak_flops = peak * jax.device_count() if peak else None
        self._restart()

    def _restart(self):
        self._begin, self._waited, self._steps = time.perf_counter(), self._batches.wait_seconds, 0
        self._spent = {"save": 0.0}

    @contextlib.contextmanager
    def counts(self, what: str):
        """Counts the seconds inside as time that training waited for `what`."""
        begin = time.perf_counter()
        yield
        self._spent[what] = self._spent.get(what, 0.0) + time.perf_counter() - begin

    def tick(self) -> None:
        """Counts a finished step."""
        self._steps += 1

    def figures(self) -> dict:
        """Means over the steps since the last call.

        MFU is model FLOPs per second over the devices' peak (PaLM, arXiv 2204.02311, appendix B): FLOPs of forward and
        backward pass as the model counts them (attention, being causal, at half), nothing for rematerialisation.
        """
        steps, elapsed = max(self._steps, 1), time.perf_counter() - self._begin
        evaluating = self._spent.pop("eval", 0.0)
        elapsed -= evaluating  # rates and MFU are of training
        spent = {"data": self._batches.wait_seconds - self._waited, **self._spent}
        rate = self._settings.units_per_step * steps / elapsed
        unit = self._settings.unit
        figures = {
            f"{unit}_per_second": rate,
            f"{unit}_per_second_per_device": rate / jax.device_count(),
            "step_seconds": (elapsed - sum(spent.values())) / steps,
            **{f"{name}_seconds": seconds / steps for name, seconds in spent.items()},
            **({"eval_seconds": evaluating / steps} if evaluating else {}),
        }
        if self._peak_flops:
            figures["mfu"] = self._settings.flops_per_step * steps / elapsed / self._peak_flops
        self._restart()
        return figures


class Report:
    """Turns finished steps into figures: to the log, to the bar, and to an end where the loss stays not finite."""

    def __init__(self, settings: LoopSettings, log: Callable, clock: Clock):
        self._settings, self._log, self._clock = settings, log, clock
        self._nonfinite = 0

    def __call__(self, bar, step: int, metrics: dict, batch: dict, logged: bool) -> None:
        metrics = jax.device_get(metrics)
        finite = bool(metrics.pop("finite"))
        self._clock.tick()
        bar.update()
        self._nonfinite = 0 if finite else self._nonfinite + 1
        if logged or not finite:
            figures = self._clock.figures()
            self._log({"step": step, **metrics, "skipped_update": not finite, **figures})
            rate = figures[f"{self._settings.unit}_per_second"]
            bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {rate:,.0f} {self._settings.unit}/s")
        if not finite:
            path = _keep_batch(self._settings.run_dir, step, batch)
            logging.warning(
                "step %d: the loss or gradient is not finite; no update; its batch is kept in %s", step, path
            )
            if self._nonfinite >= self._settings.max_nonfinite_steps:
                raise NonFiniteLossError(
                    f"step {step}: the loss was not finite {self._nonfinite} steps in a row, so training stops; none "
                    f"of these updates was applied; the batches are kept in {os.path.dirname(path)}"
                )


def _keep_batch(run_dir: str, step: int, batch: dict) -> str:
    """Writes this process's part of a batch for study; returns the file's path."""
    path = os.path.join(run_dir, "nonfinite_batches", f"step_{step:08d}_process_{jax.process_index()}.npz")
    if not is_remote(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    with fsspec.open(path, "wb") as file:
        np.savez(file, **{name: _local_rows(array) for name, array in batch.items()})
    return path


def _local_rows(array: jax.Array) -> np.ndarray:
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


class StopVote:
    """SIGINT and SIGTERM as a wish to stop, on which all processes act after the same step.

    Each step every process gives a vote (0 or 1), and the largest of the step before decides: the vote travels behind
    the train step, so nobody waits for it. A second signal has its usual effect.
    """

    def __enter__(self):
        self._asked, self._previous_vote = False, None
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._ask)
        if jax.process_count() > 1:
            mesh = jax.sharding.Mesh(np.array(jax.devices()), ("device",))
            self._mesh = mesh
            self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
        return self

    def __exit__(self, *exception):
        self._restore()

    def _restore(self):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _ask(self, number, frame):
        self._asked = True
        self._restore()
        said = f"\n{signal.Signals(number).name}: finishing the step, then saving\n"
        with contextlib.suppress(OSError):
            os.write(2, said.encode())  # `print` raises if the signal came in the middle of another one

    def stop(self, metrics: dict) -> bool:
        """Whether to stop now. Every process calls this once a step, with what the step returned."""
        if jax.process_count() == 1:
            return self._asked
        if jax.default_backend() == "cpu":  # programs of several processes on CPUs (gloo) hang if two are under way
            jax.block_until_ready(metrics)
        mine = np.full(jax.local_device_count(), self._asked, np.int32)
        vote = self._largest(multihost_utils.host_local_array_to_global_array(mine, self._mesh, P("device")))
        decided, self._previous_vote = self._previous_vote, vote
        if jax.default_backend() == "cpu":
            vote.block_until_ready()
        return decided is not None and bool(decided)
