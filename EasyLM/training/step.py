"""The state of a training run and the pure functions that change it. The model comes in as functions."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from EasyLM.parallel import batch_sharding, compiler_options
from EasyLM.training import accumulation

Params = dict[str, Any]
Batch = dict[str, Any]  # {name: array [batch_size, ...]}
Metrics = dict[str, Any]  # {name: scalar}

# init(key) -> (params, extra)
InitFn = Callable[[jax.Array], tuple[Params, Params]]
# loss_and_gradients(params, extra, batch, step, key) -> (loss, gradients of params, metrics, new extra)
LossAndGradientsFn = Callable[[Params, Params, Batch, jax.Array, jax.Array], tuple[jax.Array, Params, Metrics, Params]]
# evaluate(params, extra, batch) -> metrics, `loss` among them; without dropout or other noise
EvalFn = Callable[[Params, Params, Batch], Metrics]


@partial(jax.tree_util.register_dataclass, data_fields=("step", "params", "opt_state", "extra"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes. Together with the seed and the data position it determines the rest of a run."""

    step: jax.Array  # int32 scalar: micro-steps done
    params: Params
    opt_state: optax.OptState
    extra: Params = dataclasses.field(default_factory=dict)  # state that the loss function updates; often empty


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax transformation, its learning rate as a function of its state, and the accumulation of gradients.

    Attributes:
      transform: of the gradients of an update.
      learning_rate: opt_state -> the rate of the next update.
      micro_steps: micro-steps whose mean gradient makes one update.
    """

    transform: optax.GradientTransformation
    learning_rate: Callable[[optax.OptState], jax.Array]
    micro_steps: int = 1

    def init(self, params: Params) -> optax.OptState:
        """Returns the initial state; with accumulation, an `optax.MultiStepsState`, which names the arrays in files."""
        if self.micro_steps == 1:
            return self.transform.init(params)
        return optax.MultiSteps(self.transform, self.micro_steps).init(params)

    def update(self, gradients: Params, opt_state: optax.OptState, params: Params) -> tuple[Params, optax.OptState]:
        """Returns the updates of the parameters and the new state.

        With accumulation, the updates are zeros before the last micro-step of an update (see `accumulation`).
        """
        if self.micro_steps == 1:
            return self.transform.update(gradients, opt_state, params)
        return accumulation.update_of_mean(self.transform, self.micro_steps, gradients, opt_state, params)


def state_shapes(init: InitFn, optimizer: Optimizer) -> TrainState:
    """Returns the shapes and types of a train state without computing it."""
    return jax.eval_shape(_fresh_state(init, optimizer), jax.eval_shape(lambda: jax.random.key(0)))


def init_state(init: InitFn, optimizer: Optimizer, seed: int, state_shardings: TrainState) -> TrainState:
    """Returns a fresh train state. Each device computes its own part."""
    return jax.jit(_fresh_state(init, optimizer), out_shardings=state_shardings)(jax.random.key(seed))


def state_from_params(
    params: Params, optimizer: Optimizer, step: int, updates: int, state_shardings: TrainState
) -> TrainState:
    """Returns the train state of given parameters after `step` micro-steps and `updates` updates, without extra state.

    The optimizer's moments are zero; its schedules continue after the updates.
    """

    def advance(state):
        return state._replace(count=state.count + updates) if _is_schedule(state) else state

    def make(params):
        opt_state = jax.tree.map(advance, optimizer.init(params), is_leaf=_is_schedule)
        return TrainState(jnp.int32(step), params, opt_state)

    return jax.jit(make, out_shardings=state_shardings, donate_argnums=0)(params)


def schedule_position(opt_state: optax.OptState) -> jax.Array | None:
    """Returns the position of the optimizer's schedule, which counts updates; None if it has no schedule."""
    states = [state for state in jax.tree.leaves(opt_state, is_leaf=_is_schedule) if _is_schedule(state)]
    return states[0].count if states else None


def updates_done(opt_state: optax.OptState) -> int | None:
    """Returns the updates that an optimizer has made; None if it has no schedule."""
    position = schedule_position(opt_state)
    return None if position is None else int(position)


def _is_schedule(state: Any) -> bool:
    return isinstance(state, optax.ScaleByScheduleState)


def _fresh_state(init: InitFn, optimizer: Optimizer) -> Callable[[jax.Array], TrainState]:
    def make(key):
        params, extra = init(key)
        return TrainState(jnp.int32(0), params, optimizer.init(params), extra)

    return make


def make_train_step(
    loss_and_gradients: LossAndGradientsFn,
    optimizer: Optimizer,
    seed: int,
    is_logged: Callable[[jax.Array], jax.Array] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the pure train step `(state, batch) -> (state, metrics)`.

    If the loss or the gradient is not finite, only the step count changes, and the metric `finite` is False. The metric
    `learning_rate` is the rate of this update, `gradient_norm` the norm of the micro-step's gradients before clipping,
    `param_norm` the norm of the updated parameters, both over all trained parameters.

    Args:
      is_logged: step -> whether its metrics are used. Where groups of devices accumulate gradients (see
        `accumulation`), `gradient_norm` has to reduce them, so other micro-steps have 0. None: no step is logged.
    """

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)  # derived from the step, so it is not saved
        loss, gradients, metrics, extra = loss_and_gradients(state.params, state.extra, batch, state.step, key)
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradients))
        is_used = jnp.bool(False) if is_logged is None else is_logged(state.step) | ~finite  # a skipped step is logged
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state, extra = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, extra),
            (state.params, state.opt_state, state.extra),
        )
        metrics = {
            "loss": loss,
            **metrics,
            "learning_rate": optimizer.learning_rate(state.opt_state),
            "gradient_norm": accumulation.gradient_norm(gradients, state.params, is_used),
            "param_norm": optax.tree.norm(params),
            "finite": finite,
        }
        return TrainState(state.step + 1, params, opt_state, extra), metrics

    return train_step


def jit_train_step(train_step: Callable, state_shardings: TrainState, mesh: Mesh) -> Any:
    """Returns the jitted train step. It donates the state's buffers to the new state."""
    return jax.jit(
        train_step,
        in_shardings=(state_shardings, batch_sharding(mesh)),
        out_shardings=(state_shardings, None),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )
