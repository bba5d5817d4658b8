"""The metrics of a run: `metrics.jsonl` in the run directory, and the services that the flags name."""

import contextlib
import logging
import math
import os
import time
import uuid
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from EasyLM.errors import UserError, check_installed
from EasyLM.flags import Flag
from EasyLM.storage import is_remote
from EasyLM.training.metrics_delivery import Delivery
from EasyLM.training.metrics_file import JsonLinesSink, RemoteJsonLinesSink
from EasyLM.training.metrics_sinks import (
    CLOSE_SECONDS,
    MetricsSink,
    TensorBoardSink,
    WandbSink,
    wandb_is_installed,
    wandb_project,
)

_MOST_WAIT_SECONDS = 5  # for a line of a local `metrics.jsonl`

LOGGER_FLAGS = {
    "online": Flag(False, "Send metrics to the wandb server; False: wandb writes files, which `wandb sync` uploads."),
    "wandb": Flag(True, "Use wandb; False: wandb is not imported."),
    "tensorboard": Flag(False, "Write TensorBoard event files under the run directory (extra: tensorboard)."),
    "prefix": Flag("", "Prefix of the wandb project's name: prefix--project."),
    "project": Flag("lvm", "wandb project."),
    "output_dir": Flag("runs", "The run directory is output_dir/experiment_id."),
    "wandb_dir": Flag("", "Where wandb writes; empty: the run directory."),
    "random_delay": Flag(
        0.0,
        "Wait a random time up to this many seconds before wandb starts, so that many jobs do not connect at once.",
        least=0,
    ),
    "experiment_id": Flag(
        "", "Name of the run directory and of the wandb run; empty: random. The same name resumes that run."
    ),
    "anonymous": Flag("", "wandb's anonymous mode.", choices=("", "allow", "must", "never")),
    "notes": Flag("", "Free text about the run, kept in its metadata and in wandb.", free_text=True),
    "entity": Flag("", "wandb user or team."),
    "prefix_to_id": Flag(False, "Add the prefix to the experiment_id too."),
}


def check_settings(settings: Any) -> None:
    """Checks what wandb would refuse when it starts, after the data has been indexed.

    Args:
      settings: the values of LOGGER_FLAGS.

    Raises:
      UserError: naming the flag.
    """
    if is_remote(settings.wandb_dir):
        raise UserError(f"--logger.wandb_dir={settings.wandb_dir}: must be a local path")
    if settings.wandb:
        wandb_project(settings)
        if settings.online and not wandb_is_installed():
            raise UserError("--logger.online=True needs the package wandb: pip install wandb")
    if settings.tensorboard:
        check_installed("--logger.tensorboard=True", "tensorboard", "tensorboardX")


def experiment_id(settings: Any) -> str:
    """Returns the run's name: the given one, or a random one that is the same on every process.

    Args:
      settings: the values of LOGGER_FLAGS.
    """
    name = settings.experiment_id or uuid.UUID(bytes=_broadcast(uuid.uuid4().bytes)).hex
    return f"{settings.prefix}--{name}" if settings.prefix and settings.prefix_to_id else name


def given_id(settings: Any, run_dir: str) -> str:
    """Returns the value of `experiment_id` that selects this run directory."""
    name = os.path.relpath(run_dir, settings.output_dir) if settings.output_dir else run_dir
    return name.removeprefix(f"{settings.prefix}--") if settings.prefix and settings.prefix_to_id else name


def metrics_path(run_dir: str) -> str:
    """Returns the path of this process's metrics: `metrics.jsonl`, or `metrics_{p}.jsonl` for process p above 0."""
    process = jax.process_index()
    return os.path.join(run_dir, f"metrics_{process}.jsonl" if process else "metrics.jsonl")


def _broadcast(data: bytes) -> bytes:
    """Returns the bytes of process 0 on every process."""
    if jax.process_count() == 1:
        return data
    return np.asarray(multihost_utils.broadcast_one_to_all(np.frombuffer(data, np.uint8))).tobytes()


class Logger:
    """Writes the metrics of each logged step to `metrics.jsonl`, and to wandb and TensorBoard if the flags select them.

    A resumed run appends; if a step is repeated, its last line counts. A metric that is not finite becomes null, since
    JSON has no NaN. A file or service that fails during the run is tried again, and delays neither the steps nor the
    end of the run; see `Delivery`.

    Args:
      settings: the values of LOGGER_FLAGS.
      run_dir: the run directory.
      run_settings: all settings of the run, shown by wandb.
      all_processes: whether processes above 0 log too; process p writes `metrics_{p}.jsonl`.

    Raises:
      UserError: if the run directory cannot be written, or a service does not start.
    """

    def __init__(self, settings: Any, run_dir: str, run_settings: Mapping[str, Any], all_processes: bool = False):
        process = jax.process_index()
        self._deliveries: list[Delivery] = []  # the first one is that of metrics.jsonl
        self._waits = not is_remote(run_dir)
        if process and not all_processes:
            return
        suffix, path = f"_{process}" if process else "", metrics_path(run_dir)
        sinks: dict[str, MetricsSink] = {}
        with contextlib.ExitStack() as opened:  # if one does not start, the others are closed
            try:
                sinks[path] = RemoteJsonLinesSink(path) if is_remote(path) else JsonLinesSink(path)
                opened.callback(sinks[path].close)
                if settings.tensorboard:
                    path = os.path.join(run_dir, f"tensorboard{suffix}")
                    sinks["TensorBoard"] = TensorBoardSink(path)
                    opened.callback(sinks["TensorBoard"].close)
            except OSError as error:
                raise UserError(
                    f"--logger.output_dir={settings.output_dir}: cannot write {path} ({error.strerror})"
                ) from error
            if settings.wandb and not settings.online and not wandb_is_installed():
                logging.warning("wandb is not installed; no offline files are written; metrics are in %s", run_dir)
            elif settings.wandb:
                sinks["wandb"] = WandbSink(settings, run_dir, run_settings, process)
            opened.pop_all()
        self._deliveries = [Delivery(name, sink) for name, sink in sinks.items()]

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of a step: `step` and other JSON values."""
        row = {name: _json_value(value) for name, value in metrics.items()}
        for delivery in self._deliveries:
            delivery.log(row)
        if self._deliveries and self._waits:  # a run that is killed after the next save does not repeat the step
            self._deliveries[0].wait(_MOST_WAIT_SECONDS)

    def close(self) -> None:
        """Closes the file and the services, within CLOSE_SECONDS."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for delivery in self._deliveries:
            delivery.start_closing()
        for delivery in self._deliveries:
            delivery.finish_closing(deadline)
        self._deliveries = []


def _json_value(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
