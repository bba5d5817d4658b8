"""Compilation of a run's functions before the first batch, and the cache of compiled functions on disk."""

import logging
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from EasyLM.errors import UserError
from EasyLM.storage import make_directory
from EasyLM.training.abstract_step import abstract_batch, accumulating_groups, trace_step
from EasyLM.training.accumulation import with_groups
from EasyLM.training.step import Batch, Metrics, TrainState
from EasyLM.training.task import TrainingTask
from EasyLM.training.watchdog import reported


def use_compilation_cache(directory: str) -> None:
    """Makes JAX read and write compiled functions in a directory, local or remote. An empty name changes nothing.

    JAX stores what takes a second or longer to compile, and only process 0 writes.

    Raises:
      UserError: if the directory cannot be written, or its protocol is not available.
    """
    if not directory:
        return
    try:
        make_directory(directory)
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})") from None
    jax.config.update("jax_compilation_cache_dir", directory)


def compile_step(
    task: TrainingTask,
    seed: int,
    mesh: Mesh,
    state: TrainState,
    is_logged: Callable[[jax.Array], jax.Array],
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Compiles the train step and logs the compile time. The step accepts a state at rest (see `accumulation`).

    Args:
      is_logged: see `make_train_step`.
    """
    batch = abstract_batch(task.data.train.rows(0, 1), task.data.batch_size, mesh)
    logging.info("compiling the train step")
    begin = time.perf_counter()
    with reported("the compilation of the train step"):
        compiled = trace_step(task.model, task.optimizer, seed, mesh, state, batch, is_logged).lower().compile()
    logging.info("compiled the train step in %.1f s", time.perf_counter() - begin)
    groups = accumulating_groups(task.model, task.optimizer, mesh)
    return compiled if groups is None else lambda state, batch: compiled(with_groups(state, groups), batch)


def compile_evaluation(task: TrainingTask, mesh: Mesh, state: TrainState) -> Callable[[Any, Any, Batch], Metrics]:
    """Compiles (parameters, extra, batch of the evaluation data) -> metrics."""
    assert task.data.eval is not None
    logging.info("compiling the evaluation")
    batch = abstract_batch(task.data.eval.rows(0, 1), task.data.eval_batch_size, mesh)
    with reported("the compilation of the evaluation"):
        return jax.jit(task.model.evaluate).lower(state.params, state.extra, batch).compile()
