"""What a run trains, as frozen dataclasses, which the trainer of each model creates."""

import dataclasses
import json
from collections.abc import Callable, Container, Mapping
from typing import Any

import jax

from EasyLM.parallel.partition import Rules
from EasyLM.training.batches import RowSource
from EasyLM.training.step import Batch, EvalFn, InitFn, LossAndGradientsFn, Metrics, Optimizer, Params, TrainState

# (params, batch, key) -> (loss, metrics)
LossFn = Callable[[Params, Batch, jax.Array | None], tuple[jax.Array, Metrics]]


@dataclasses.dataclass(frozen=True)
class Model:
    """The functions of a model (see `step`), and the partition rules of its train state.

    Attributes:
      gradients_of_group: `loss_and_gradients` of the rows of one group of devices along dp, to be mapped over groups
        (see `group_mesh`). The means over groups are the values of the batch. None: only the batch has gradients.
      frozen: a tree of `jax.ShapeDtypeStruct`, the shapes of parameters that no step changes; None: there are none.
        They are the extra state of the functions, and `init` returns none. The run reads them from the
        `--load_checkpoint` that it started from, and does not save them.
    """

    init: InitFn
    loss_and_gradients: LossAndGradientsFn
    evaluate: EvalFn
    partition_rules: Rules
    gradients_of_group: LossAndGradientsFn | None = None
    frozen: Params | None = None

    def saved_part(self, state: TrainState) -> TrainState:
        """Returns the part of a state that checkpoints hold: all but frozen parameters."""
        return state if self.frozen is None else dataclasses.replace(state, extra={})


def model_without_extra(
    init_params: Callable[[jax.Array], Params],
    loss_fn: LossFn,
    partition_rules: Rules,
    group_loss_fn: LossFn | None = None,
) -> Model:
    """Returns a model whose only state is its parameters.

    Args:
      init_params: key -> parameters.
      loss_fn: (params, batch, key) -> (loss, metrics). The key None means evaluation: no dropout.
      partition_rules: see `EasyLM.parallel`.
      group_loss_fn: `loss_fn` on the `group_mesh`; its mean over groups of rows is the loss of the batch.
    """

    def gradients_of(loss_fn):
        def loss_and_gradients(params, extra, batch, step, key):
            (value, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)
            return value, gradients, metrics, extra

        return loss_and_gradients

    def evaluate(params, extra, batch):
        value, metrics = loss_fn(params, batch, None)
        return {"loss": value, **metrics}

    of_group = group_loss_fn and gradients_of(group_loss_fn)
    return Model(lambda key: (init_params(key), {}), gradients_of(loss_fn), evaluate, partition_rules, of_group)


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The settings of a model, as saved in the metadata of its checkpoints and compared on resume.

    Attributes:
      name: their key in metadata.json.
      values: the settings by name; JSON values, or tuples of them.
      resumable: the settings that may change on resume.
      fixed: the settings that cannot change even if a run starts from the parameters alone.
      saved: PREFIX::PATH -> the settings of the model in a checkpoint without metadata; unknown settings are absent.
    """

    name: str
    values: Mapping[str, Any]
    resumable: frozenset[str]
    fixed: frozenset[str] = frozenset()
    saved: Callable[[str], Mapping[str, Any]] = lambda spec: {}

    def differences(self, saved: Mapping[str, Any], among: Container[str] | None = None) -> str:
        """Returns the settings that differ from the saved ones as text; empty if the run can resume.

        Args:
          among: compare only these settings.
        """
        values = json.loads(json.dumps(dict(self.values)))  # JSON has lists in place of tuples
        return ", ".join(
            f"{name}={value!r} (saved: {saved[name]!r})"
            for name, value in values.items()
            if name in saved
            and name not in self.resumable
            and saved[name] != value
            and (among is None or name in among)
        )


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The rows to train on, and the rows to evaluate on, if any. Batch sizes are global."""

    train: RowSource
    batch_size: int
    eval: RowSource | None = None
    eval_batch_size: int = 0


@dataclasses.dataclass(frozen=True)
class Accounting:
    """The units of the throughput metrics.

    Attributes:
      unit: the name of an item.
      items_per_row: tokens (or images) of a row.
      flops_per_row: model FLOPs of a row, forward and backward.
    """

    unit: str
    items_per_row: int
    flops_per_row: float


@dataclasses.dataclass(frozen=True)
class TrainingTask:
    """What a run trains: model, optimizer, data, the units of its metrics, and further keys of its metadata."""

    model: Model
    optimizer: Optimizer
    data: TrainingData
    accounting: Accounting
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
