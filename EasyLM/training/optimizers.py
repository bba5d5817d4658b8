"""Optimizers from flags. The structure of an optimizer state yields the keys of the LVM release's checkpoints."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from EasyLM.checkpoints import stacking
from EasyLM.errors import UserError
from EasyLM.flags import Flag, to_dataclass
from EasyLM.training.step import Optimizer

_SQUARE_EPSILON = 1e-30  # Adafactor adds it to squared gradients
_LEAST_SCALE = 1e-3  # Adafactor's lower bound of a tensor's root mean square
_SHARED = {
    "clip_gradient": Flag(1.0, "Gradients are scaled down to at most this global norm.", above=0),
    "weight_decay": Flag(1e-4, "Decoupled weight decay of every parameter.", least=0),
    "bf16_momentum": Flag(False, "Keep the first moment in bfloat16."),
}
OPTIMIZER_FLAGS = {
    "type": Flag("adamw", "adamw, or palm: Adafactor without factoring, as in PaLM.", choices=("adamw", "palm")),
    "accumulate_gradient_steps": Flag(1, "Micro-steps whose mean gradient makes one update.", least=1),
    "adamw_optimizer": {
        "init_lr": Flag(0.0, "Learning rate of the first update.", least=0),
        "end_lr": Flag(0.001, "Learning rate from lr_decay_steps on.", least=0),
        "lr": Flag(0.01, "Peak learning rate, after the warm-up.", least=0),
        "lr_warmup_steps": Flag(2000, "Updates of linear warm-up.", least=0),
        "lr_decay_steps": Flag(500000, "Update at which the cosine decay ends, counted from the start of the warm-up."),
        "b1": Flag(0.9, "Decay rate of the first moment.", least=0, below=1),
        "b2": Flag(0.95, "Decay rate of the second moment.", above=0, below=1),
        "multiply_by_parameter_scale": Flag(
            False, "Scale each tensor's update by its root mean square, as in Adafactor."
        ),
        **_SHARED,
    },
    "palm_optimizer": {
        "lr": Flag(0.01, "Learning rate in units of 0.01: the rate is (lr / 0.01) / sqrt(step).", least=0),
        "lr_warmup_steps": Flag(10000, "Updates during which the rate stays at its peak.", least=1),
        "b1": Flag(0.9, "Decay rate of the momentum.", least=0, below=1),
        "b2": Flag(0.99, "Exponent of the second moment's decay: 1 - t^-b2 at update t.", above=0, below=1),
        **_SHARED,
    },
}


@dataclasses.dataclass(frozen=True)
class AdamwSettings:
    """Values of the flags `adamw_optimizer.*`."""

    init_lr: float
    end_lr: float
    lr: float
    lr_warmup_steps: int
    lr_decay_steps: int
    b1: float
    b2: float
    multiply_by_parameter_scale: bool
    clip_gradient: float
    weight_decay: float
    bf16_momentum: bool


@dataclasses.dataclass(frozen=True)
class PalmSettings:
    """Values of the flags `palm_optimizer.*`."""

    lr: float
    lr_warmup_steps: int
    b1: float
    b2: float
    clip_gradient: float
    weight_decay: float
    bf16_momentum: bool


def make_optimizer(config: Any) -> Optimizer:
    """Returns the optimizer of the flags.

    With accumulation, `learning_rate` is the rate of the update to which the current micro-step contributes.

    Args:
      config: values of OPTIMIZER_FLAGS.

    Raises:
      UserError: if the decay ends before the warm-up.
    """
    if config.type == "adamw":
        transform, schedule = _adamw(to_dataclass(AdamwSettings, config.adamw_optimizer))
    else:
        transform, schedule = _palm(to_dataclass(PalmSettings, config.palm_optimizer))
    micro_steps = config.accumulate_gradient_steps

    def learning_rate(opt_state):
        inner = opt_state.inner_opt_state if micro_steps > 1 else opt_state
        # The chain has one schedule state; its position depends on the optimizer.
        return schedule(next(state.count for state in inner[1] if isinstance(state, optax.ScaleByScheduleState)))

    if micro_steps > 1:
        transform = optax.MultiSteps(transform, micro_steps).gradient_transformation()
    return Optimizer(transform, learning_rate, micro_steps)


def _adamw(c: AdamwSettings) -> tuple[optax.GradientTransformation, optax.Schedule]:
    if c.lr_decay_steps <= c.lr_warmup_steps:
        raise UserError(
            f"--optimizer.adamw_optimizer.lr_decay_steps={c.lr_decay_steps}: "
            f"must be more than lr_warmup_steps={c.lr_warmup_steps}"
        )
    schedule = optax.warmup_cosine_decay_schedule(c.init_lr, c.lr, c.lr_warmup_steps, c.lr_decay_steps, c.end_lr)
    if c.multiply_by_parameter_scale:
        return _adafactor(c, schedule, lambda count: -c.weight_decay * schedule(count)), schedule
    adamw = optax.adamw(schedule, c.b1, c.b2, weight_decay=c.weight_decay, mu_dtype=_momentum_dtype(c))
    return optax.chain(optax.clip_by_global_norm(c.clip_gradient), adamw), schedule


def _palm(c: PalmSettings) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """PaLM's optimizer (arXiv 2204.02311, section 5): rate ~ 1 / sqrt(step), weight decay ~ 1 / step."""

    def schedule(count):
        return c.lr / 0.01 / jnp.sqrt(jnp.maximum(count, c.lr_warmup_steps))

    return _adafactor(c, schedule, lambda count: -c.weight_decay / 1e-4 * jnp.square(schedule(count))), schedule


def _adafactor(
    c: AdamwSettings | PalmSettings, schedule: optax.Schedule, decay_schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Clipping, then Adafactor with a full second moment (arXiv 1804.04235), then decay by its own schedule."""
    adafactor = optax.chain(
        _scale_by_second_moment(c.b2),
        optax.scale_by_learning_rate(schedule, flip_sign=False),
        _scale_by_parameter_size(),
        optax.ema(c.b1, debias=False, accumulator_dtype=_momentum_dtype(c)),
        optax.scale(-1),
    )
    # The mask selects every parameter; it gives the state the keys of the release.
    decay = optax.masked(_add_scheduled_decay(decay_schedule), lambda params: jax.tree.map(lambda _: True, params))
    return optax.chain(optax.clip_by_global_norm(c.clip_gradient), adafactor, decay)


def _momentum_dtype(c: AdamwSettings | PalmSettings) -> Any:
    return jnp.bfloat16 if c.bf16_momentum else jnp.float32


def _scale_by_second_moment(exponent: float) -> optax.GradientTransformation:
    """`optax.scale_by_factored_rms(factored=False)`; its placeholders for factors have one row per stacked layer."""

    def init(params):
        def placeholder(param, stacked):
            return jnp.zeros((param.shape[0], 1) if stacked else (1,), param.dtype)

        factors = jax.tree.map(placeholder, params, _stacked(params))
        return optax.FactoredState(jnp.zeros([], jnp.int32), factors, factors, jax.tree.map(jnp.zeros_like, params))

    def update(gradients, state, params):
        decay = 1 - jnp.float32(state.count + 1) ** -exponent
        v = jax.tree.map(lambda g, v: decay * v + (1 - decay) * (jnp.square(g) + _SQUARE_EPSILON), gradients, state.v)
        updates = jax.tree.map(lambda g, v: g * v**-0.5, gradients, v)
        return updates, state._replace(count=optax.safe_increment(state.count), v=v)

    return optax.GradientTransformation(init, update)


def _scale_by_parameter_size() -> optax.GradientTransformation:
    """Scales each tensor's update by the tensor's root mean square. Each of the stacked layers is a tensor."""

    def scale(update, param, stacked):
        axes = tuple(range(1, param.ndim)) if stacked else None
        return update * jnp.maximum(jnp.sqrt(jnp.square(param).mean(axes, keepdims=True)), _LEAST_SCALE)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, params, _stacked(params)))


def _add_scheduled_decay(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Adds `schedule(count) * parameter` to the update; `schedule` is negative."""

    def update(updates, state, params):
        decay = schedule(state.count)
        updates = jax.tree.map(lambda u, p: u + decay * p, updates, params)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), update)


def _stacked(params: Any) -> Any:
    """Returns a tree of bools: whether each array holds stacked layers along axis 0."""
    flags = [stacked.is_stacked for stacked in stacking.stacked_arrays(params)]
    return jax.tree.unflatten(jax.tree.structure(params), flags)
