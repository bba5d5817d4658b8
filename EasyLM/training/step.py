"""The state of a training run and its pure steps. Nothing here knows the model: a loss function comes in."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from EasyLM.parallel import batch_sharding


@partial(jax.tree_util.register_dataclass, data_fields=("step", "params", "opt_state"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes. With the data's position (an integer) and the seed, all that a resumed run needs."""

    step: jax.Array  # int32 scalar: micro-steps done
    params: dict
    opt_state: optax.OptState


# loss_fn(params, batch, key) -> (scalar loss, {name: scalar figure}); a key of None means evaluation: no dropout.
LossFn = Callable[[dict, dict, jax.Array | None], tuple[jax.Array, dict]]


def state_shapes(init_params: Callable, optimizer: optax.GradientTransformation) -> TrainState:
    """The shapes of a train state, at no cost. `init_params(key)` makes the parameters."""
    return jax.eval_shape(_state_maker(init_params, optimizer), jax.eval_shape(lambda: jax.random.key(0)))


def init_state(init_params: Callable, optimizer, seed: int, state_shardings: TrainState) -> TrainState:
    """A fresh train state, every array made where it belongs."""
    return jax.jit(_state_maker(init_params, optimizer), out_shardings=state_shardings)(jax.random.key(seed))


def state_from_params(params: dict, optimizer, step: int, updates: int, state_shardings: TrainState) -> TrainState:
    """A train state of given parameters after `step` micro-steps and `updates` updates.

    The optimizer's moments are fresh, but its schedules go on: rates are those that follow the updates.
    """

    def is_schedule(state):
        return isinstance(state, optax.ScaleByScheduleState)

    def advance(state):
        return state._replace(count=state.count + updates) if is_schedule(state) else state

    def make(params):
        opt_state = jax.tree.map(advance, optimizer.init(params), is_leaf=is_schedule)
        return TrainState(jnp.int32(step), params, opt_state)

    return jax.jit(make, out_shardings=state_shardings, donate_argnums=0)(params)


def _state_maker(init_params, optimizer):
    def make(key):
        params = init_params(key)
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    return make


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, learning_rate: Callable, seed: int
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """The pure step `(state, batch) -> (state, metrics)`.

    A loss or gradient that is not finite changes nothing but the step count: parameters and optimizer keep their
    values, and the metric `finite` is 0. `learning_rate(opt_state)` is the rate that this update uses.
    `gradient_norm` is the micro-step's before clipping, `param_norm` that of the updated parameters.
    """

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)  # a function of the step: nothing to save
        (loss, figures), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, key)
        gradient_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        metrics = {
            "loss": loss,
            **figures,
            "learning_rate": learning_rate(state.opt_state),
            "gradient_norm": gradient_norm,
            "param_norm": optax.tree.norm(params),
            "finite": finite,
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def make_eval_step(loss_fn: LossFn) -> Callable[[dict, dict], dict]:
    """The pure function `(params, batch) -> metrics` without dropout or other noise."""

    def eval_step(params, batch):
        loss, figures = loss_fn(params, batch, None)
        return {"loss": loss, **figures}

    return eval_step


def jit_train_step(train_step: Callable, state_shardings: TrainState, mesh: jax.sharding.Mesh):
    """The step compiled for the mesh. The state's buffers are given away to the new state."""
    return jax.jit(
        train_step,
        in_shardings=(state_shardings, batch_sharding(mesh)),
        out_shardings=(state_shardings, None),
        donate_argnums=0,
    )
