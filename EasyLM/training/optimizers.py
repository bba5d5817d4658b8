"""Optimizers from flags. The structure of an optimizer state yields the keys of the LVM release's checkpoints."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from EasyLM.checkpoints import stacking
from EasyLM.flags import Flag, to_dataclass
from EasyLM.training.schedules import SCHEDULE_FLAGS, ScheduleSettings, make_schedule
from EasyLM.training.step import Optimizer, schedule_position
from EasyLM.training.weight_average import with_weight_average

_SQUARE_EPSILON = 1e-30  # Adafactor adds it to squared gradients
_LEAST_SCALE = 1e-3  # Adafactor's lower bound of a tensor's root mean square
_SHARED = {
    "clip_gradient": Flag(1.0, "Gradients are scaled down to at most this global norm.", above=0),
    "weight_decay": Flag(1e-4, "Decoupled weight decay of every parameter.", least=0),
    "weight_decay_mask": Flag(False, "No weight decay of norms and embeddings."),
    "bf16_momentum": Flag(False, "Keep the first moment in bfloat16."),
}
OPTIMIZER_FLAGS = {
    "type": Flag(
        "adamw",
        "adamw; palm: Adafactor without factoring, as in PaLM; muon: orthogonal updates of the matrices of the layers, "
        "adamw for the other parameters.",
        choices=("adamw", "palm", "muon"),
    ),
    "accumulate_gradient_steps": Flag(1, "Micro-steps whose mean gradient makes one update.", least=1),
    "ema_decay": Flag(
        0.0,
        "Decay rate of a moving average of the parameters, per update; trainstate_ema:: loads it. 0: no average.",
        least=0,
        below=1,
    ),
    "adamw_optimizer": {
        **SCHEDULE_FLAGS,
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
    "muon_optimizer": {
        **SCHEDULE_FLAGS,
        "momentum": Flag(0.95, "Decay rate of the momentum of the matrices.", least=0, below=1),
        "b1": Flag(0.9, "Decay rate of the first moment of the other parameters.", least=0, below=1),
        "b2": Flag(0.95, "Decay rate of the second moment of the other parameters.", above=0, below=1),
        **_SHARED,
    },
}


@dataclasses.dataclass(frozen=True)
class SharedSettings:
    """Values of the flags that all optimizers have."""

    clip_gradient: float
    weight_decay: float
    weight_decay_mask: bool
    bf16_momentum: bool


@dataclasses.dataclass(frozen=True)
class AdamwSettings(SharedSettings, ScheduleSettings):
    """Values of the flags `adamw_optimizer.*`."""

    b1: float
    b2: float
    multiply_by_parameter_scale: bool


@dataclasses.dataclass(frozen=True)
class PalmSettings(SharedSettings):
    """Values of the flags `palm_optimizer.*`."""

    lr: float
    lr_warmup_steps: int
    b1: float
    b2: float


@dataclasses.dataclass(frozen=True)
class MuonSettings(SharedSettings, ScheduleSettings):
    """Values of the flags `muon_optimizer.*`."""

    momentum: float
    b1: float
    b2: float


def make_optimizer(config: Any) -> Optimizer:
    """Returns the optimizer of the flags.

    With accumulation, `learning_rate` is the rate of the update to which the current micro-step contributes.

    Args:
      config: values of OPTIMIZER_FLAGS.

    Raises:
      UserError: if the learning rate's decay overlaps the warm-up.
    """
    if config.type == "adamw":
        transform, schedule = _adamw(to_dataclass(AdamwSettings, config.adamw_optimizer))
    elif config.type == "palm":
        transform, schedule = _palm(to_dataclass(PalmSettings, config.palm_optimizer))
    else:
        transform, schedule = _muon(to_dataclass(MuonSettings, config.muon_optimizer))
    if config.ema_decay:
        transform = with_weight_average(transform, config.ema_decay)
    return Optimizer(
        transform, lambda opt_state: schedule(schedule_position(opt_state)), config.accumulate_gradient_steps
    )


def _adamw(c: AdamwSettings) -> tuple[optax.GradientTransformation, optax.Schedule]:
    schedule = make_schedule(c, "optimizer.adamw_optimizer")
    if c.multiply_by_parameter_scale:
        return _adafactor(c, schedule, lambda count: -c.weight_decay * schedule(count)), schedule
    mask = _decayed(c) if c.weight_decay_mask else None
    adamw = optax.adamw(schedule, c.b1, c.b2, weight_decay=c.weight_decay, mu_dtype=_momentum_dtype(c), mask=mask)
    return optax.chain(optax.clip_by_global_norm(c.clip_gradient), adamw), schedule


def _muon(c: MuonSettings) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Muon for the matrices of the layers; AdamW, with Nesterov's momentum, for the embedding, the head and the norms.

    Updates of matrices are scaled to the size of AdamW's (arXiv 2502.16982), so both have the same learning rate.
    """
    schedule = make_schedule(c, "optimizer.muon_optimizer")
    muon = optax.contrib.muon(
        schedule,
        beta=c.momentum,
        weight_decay=c.weight_decay,
        mu_dtype=_momentum_dtype(c),
        adam_b1=c.b1,
        adam_b2=c.b2,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(
            lambda is_matrix: optax.contrib.MuonDimensionNumbers(1, 2) if is_matrix else None, _matrices(params)
        ),
        consistent_rms=0.2,
    )

    def decays(params):
        return jax.tree.map(lambda is_matrix, decay: decay and not is_matrix, _matrices(params), _decayed(c)(params))

    decay = optax.masked(_add_scheduled_decay(lambda count: -c.weight_decay * schedule(count)), decays)
    return optax.chain(optax.clip_by_global_norm(c.clip_gradient), muon, decay), schedule


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
    # A mask that selects every parameter gives the state the keys of the release.
    decay = optax.masked(_add_scheduled_decay(decay_schedule), _decayed(c))
    return optax.chain(optax.clip_by_global_norm(c.clip_gradient), adafactor, decay)


def _decayed(c: SharedSettings) -> Callable[[Any], Any]:
    """Returns a function from parameters to a tree of bools: whether each array has weight decay."""

    def decayed(params):
        def is_decayed(path, param, stacked):
            is_matrix = param.ndim - stacked > 1 and stacking.path_key(path)[-1] != "embedding"
            return is_matrix or not c.weight_decay_mask

        return jax.tree_util.tree_map_with_path(is_decayed, params, _stacked(params))

    return decayed


def _matrices(params: Any) -> Any:
    """Returns a tree of bools: whether each array holds the stacked matrices of the layers."""
    return jax.tree.map(lambda param, stacked: stacked and param.ndim == 3, params, _stacked(params))


def _momentum_dtype(c: SharedSettings) -> Any:
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
