"""Accumulation: the mean gradient of several micro-steps makes one update.

With several groups of devices along dp, each group keeps the mean gradient of its own rows. The groups' means are
reduced once an update, not in each micro-step. The arrays of the accumulator then have a leading axis of groups, G.

The step's arrays are on the `group_mesh`. A state at rest has no axis G and is on the run's mesh: the accumulator is
the mean over groups. This is what checkpoints hold, so a run resumes on any mesh.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM.parallel import BATCH_AXES, GROUP_AXIS, constrain


def update_of_mean(
    transform: optax.GradientTransformation,
    micro_steps: int,
    gradients: Any,
    state: optax.MultiStepsState,
    params: Any,
) -> tuple[Any, optax.MultiStepsState]:
    """Adds the gradients of a micro-step, and transforms the mean of an update's micro-steps, as `optax.MultiSteps`.

    Returns:
      The updates of the parameters, which are zeros before the last micro-step, and the new state.
    """
    is_last, count = state.mini_step == micro_steps - 1, state.mini_step + 1
    means = jax.tree.map(lambda mean, gradient: mean + (gradient - mean) / count, state.acc_grads, gradients)
    mean = _mean_over_groups(means, params, is_last)
    unchanged = optax.tree.zeros_like(params), state.inner_opt_state

    def transformed():
        new = transform.update(mean, state.inner_opt_state, params)
        return jax.tree.map(lambda array, before: array.astype(before.dtype), new, unchanged)

    updates, inner_state = jax.lax.cond(is_last, transformed, lambda: unchanged)
    means = jax.tree.map(lambda mean: jnp.where(is_last, jnp.zeros_like(mean), mean), means)
    state = optax.MultiStepsState(
        count % micro_steps, state.gradient_step + is_last, inner_state, means, state.skip_state
    )
    return updates, state


def gradient_norm(gradients: Any, params: Any, is_used: jax.Array) -> jax.Array:
    """Returns the norm of gradients. With an axis G: that of the mean over groups if `is_used`, else 0."""
    return optax.tree.norm(_mean_over_groups(gradients, params, is_used))


def _mean_over_groups(arrays: Any, params: Any, is_used: jax.Array) -> Any:
    """Reduces the axis G, if there is one, if `is_used`; else returns zeros."""
    if not _has_groups(arrays, params):
        return arrays

    def reduced(arrays):
        # XLA for GPUs executes branches of cheap operations always, and selects a result. A barrier is not one of them.
        return _mean(jax.lax.optimization_barrier(arrays))

    def zeros(arrays):
        return jax.tree.map(lambda array: jnp.zeros(array.shape[1:], array.dtype), arrays)

    return jax.lax.cond(is_used, reduced, zeros, arrays)


def _mean(groups: Any) -> Any:
    return jax.tree.map(lambda array: array.mean(0), groups)


def _has_groups(means: Any, params: Any) -> bool:
    return jax.tree.leaves(means)[0].ndim > jax.tree.leaves(params)[0].ndim


def gradients_of_groups(gradients_of_group: Callable[..., Any], groups: Mesh) -> Callable[..., Any]:
    """Returns `loss_and_gradients` whose gradients [G, ...] are those of each group's rows.

    Args:
      gradients_of_group: see `Model`.
      groups: a `group_mesh`.
    """
    num_groups = groups.shape[GROUP_AXIS]

    def by_group(array):
        return constrain(array.reshape(num_groups, -1, *array.shape[1:]), groups, GROUP_AXIS, BATCH_AXES)

    def loss_and_gradients(params, extra, batch, step, key):
        def of_group(rows, key):
            return gradients_of_group(params, extra, rows, step, key)[:3]

        rows, keys = jax.tree.map(by_group, batch), jax.random.split(key, num_groups)
        loss_G, gradients, metrics_G = jax.vmap(of_group, spmd_axis_name=GROUP_AXIS)(rows, keys)
        return loss_G.mean(), gradients, _mean(metrics_G), extra

    return loss_and_gradients


def shapes_with_groups(state: Any, groups: Mesh) -> Any:
    """Returns the train state of `with_groups` with a `jax.ShapeDtypeStruct` in place of each array.

    Args:
      state: at rest, of arrays or `jax.ShapeDtypeStruct`.
      groups: the `group_mesh` of its mesh.
    """

    def shape_of(array, sizes=(), axes=()):
        place = NamedSharding(groups, P(*axes, *array.sharding.spec))
        return jax.ShapeDtypeStruct((*sizes, *array.shape), array.dtype, sharding=place)

    axis = (groups.shape[GROUP_AXIS],), (GROUP_AXIS,)
    means = jax.tree.map(lambda array: shape_of(array, *axis), state.opt_state.acc_grads)
    return _replace(jax.tree.map(shape_of, state), means)


def with_groups(state: Any, groups: Mesh) -> Any:
    """Returns a train state at rest with the axis G, which is split over GROUP_AXIS; one that has it as it is.

    Each group starts from the mean over groups, so the mean stays. Deletes the accumulator at rest.
    """
    means = state.opt_state.acc_grads
    if _has_groups(means, state.params):
        return state
    shapes = shapes_with_groups(state, groups).opt_state.acc_grads
    places = jax.tree.map(lambda shape: shape.sharding, shapes)
    spread = jax.jit(_spread, static_argnums=1, out_shardings=places)(means, groups.shape[GROUP_AXIS])
    jax.tree.map(lambda array: array.delete(), means)  # the caller holds the state at rest during the next step
    return _replace(state, spread)


def at_rest(state: Any, mesh: Mesh) -> Any:
    """Returns a train state without the axis G, on the run's mesh: the inverse of `with_groups`."""
    opt_state = state.opt_state
    if not isinstance(opt_state, optax.MultiStepsState) or not _has_groups(opt_state.acc_grads, state.params):
        return state
    places = jax.tree.map(lambda array: NamedSharding(mesh, P(*array.sharding.spec[1:])), opt_state.acc_grads)
    means = jax.jit(_mean, out_shardings=places)(opt_state.acc_grads)
    return jax.tree.map(lambda array: _on_mesh(array, mesh), _replace(state, means))


def _on_mesh(array: Any, mesh: Mesh) -> jax.Array:
    """Returns the same buffers with an equivalent sharding on this mesh."""
    parts = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, NamedSharding(mesh, array.sharding.spec), parts)


def _spread(means: Any, num_groups: int) -> Any:
    return jax.tree.map(lambda array: jnp.broadcast_to(array, (num_groups, *array.shape)), means)


def _replace(state: Any, means: Any) -> Any:
    return dataclasses.replace(state, opt_state=state.opt_state._replace(acc_grads=means))
