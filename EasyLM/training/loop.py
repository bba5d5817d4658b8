"""The training loop: it calls the data, the step, the metrics and the checkpoints in the right order."""

import collections
import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from EasyLM.errors import UserError
from EasyLM.progress import progress
from EasyLM.storage import is_remote, remote_file_system
from EasyLM.training.step import Batch, Metrics
from EasyLM.training.stop_signal import StopVote
from EasyLM.training.throughput import Throughput


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """Values of the flags of the same names. Steps are micro-steps; 0 disables a frequency."""

    total_steps: int
    log_freq: int
    save_model_freq: int
    save_milestone_freq: int
    max_nonfinite_steps: int  # in a row

    def logs(self, step: Any) -> Any:
        """Returns whether a step, an integer or a traced one, is logged."""
        return (step % self.log_freq == 0) | (step == self.total_steps - 1)

    @property
    def saves(self) -> bool:
        """Whether a run saves without a signal or an error: at a frequency, and at its end."""
        return self.save_model_freq > 0 or self.save_milestone_freq > 0


class BatchIterator(Protocol):
    """An iterator of global batches, whose `position` counts the rows consumed."""

    position: int

    def __next__(self) -> Batch: ...


class NonFiniteLossError(UserError):
    """Too many steps in a row had a loss or gradient that is not finite."""


def fit(
    state: Any,
    train_step: Callable[[Any, Batch], tuple[Any, Metrics]],
    batches: BatchIterator,
    settings: LoopSettings,
    report: "Report",
    *,
    save: Callable[[Any, int, int, bool], bool],
    at_rest: Callable[[Any], Any] = lambda state: state,
    evaluate: Callable[[Any], Metrics] | None = None,
    expect: Callable[[str], None] = lambda what: None,
) -> tuple[Any, bool]:
    """Trains from `state.step` to `total_steps`.

    The metrics of step N-1 are fetched after step N has been dispatched, so the devices never wait for the host.

    Args:
      state: has `step`; its buffers are donated.
      train_step: (state, batch) -> (state, metrics), with the metric `finite`.
      save: (state, steps done, position, milestone) -> whether it saves; after it returns, `state` may be donated.
      at_rest: state -> the state that a save takes. Training continues from it, as a run that resumes does.
      evaluate: state -> metrics, called at every logged step.
      expect: called with what the loop waits for next (see `Watchdog`).

    Returns:
      The last state, and whether `total_steps` was reached; a signal stops the loop earlier.

    Raises:
      NonFiniteLossError: see `Report`. The state is saved first, including the step in progress.
      Exception: from the data, the evaluation, a metric or a save. A run of one process saves the last complete step.
    """
    start = fetched = done = int(state.step)
    save_once = _save_once(save, at_rest, batches, report.throughput, expect)
    unreported = collections.deque[tuple[int, Metrics, Batch, bool]]()  # steps; at most the last two
    with report.progress_bar(start), StopVote() as vote:
        stop = vote.stop({})
        try:
            while done < settings.total_steps and not stop:
                batch = _next_batch(batches, done, expect)
                fetched += 1
                state, metrics = train_step(state, batch)
                done += 1
                logged = settings.logs(done - 1)
                unreported.append((done - 1, metrics, batch, logged))
                _report(unreported, report, 1)
                if evaluate is not None and logged:
                    with report.throughput.timed("eval"):
                        unreported[-1] = (done - 1, metrics | evaluate(state), batch, logged)
                if (milestone := _due(done, settings.save_milestone_freq)) or _due(done, settings.save_model_freq):
                    _report(unreported, report, 0)  # a run that is killed after the save resumes after this step
                    state = save_once(state, done, milestone)
                stop = vote.stop(metrics)
            _report(unreported, report, 0)
        except Exception as error:
            if fetched == done > start:  # a failed step has donated the state
                _save_after_error(error, unreported, report, save_once, state)
            raise
        if stop or settings.saves:
            save_once(state, done, _due(done, settings.save_milestone_freq) and done > 0)
    return state, done >= settings.total_steps


def _report(steps: collections.deque[tuple[int, Metrics, Batch, bool]], report: "Report", remaining: int) -> None:
    """Reports steps that have been dispatched, the oldest first, except the `remaining` newest ones."""
    while len(steps) > remaining:
        report(*steps.popleft())


def _next_batch(batches: BatchIterator, step: int, expect: Callable[[str], None]) -> Batch:
    expect(f"the data of step {step}")
    batch = next(batches)
    expect(f"step {step}")
    return batch


def _save_after_error(
    error: Exception,
    unreported: Iterable[tuple[int, Metrics, Batch, bool]],
    report: "Report",
    save_once: Callable[[Any, int, bool], Any],
    state: Any,
) -> None:
    """Saves the last complete step if the error occurs on all processes: a save needs all of them.

    The unreported steps count and are saved, so they are logged too.
    """
    done = int(state.step)
    is_nonfinite = isinstance(error, NonFiniteLossError)  # the loss is the same on all processes
    if not is_nonfinite and jax.process_count() > 1:
        return
    if not is_nonfinite:
        logging.error("an error ends the run after step %d", done)
    for step, metrics, batch, _ in unreported:
        with contextlib.suppress(Exception):  # the caller raises the first error
            report(step, metrics, batch, True)
    with contextlib.nullcontext() if is_nonfinite else contextlib.suppress(Exception):
        save_once(state, done, False)


def _save_once(
    save: Callable[[Any, int, int, bool], bool],
    at_rest: Callable[[Any], Any],
    batches: BatchIterator,
    throughput: Throughput,
    expect: Callable[[str], None],
) -> Callable[[Any, int, bool], Any]:
    """Returns (state, done, milestone) -> state at rest. It saves a step twice only to make it a milestone."""
    saved: tuple[int, bool] | None = None

    def save_once(state: Any, done: int, milestone: bool) -> Any:
        nonlocal saved
        if saved is None or saved[0] != done or (milestone and not saved[1]):
            expect(f"the checkpoint after {done} steps")
            with throughput.timed("save"):
                state = at_rest(state)
                # Before next(batches), so the position is this step's.
                if save(state, done, batches.position, milestone):
                    saved = (done, milestone)
            expect(f"step {done - 1}")
        return state

    return save_once


def _due(done: int, frequency: int) -> bool:
    return frequency > 0 and done % frequency == 0


class Report:
    """Logs finished steps, updates the progress bar, and stops training after repeated non-finite losses.

    Args:
      log: receives the metrics of one step.
      run_dir: where batches with a non-finite loss are saved.
    """

    def __init__(self, settings: LoopSettings, throughput: Throughput, log: Callable[[Metrics], None], run_dir: str):
        self.throughput = throughput
        self._settings, self._log, self._run_dir = settings, log, run_dir
        self._nonfinite = 0

    def progress_bar(self, start: int) -> tqdm:
        """Returns the progress bar, a context manager; only process 0 shows it. Starts the measurement of time."""
        self._bar = progress(
            total=self._settings.total_steps,
            initial=start,
            unit="step",
            disable=jax.process_index() != 0,
            smoothing=0.1,
        )
        self.throughput.restart()
        return self._bar

    def __call__(self, step: int, metrics: Metrics, batch: Batch, logged: bool) -> None:
        """Reports a finished step.

        Raises:
          NonFiniteLossError: after `max_nonfinite_steps` non-finite losses in a row. Their updates were not applied.
        """
        metrics = jax.device_get(metrics)
        finite = bool(metrics.pop("finite"))
        self.throughput.count_step()
        self._nonfinite = 0 if finite else self._nonfinite + 1
        if logged or not finite:
            rates = self.throughput.metrics()
            self._log({"step": step, **metrics, "skipped_update": not finite, **rates})
            unit = self.throughput.unit
            figures = f"loss {metrics['loss']:.4f}, {rates[f'{unit}_per_second']:,.0f} {unit}/s"
            self._bar.set_postfix_str(figures, refresh=False)
        self._bar.update()
        if not finite:
            path = _save_batch(self._run_dir, step, batch)
            logging.warning("step %d: loss or gradient is not finite; no update; batch saved in %s", step, path)
            if self._nonfinite >= self._settings.max_nonfinite_steps:
                raise NonFiniteLossError(
                    f"step {step}: the loss was not finite {self._nonfinite} steps in a row; training stops; none of "
                    f"these updates was applied; the batches are saved in {os.path.dirname(path)}"
                )


def _save_batch(run_dir: str, step: int, batch: Batch) -> str:
    """Saves this process's rows of a batch for inspection. Returns the path of the file."""
    path = os.path.join(run_dir, "nonfinite_batches", f"step_{step:08d}_process_{jax.process_index()}.npz")
    if is_remote(path):
        system, inner = remote_file_system(path)
        opened = system.open(inner, "wb")
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        opened = open(path, "wb")  # noqa: SIM115  (closed below)
    with opened as file:
        np.savez(file, **{name: _local_rows(array) for name, array in batch.items()})  # type: ignore[arg-type]
    return path


def _local_rows(array: jax.Array) -> np.ndarray:
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
