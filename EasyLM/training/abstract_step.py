"""The train step before it has arguments: shapes, types and shardings of its state and batch, and its trace.

The devices of the mesh need not exist on this machine.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from EasyLM.parallel import batch_sharding, group_mesh, shardings
from EasyLM.training.accumulation import gradients_of_groups, shapes_with_groups
from EasyLM.training.step import Batch, Optimizer, TrainState, jit_train_step, make_train_step, state_shapes
from EasyLM.training.task import Model


def abstract_state(model: Model, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """Returns the train state with frozen parameters, and a `jax.ShapeDtypeStruct` on the mesh for each array."""
    shapes = state_shapes(model.init, optimizer)
    if model.frozen is not None:
        shapes = dataclasses.replace(shapes, extra=model.frozen)
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        shardings(mesh, model.partition_rules, shapes),
    )


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes of abstract arrays, as those of `abstract_state`, on one device."""
    return sum(
        math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize for array in jax.tree.leaves(tree)
    )


def abstract_batch(rows: Mapping[str, Any], batch_size: int, mesh: Mesh) -> Batch:
    """Returns a global batch with a `jax.ShapeDtypeStruct` on the mesh in place of each array.

    Args:
      rows: arrays [any number of rows, ...] of the batch's names, row shapes and types.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), array.dtype, sharding=sharding)
        for name, array in rows.items()
    }


def trace_step(
    model: Model,
    optimizer: Optimizer,
    seed: int,
    mesh: Mesh,
    state: TrainState,
    batch: Batch,
    is_logged: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.stages.Traced:
    """Traces the train step `(state, batch) -> (state, metrics)`. The state and the batch may be abstract.

    Args:
      state: at rest, see `accumulation`. The step takes and returns it `with_groups`, if there are any.
      is_logged: see `make_train_step`.
    """
    loss_and_gradients, groups = model.loss_and_gradients, accumulating_groups(model, optimizer, mesh)
    if groups is not None:  # a program has one mesh
        assert model.gradients_of_group is not None
        loss_and_gradients, mesh = gradients_of_groups(model.gradients_of_group, groups), groups
        state = shapes_with_groups(state, groups)
    step = make_train_step(loss_and_gradients, optimizer, seed, is_logged)
    placement = jax.tree.map(lambda array: array.sharding, state)
    return jit_train_step(step, placement, mesh).trace(state, batch)


def accumulating_groups(model: Model, optimizer: Optimizer, mesh: Mesh) -> Mesh | None:
    """Returns the `group_mesh` if its groups accumulate gradients of their own; None: all accumulate together."""
    accumulates = optimizer.micro_steps > 1 and model.gradients_of_group is not None
    return group_mesh(mesh) if accumulates and mesh.shape["dp"] > 1 else None
