"""An exponential moving average (EMA) of the parameters, kept in the optimizer's state."""

from typing import Any, NamedTuple

import jax
import optax


class WeightAverageState(NamedTuple):
    """The state of `with_weight_average`. `EasyLM.checkpoints` finds the average by the name of its field."""

    ema_params: optax.Params  # float32


def with_weight_average(transform: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """Returns the transformation with an average of the parameters that result from its updates.

    After each update the average is `decay * average + (1 - decay) * parameters`. It starts from the parameters.
    """

    def update(updates: Any, state: WeightAverageState, params: Any) -> tuple[Any, WeightAverageState]:
        new_params = optax.apply_updates(params, updates)
        return updates, WeightAverageState(optax.incremental_update(new_params, state.ema_params, 1 - decay))

    def init(params: Any) -> WeightAverageState:
        return WeightAverageState(jax.tree.map(lambda x: x.astype("float32"), params))

    return optax.chain(transform, optax.GradientTransformation(init, update))
