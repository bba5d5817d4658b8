"""A training run from flags to finished checkpoints, for any model: where it starts, what it saves, how it goes on."""

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from functools import partial

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from EasyLM import checkpoints
from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.parallel import JAX_DISTRIBUTED_FLAGS, batch_sharding, check_same, shardings
from EasyLM.storage import is_remote, json_digest
from EasyLM.training import metrics_log
from EasyLM.training.batches import Batches, dataset_state, rows_consumed
from EasyLM.training.loop import LoopSettings, fit
from EasyLM.training.step import (
    LossFn,
    init_state,
    jit_train_step,
    make_eval_step,
    make_train_step,
    state_from_params,
    state_shapes,
)

RUN_FLAGS = {
    "seed": Flag(42, "Seed of the initial parameters and of dropout."),
    "mesh_dim": Flag(
        "1,-1,1", "Mesh sizes dp,fsdp,mp; -1: all devices left; or named, as dp:1,fsdp:-1,mp:2; ! splits physical axes."
    ),
    "total_steps": Flag(10000, "Micro-steps to train in total, those before a resume included.", least=0),
    "load_checkpoint": Flag("", "PREFIX::FILE to start from: trainstate, trainstate_params, params, flax_params, ..."),
    "load_dataset_state": Flag("", "dataset.json (or a release's dataset.pkl): the data goes on after its rows."),
    "load_metadata": Flag("", "metadata.json (or a release's metadata.pkl): checks model settings, gives the step."),
    "log_freq": Flag(50, "Steps between logged steps.", least=1),
    "save_model_freq": Flag(0, "Steps between checkpoints, of which the newest is kept; 0: only on a signal.", least=0),
    "save_milestone_freq": Flag(0, "Steps between checkpoints that are kept; 0: none.", least=0),
    "eval_steps": Flag(0, "Batches of eval_dataset to evaluate at each logged step; 0: no evaluation.", least=0),
    "log_all_worker": Flag(False, "Every process writes its figures, not only the first."),
    "max_nonfinite_steps": Flag(10, "Stop after so many steps in a row whose loss is not finite.", least=1),
    "peak_tflops": Flag(0.0, "Peak TFLOP/s of one device, for MFU; 0: by the device's kind.", least=0),
    "checkpointer": checkpoints.CHECKPOINTER_FLAGS,
    "logger": metrics_log.LOGGER_FLAGS,
    "jax_distributed": JAX_DISTRIBUTED_FLAGS,
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is trained, and on what."""

    init_params: Callable  # key -> parameters
    loss_fn: LossFn
    optimizer: optax.GradientTransformation
    learning_rate: Callable  # opt_state -> the rate of the next update
    partition_rules: tuple
    settings: Mapping  # of the model: kept in the metadata, compared on resume
    settings_name: str  # their name in the metadata
    free_settings: frozenset[str]  # those that a resumed run may set otherwise
    data: object  # row source
    eval_data: object | None  # row source
    batch_size: int
    eval_batch_size: int
    units_per_row: int  # tokens (or images) of a row
    flops_per_row: float
    unit: str = "tokens"
    accumulate_gradient_steps: int = 1  # micro-steps to an update
    saved_settings: Callable = lambda spec: {}  # --load_checkpoint -> what settings its model had, as far as known
    # The prefixes of --load_checkpoint.
    prefixes: Mapping = dataclasses.field(default_factory=lambda: checkpoints.CHECKPOINT_FORMATS)


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins: a checkpoint to load (or ''), and the files that say position and step (or '')."""

    checkpoint: str = ""
    dataset_state: str = ""
    metadata: str = ""
    history: tuple[str, ...] = ("",)  # what --load_checkpoint has begun this run with, and taken it back to


def run_directory(config) -> str:
    """`output_dir/experiment_id`, made if missing.

    Raises:
      UserError: if it cannot be written.
    """
    path = os.path.join(config.logger.output_dir, metrics_log.experiment_id(config.logger))
    if is_remote(path):
        return path  # a store has no directories to make; what cannot be written there shows when it is first written
    try:
        os.makedirs(path, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        raise UserError(
            f"--logger.output_dir={config.logger.output_dir}: cannot write {path} ({error.strerror})"
        ) from None
    return path


def find_start(config, run_dir: str) -> Start:
    """Where this run begins. A run directory that holds a checkpoint is resumed from it.

    `--load_checkpoint` begins a new run, or takes it back to one of its own files (a milestone). Once a checkpoint was
    saved after that it is history: a requeued job repeats its command and goes on.

    Raises:
      UserError: if the run directory holds a run that began elsewhere.
    """
    given = Start(config.load_checkpoint, config.load_dataset_state, config.load_metadata, (config.load_checkpoint,))
    own = checkpoints.latest_checkpoint(run_dir)
    if own is None:
        return given
    metadata = checkpoints.load_metadata(own.metadata)
    history = tuple(metadata.get("started_from", [metadata["flags"]["load_checkpoint"]]))
    if given.checkpoint in ("", *history):
        return Start(own.spec, own.dataset_state, own.metadata, history)
    path = config.load_checkpoint.partition("::")[2]
    if os.path.realpath(path).startswith(os.path.realpath(run_dir) + os.sep):
        beside = (checkpoints.sidecar_path(path, name) for name in ("dataset", "metadata"))
        dataset_state, metadata = (one or other for one, other in zip((given.dataset_state, given.metadata), beside))
        return Start(given.checkpoint, dataset_state, metadata, (*history, given.checkpoint))
    raise UserError(
        f"--load_checkpoint={given.checkpoint}: {run_dir} already holds a run that began with {history[0]!r}; "
        "give another --logger.experiment_id, or leave --load_checkpoint out to resume that run"
    )


def check(config, run_dir: str, prefixes: Mapping = checkpoints.CHECKPOINT_FORMATS) -> None:
    """Complains of the run's flags, and of the files that it is to begin with, before data is indexed.

    Raises:
      UserError: naming the flag or the file.
    """
    for name in ("load_metadata", "load_dataset_state"):
        if config[name] and not is_remote(config[name]) and not os.path.isfile(config[name]):
            raise UserError(f"--{name}={config[name]}: no such file")
    start = find_start(config, run_dir)
    if start.checkpoint:
        checkpoints.open_checkpoint(start.checkpoint, prefixes)
    if start.metadata:
        checkpoints.load_metadata(start.metadata)
    if start.dataset_state:
        checkpoints.load_dataset_state(start.dataset_state)


def train_run(config, run_dir: str, mesh: Mesh, problem: Problem) -> None:
    """Trains a problem as the flags say; saves, logs, and on a signal says how to resume."""
    settings = LoopSettings(
        total_steps=config.total_steps,
        log_freq=config.log_freq,
        save_model_freq=config.save_model_freq,
        save_milestone_freq=config.save_milestone_freq,
        max_nonfinite_steps=config.max_nonfinite_steps,
        units_per_step=problem.batch_size * problem.units_per_row,
        flops_per_step=problem.batch_size * problem.flops_per_row,
        peak_tflops=config.peak_tflops,
        run_dir=run_dir,
        unit=problem.unit,
    )
    start = find_start(config, run_dir)
    if start.checkpoint:
        logging.info("starting from %s", start.checkpoint)
    metadata = checkpoints.load_metadata(start.metadata) if start.metadata else {}
    _check_settings(problem, start, metadata)
    position = _position(problem, start)
    facts = {"a checkpoint": bool(start.checkpoint), "its step": metadata.get("step", 0), "its data's row": position}
    check_same(facts | {"the data's digest": json_digest(problem.data.identity)})
    state, state_shardings = _first_state(config, mesh, problem, start, metadata)

    batches = Batches(problem.data, problem.batch_size, batch_sharding(mesh), position)
    flags = config.to_dict()
    figures = metrics_log.Logger(config.logger, run_dir, flags, config.log_all_worker)
    saver = checkpoints.Checkpointer(run_dir, config.checkpointer)

    def save(state, step, position, milestone):
        facts = {problem.settings_name: dict(problem.settings), "mesh": dict(mesh.shape)}
        facts |= {"started_from": start.history}
        saver.save(
            state,
            step,
            dataset_state(problem.data, position),
            checkpoints.make_metadata(step, flags, **facts),
            milestone=milestone,
        )

    def log(row):
        rows = position + (row["step"] + 1 - first_step) * problem.batch_size
        figures.log(row | problem.data.metrics(rows))

    first_step = int(state.step)
    try:
        saver.prepare(state)
        step = _compiled_step(config, mesh, problem, state, state_shardings)
        eval_step = jax.jit(make_eval_step(problem.loss_fn))  # here, so that it is compiled once
        evaluate = partial(_evaluate, config, mesh, problem, eval_step) if config.eval_steps else None
        state, finished = fit(state, step, batches, settings, log=log, save=save, evaluate=evaluate)
        saver.wait()
    finally:
        batches.close()
        saver.close()
        figures.close()
    if jax.process_index() == 0:
        print(
            f"{'finished' if finished else 'stopped'} after step {int(state.step)} of {config.total_steps}: {run_dir}"
        )
        if not finished:
            print(
                f"to resume, run the same command with --logger.output_dir={config.logger.output_dir} "
                f"--logger.experiment_id={metrics_log.given_id(config.logger, run_dir)}"
            )
            if not config.checkpointer.save_optimizer_state:
                print("parameters alone were saved (--checkpointer.save_optimizer_state): moments will begin anew")


def _check_settings(problem: Problem, start: Start, metadata: Mapping) -> None:
    """A run that is resumed keeps its model; one that begins with another's parameters may change it, and is told."""
    differences = _differences(problem, metadata.get(problem.settings_name, {}))
    if differences:
        raise UserError(f"{start.metadata}: the checkpoint's model has other settings: {differences}")
    if start.checkpoint and not start.metadata:
        differences = _differences(problem, problem.saved_settings(start.checkpoint))
        if differences:
            logging.warning("%s was trained with other settings: %s", start.checkpoint, differences)


def _differences(problem: Problem, saved: Mapping) -> str:
    differences = [
        f"{name}={value!r} (saved: {saved[name]!r})"
        for name, value in json.loads(json.dumps(dict(problem.settings))).items()  # tuples are lists there
        if name in saved and name not in problem.free_settings and saved[name] != value
    ]
    return ", ".join(differences)


def _position(problem: Problem, start: Start) -> int:
    if not start.dataset_state:
        return 0
    return rows_consumed(checkpoints.load_dataset_state(start.dataset_state), problem.data)


def _first_state(config, mesh, problem, start: Start, metadata: Mapping):
    """The state to begin with, on the mesh, and its shardings."""
    shapes = state_shapes(problem.init_params, problem.optimizer)
    places = shardings(mesh, problem.partition_rules, shapes)
    if not start.checkpoint:
        return init_state(problem.init_params, problem.optimizer, config.seed, places), places
    target = jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places)
    if start.checkpoint.startswith("trainstate::"):
        return checkpoints.load(start.checkpoint, target, problem.prefixes), places
    params = checkpoints.load(start.checkpoint, target.params, problem.prefixes)
    step = int(metadata.get("step", 0))
    if step:
        logging.warning("the optimizer's moments begin anew at step %d; its schedule goes on", step)
    updates = step // problem.accumulate_gradient_steps
    return state_from_params(params, problem.optimizer, step, updates, places), places


def _compiled_step(config, mesh, problem, state, state_shardings):
    """The train step, compiled before the first batch is asked for, so that its time is known."""
    step = make_train_step(problem.loss_fn, problem.optimizer, problem.learning_rate, config.seed)
    row = problem.data.rows(0, 1)
    places = batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct((problem.batch_size, *array.shape[1:]), array.dtype, sharding=places)
        for name, array in row.items()
    }
    begin = time.perf_counter()
    compiled = jit_train_step(step, state_shardings, mesh).lower(state, batch).compile()
    logging.info("compiled the train step in %.1f s", time.perf_counter() - begin)
    return compiled


def _evaluate(config, mesh, problem, step, params) -> dict:
    """Means over the first `eval_steps` batches of the evaluation data: the same ones every time."""
    batches = Batches(problem.eval_data, problem.eval_batch_size, batch_sharding(mesh), 0)
    try:
        rows = [step(params, next(batches)) for _ in range(config.eval_steps)]
    finally:
        batches.close()
    rows = jax.device_get(rows)
    return {f"eval_{name}": np.mean([row[name] for row in rows]) for name in rows[0]}
