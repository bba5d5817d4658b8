"""Traces of a few steps, for TensorBoard's profile plugin and xprof (`--profile_steps`)."""

import logging
import os
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from EasyLM.errors import UserError
from EasyLM.storage import is_remote, remote_file_system
from EasyLM.training.step import Batch, Metrics

Step = Callable[[Any, Batch], tuple[Any, Metrics]]


def profiled_steps(value: str, total_steps: int) -> range:
    """Returns the steps that `--profile_steps=FIRST:END` selects; END is not one of them. An empty text selects none.

    Raises:
      UserError: if it is not a range of steps of the run.
    """
    if not value:
        return range(0)
    first, _, end = value.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end) <= total_steps):
        raise UserError(
            f"--profile_steps={value}: must be FIRST:END with 0 <= FIRST < END <= --total_steps={total_steps}; "
            "10:13 profiles the steps 10, 11 and 12"
        )
    return range(int(first), int(end))


class Profiler:
    """Traces the steps of a range in this process, and writes the trace to the run directory.

    The trace of process 0 is in `profile/`, that of process p in `profile_{p}/`. A failed trace does not end the run.

    Args:
      steps: the steps to trace. Steps before the start of a resumed run are left out.
      run_dir: the run directory, local or remote.
      first_step: the first step of this process.
    """

    def __init__(self, steps: range, run_dir: str, first_step: int):
        process = jax.process_index()
        self._path = os.path.join(run_dir, f"profile_{process}" if process else "profile")
        self._steps, self._step = steps, first_step
        self._local: tempfile.TemporaryDirectory | None = None
        self._tracing = False

    def traced(self, train_step: Step) -> Step:
        """Returns the train step with its calls counted, and traced if their numbers are in the range."""
        if not self._steps:
            return train_step

        def step(state: Any, batch: Batch) -> tuple[Any, Metrics]:
            if self._step in self._steps and not self._tracing:
                jax.block_until_ready(state)  # no earlier step runs in the trace
                self._start()
            with jax.profiler.StepTraceAnnotation("train", step_num=self._step):
                state, metrics = train_step(state, batch)
            self._step += 1
            if self._tracing and self._step not in self._steps:
                jax.block_until_ready((state, metrics))
                self.close()
            return state, metrics

        return step

    def close(self) -> None:
        """Writes the trace, if one has begun. If the run ends within the range, the trace ends there."""
        if not self._tracing:
            return
        self._tracing, self._steps = False, range(0)
        try:
            jax.profiler.stop_trace()
            if self._local:
                system, inner = remote_file_system(self._path)
                # The slash: otherwise a second trace is put into a folder of its own below the first.
                system.put(f"{self._local.name}/", inner, recursive=True)
                self._local.cleanup()
            logging.info("the profile is in %s; `tensorboard --logdir` opens it", self._path)
        except Exception as error:
            logging.warning("the profile cannot be written to %s; the run continues: %s", self._path, error)

    def _start(self) -> None:
        try:
            if is_remote(self._path):
                self._local = tempfile.TemporaryDirectory()  # JAX writes to local files only
            jax.profiler.start_trace(self._local.name if self._local else self._path)
            self._tracing = True
        except Exception as error:
            logging.warning("the profiler does not start; the run continues: %s", error)
            self._steps = range(0)
