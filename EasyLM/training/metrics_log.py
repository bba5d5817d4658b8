"""The metrics of a run: `metrics.jsonl` in the run directory, and the services that the flags name."""

import logging
import math
import os
import uuid
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from EasyLM.errors import UserError, check_installed
from EasyLM.flags import Flag
from EasyLM.training.metrics_sinks import (
    JsonLinesSink,
    MetricsSink,
    TensorBoardSink,
    WandbSink,
    wandb_is_installed,
    wandb_project,
)

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
    "notes": Flag("", "Free text about the run, kept in its metadata and in wandb."),
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
    JSON has no NaN. A service that fails during the run is disabled with a warning. If `metrics.jsonl` cannot be
    written, a warning says so once, and each further row tries again. The run continues.

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
        self._file: JsonLinesSink | None = None
        self._file_failed = False  # the last row was not written
        self._services: list[MetricsSink] = []
        if process and not all_processes:
            return
        suffix, path = f"_{process}" if process else "", metrics_path(run_dir)
        try:
            self._file = JsonLinesSink(path)
        except OSError as error:
            raise UserError(
                f"--logger.output_dir={settings.output_dir}: cannot write {path} ({error.strerror})"
            ) from error
        if settings.tensorboard:
            self._services.append(TensorBoardSink(os.path.join(run_dir, f"tensorboard{suffix}")))
        if settings.wandb and not settings.online and not wandb_is_installed():
            logging.warning("wandb is not installed; no offline files are written; metrics are in %s", path)
        elif settings.wandb:
            self._services.append(WandbSink(settings, run_dir, run_settings, process))

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of a step: `step` and other JSON values."""
        if self._file is None:
            return
        row = {name: _json_value(value) for name, value in metrics.items()}
        try:
            self._file.log(row)
        except Exception as error:  # a full disk, or an object store that cannot be reached; the next row may succeed
            if not self._file_failed:
                logging.warning("%s cannot be written; the run continues: %s", self._file.path, error)
            self._file_failed = True
        else:
            self._file_failed = False
        for service in list(self._services):
            try:
                service.log(row)
            except Exception as error:  # a service must not end the run
                logging.warning("%s failed and is disabled: %s", type(service).__name__, error)
                self._services.remove(service)

    def close(self) -> None:
        """Closes the services and the file."""
        for service in self._services:
            try:
                service.close()
            except Exception as error:
                logging.warning("%s did not close: %s", type(service).__name__, error)
        self._services = []
        if self._file is not None:
            try:
                self._file.close()
            except Exception as error:
                logging.warning("%s was not closed: %s", self._file.path, error)
            self._file = None


def _json_value(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
