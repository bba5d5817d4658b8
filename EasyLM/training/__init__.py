"""Training for any model: state and step, loop, checkpoints and metrics of a run. Depends on no model or data format.

May import EasyLM.parallel, EasyLM.checkpoints and EasyLM.storage.

    step          the train state, and the pure functions that change it
    accumulation  the mean gradient of the micro-steps of an update
    abstract_step shapes, shardings and bytes of a step's arguments, and its trace
    compilation   compiles a run's functions; their cache on disk
    task          what a run trains: model, optimizer, data, units
    settings      the flags of every run, and their values
    run           `open_run` locks the directory and validates flags and starting files; `train` does the rest
    start         where a run starts: fresh, from its latest checkpoint, or from --load_checkpoint
    loop          the training loop
    batches       global batches on the mesh, prefetched; the data state
    optimizers    optimizers from flags; schedules: their learning rates; weight_average: a moving average of weights
    throughput    items per second, seconds by activity, MFU
    profiler      traces of a few steps
    goodput       the share of a run's time, over all its starts, that goes into steps that count
    stop_signal   signals stop all processes after the same step
    maintenance   stops a run before its TPU machine is taken away
    preemption    whether a save fits into the time after a stop signal
    watchdog      ends a run that makes no progress
    metrics_log   the metrics of a run; their flags
    metrics_file  metrics.jsonl
    metrics_sinks wandb, TensorBoard
    metrics_delivery writes to one of these in the background, and tries again

Vocabulary:
    micro-step    one batch: forward and backward pass; `step` counts micro-steps from 0
    update        one change of the parameters, after one or more micro-steps (accumulation)
    at rest       a state as files hold it; between saves, groups of devices along dp have accumulators of their own
    row           one training example of fixed size; a batch has `batch_size` rows over all devices
    item          what throughput counts: a token, or an image
    extra         state that the loss function updates and no gradient reaches, such as running means
    data state    rows consumed, and the fingerprint of the data that they came from
    milestone     a checkpoint that is kept for good; of the other checkpoints only the latest are kept
"""

from EasyLM.training.abstract_step import abstract_batch, abstract_state, bytes_per_device, trace_step
from EasyLM.training.batches import RowSource
from EasyLM.training.optimizers import OPTIMIZER_FLAGS, make_optimizer
from EasyLM.training.run import Run, open_run, train
from EasyLM.training.settings import RUN_FLAGS, RunSettings
from EasyLM.training.start import StartPoint
from EasyLM.training.step import Optimizer, TrainState, make_train_step
from EasyLM.training.stop_signal import StopSignals
from EasyLM.training.task import Accounting, Model, ModelSettings, TrainingData, TrainingTask, model_without_extra
from EasyLM.training.throughput import peak_flops

__all__ = [
    "OPTIMIZER_FLAGS",
    "RUN_FLAGS",
    "Accounting",
    "Model",
    "ModelSettings",
    "Optimizer",
    "RowSource",
    "Run",
    "RunSettings",
    "StartPoint",
    "StopSignals",
    "TrainState",
    "TrainingData",
    "TrainingTask",
    "abstract_batch",
    "abstract_state",
    "bytes_per_device",
    "make_optimizer",
    "make_train_step",
    "model_without_extra",
    "open_run",
    "peak_flops",
    "trace_step",
    "train",
]
