"""A training run from its flags to its last checkpoint, for any model: `open_run`, then `train`."""

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from EasyLM import checkpoints
from EasyLM.errors import UserError, error_line, prefix_errors
from EasyLM.parallel import batch_sharding, check_same, fail_together, on_first_process_first
from EasyLM.progress import print_if_possible
from EasyLM.storage import HeartbeatLock, LockedError, json_digest, make_directory
from EasyLM.training import metrics_log
from EasyLM.training.accumulation import at_rest
from EasyLM.training.batches import Batches, RowSource, dataset_state, rows_consumed
from EasyLM.training.compilation import compile_evaluation, compile_step, use_compilation_cache
from EasyLM.training.goodput import Goodput
from EasyLM.training.loop import NonFiniteLossError, Report, fit
from EasyLM.training.maintenance import MaintenanceWatch
from EasyLM.training.metrics_log import Logger
from EasyLM.training.preemption import PreemptionNotice
from EasyLM.training.profiler import Profiler
from EasyLM.training.settings import RunSettings
from EasyLM.training.start import CheckpointFormats, StartPoint, check_settings, find_start, first_state
from EasyLM.training.step import Metrics, TrainState, updates_done
from EasyLM.training.task import ModelSettings, TrainingTask
from EasyLM.training.throughput import Throughput
from EasyLM.training.watchdog import Watchdog, reported

# The exit code of a run that a signal stopped and that has saved its state, if there was time. The same command resumes
# the run. The number is EX_TEMPFAIL of sysexits.h.
STOPPED = 75


@dataclasses.dataclass(frozen=True)
class Run:
    """A run whose settings and starting files have been validated."""

    settings: RunSettings
    directory: str
    model_settings: ModelSettings
    start: StartPoint
    begin: float  # Unix time
    check_lock: Callable[[], None]  # raises UserError if another run has taken over the directory


@contextmanager
def open_run(
    settings: RunSettings, model_settings: ModelSettings, formats: CheckpointFormats = checkpoints.CHECKPOINT_FORMATS
) -> Iterator[Run]:
    """Creates and locks the run directory, opens the starting files and validates the settings.

    Enter it before indexing data. Until the exit the directory is locked, and maintenance of a TPU machine stops the
    run.

    Args:
      formats: the valid prefixes of `--load_checkpoint`.

    Raises:
      UserError: naming the flag or the file, or the process that uses the directory.
    """
    begin = time.time()
    metrics_log.check_settings(settings.logger)
    with prefix_errors(f"--compilation_cache_dir={settings.compilation_cache_dir}"):
        use_compilation_cache(settings.compilation_cache_dir)
    if not settings.loop.saves:
        logging.warning("--save_model_freq=0: what this run trains is not saved, except after a signal or an error")
    directory = run_directory(settings.logger)
    with prefix_errors(f"--checkpointer.format={settings.checkpointer.format}"):
        checkpoints.uses_orbax(settings.checkpointer.format, directory)
    with ExitStack() as stack:
        check_lock = on_first_process_first(lambda: _lock(directory, stack))
        stack.enter_context(MaintenanceWatch())
        start = find_start(settings.start, directory, formats)
        check_settings(start, model_settings, settings.flags.get("optimizer", {}))
        yield Run(settings, directory, model_settings, start, begin, check_lock)


def _lock(directory: str, stack: ExitStack) -> Callable[[], None]:
    """Locks a run directory on process 0, which writes the checkpoints. Returns the check of the lock."""
    if jax.process_index() != 0:
        return lambda: None
    try:
        return stack.enter_context(HeartbeatLock(directory)).check
    except LockedError as error:
        raise UserError(f"{error}, or give another --logger.experiment_id") from None


def run_directory(logger: Any) -> str:
    """Returns `output_dir/experiment_id`, created if missing.

    Args:
      logger: values of LOGGER_FLAGS.

    Raises:
      UserError: if it is not writable.
    """
    path = os.path.join(logger.output_dir, metrics_log.experiment_id(logger))
    try:
        with prefix_errors(f"--logger.output_dir={logger.output_dir}"):
            make_directory(path)
    except OSError as error:
        raise UserError(f"--logger.output_dir={logger.output_dir}: cannot write {path} ({error.strerror})") from None
    return path


def train(run: Run, task: TrainingTask, mesh: Mesh) -> int:
    """Trains, logs and saves; after a signal, prints how to resume.

    Returns:
      The exit code of the command: 0 if `--total_steps` is reached, or STOPPED.

    Raises:
      UserError: if the data cannot continue, the processes disagree, a checkpoint cannot be saved, or the loss is not
        finite for too many steps.
    """
    settings, data = run.settings, task.data
    first_row = _first_row(run.start, data.train)
    _check_processes_agree(run.start, first_row, data.train)
    with reported("the first state"):
        state = first_state(run.start, task.model, task.optimizer, mesh, settings.seed)
    first_step = int(state.step)

    with (
        closing(Batches(data.train, data.batch_size, batch_sharding(mesh), first_row)) as batches,
        closing(Logger(settings.logger, run.directory, settings.flags, settings.log_all_worker)) as logger,
        closing(checkpoints.Checkpointer(run.directory, **settings.checkpointer, guard=run.check_lock)) as checkpointer,
        closing(Profiler(settings.profile_steps, run.directory, first_step)) as profiler,
        fail_together(),  # before the closing of the others, which may take long
    ):
        goodput = Goodput(metrics_log.metrics_path(run.directory), first_step, run.begin)

        def log(metrics: Metrics) -> None:
            rows = first_row + (metrics["step"] + 1 - first_step) * data.batch_size
            _log(logger, metrics | goodput.metrics(throughput.total_seconds), data.train, rows)

        checkpointer.prepare(task.model.saved_part(state))
        watchdog = Watchdog(settings.watchdog_minutes)
        with goodput.compiling():
            step = profiler.traced(compile_step(task, settings.seed, mesh, state, settings.loop.logs))
            evaluate = (
                _make_evaluate(task, settings.eval_steps, mesh, state, watchdog.expect) if settings.eval_steps else None
            )
        throughput = _throughput(batches, task, settings.peak_tflops)
        report = Report(settings.loop, throughput, log, run.directory)
        save = _make_save(run, task, mesh, checkpointer)
        on_first_process_first(lambda: None)  # all have compiled: collectives on CPUs wait for 30 s only
        with watchdog, _last_save_on_disk(checkpointer, watchdog.expect):
            state, finished = fit(
                state,
                step,
                batches,
                settings.loop,
                report,
                save=save,
                at_rest=partial(at_rest, mesh=mesh),
                evaluate=evaluate,
                expect=watchdog.expect,
            )
    on_first_process_first(lambda: None)  # no process exits while another one still writes
    if jax.process_index() == 0:
        print_if_possible("\n".join(_end_lines(run, int(state.step), finished)))
    return 0 if finished else STOPPED


def _log(logger: Logger, metrics: Metrics, source: RowSource, rows: int) -> None:
    """Logs a step with the metrics of the data. If the data has become unreadable, logs it without, and raises."""
    try:
        metrics = metrics | source.metrics(rows)
    finally:
        logger.log(metrics)


def _first_row(start: StartPoint, source: RowSource) -> int:
    if start.dataset_state is None:
        return 0
    try:
        return rows_consumed(start.dataset_state, source)
    except UserError as error:
        raise UserError(
            f"{start.files.dataset_state}: {error}; to start with the first row of this data, give --load_checkpoint "
            "without --load_dataset_state under another --logger.experiment_id"
        ) from None


def _check_processes_agree(start: StartPoint, first_row: int, source: RowSource) -> None:
    check_same(
        {
            "a checkpoint": bool(start.files.checkpoint),
            "its step": start.step,
            "the first row": first_row,
            "the data's fingerprint": json_digest(source.fingerprint),
        }
    )


def _throughput(batches: Batches, task: TrainingTask, peak_tflops: float) -> Throughput:
    rows, accounting = task.data.batch_size, task.accounting
    return Throughput(
        batches, accounting.unit, rows * accounting.items_per_row, rows * accounting.flops_per_row, peak_tflops
    )


def _make_save(
    run: Run, task: TrainingTask, mesh: Mesh, checkpointer: checkpoints.Checkpointer
) -> Callable[[TrainState, int, int, bool], bool]:
    """Returns the function that saves a state, its data state and its metadata, if the time of a notice allows.

    The function returns whether it saves.
    """
    run_metadata = {
        **task.metadata,
        run.model_settings.name: dict(run.model_settings.values),
        "mesh": dict(mesh.shape),
        "started_from": run.start.files.history,
    }

    notice = PreemptionNotice(run.settings.preemption_notice_seconds, checkpointer)

    def save(state: TrainState, step: int, position: int, milestone: bool) -> bool:
        saved = task.model.saved_part(state)
        if not notice.leaves_time_to_save(saved):
            return False
        updates = updates_done(state.opt_state)
        counts = {} if updates is None else {"updates": updates}
        metadata = checkpoints.make_metadata(step, run.settings.flags, **counts, **run_metadata)
        data_state = dataset_state(task.data.train, position)
        checkpointer.save(saved, step, data_state, metadata, milestone=milestone)
        return True

    return save


@contextmanager
def _last_save_on_disk(checkpointer: checkpoints.Checkpointer, expect: Callable[[str], None]) -> Iterator[None]:
    """Waits for the last save when training ends on all processes: at its end, and after a NonFiniteLossError.

    After an error `fail_together` ends all processes within seconds, and a save needs all of them.
    """
    what = "the last checkpoint"
    try:
        yield
    except NonFiniteLossError:
        expect(what)
        with suppress(UserError):  # it has been logged
            checkpointer.wait()
        raise
    expect(what)
    checkpointer.wait()


def _make_evaluate(
    task: TrainingTask, steps: int, mesh: Mesh, state: TrainState, expect: Callable[[str], None]
) -> Callable[[TrainState], Metrics]:
    """Returns a function that averages metrics over the first batches of the evaluation data. Compiles it."""
    assert task.data.eval is not None
    make_batches = partial(Batches, task.data.eval, task.data.eval_batch_size, batch_sharding(mesh))
    step = compile_evaluation(task, mesh, state)

    def evaluate(state: TrainState) -> Metrics:
        expect("the evaluation")
        batches = make_batches()
        try:
            batch_metrics = [step(state.params, state.extra, next(batches)) for _ in range(steps)]
        finally:
            batches.close()
        batch_metrics = jax.device_get(batch_metrics)
        return {f"eval_{name}": np.mean([values[name] for values in batch_metrics]) for name in batch_metrics[0]}

    return evaluate


def _end_lines(run: Run, step: int, finished: bool) -> Iterator[str]:
    """Yields what a run prints at its end: what is saved, and how to resume."""
    settings = run.settings
    outcome = "finished" if finished else "stopped"
    yield f"{outcome} after step {step} of {settings.loop.total_steps}: {run.directory}"
    if finished:
        return
    try:
        newest = checkpoints.latest_checkpoint(run.directory)
        if newest is None or newest.step != step:
            name = newest.name if newest else "that of the start"
            yield f"the state after step {step} is not saved; the newest is {name}"
    except Exception as error:  # each store has its own; the run has ended, and keeps its exit code
        yield f"the newest checkpoint cannot be read ({error_line(error)})"
    yield (
        f"to resume, run the same command with --logger.output_dir={settings.logger.output_dir} "
        f"--logger.experiment_id={metrics_log.given_id(settings.logger, run.directory)}"
    )
    if not settings.checkpointer.save_optimizer_state:
        yield "only the parameters were saved (--checkpointer.save_optimizer_state): the moments will start from zero"
