"""Where a run's figures go: `metrics.jsonl` in the run directory, wandb, and the console."""

import io
import json
import math
import os
import random
import tempfile
import time
import uuid

import fsspec
import jax
import numpy as np
from jax.experimental import multihost_utils

from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.storage import is_remote

_REMOTE_SECONDS = 60  # between two writings of a file on a store

LOGGER_FLAGS = {
    "online": Flag(False, "Send figures to wandb's server; else wandb keeps them in wandb_dir, to be synced later."),
    "prefix": Flag("", "Put before the wandb project's name, as prefix--project."),
    "project": Flag("lvm", "wandb project."),
    "output_dir": Flag("runs", "The run directory is output_dir/experiment_id."),
    "wandb_dir": Flag("", "Where wandb writes; empty: the run directory."),
    "random_delay": Flag(0.0, "Wait up to this many seconds before wandb starts: many jobs shall not call at once."),
    "experiment_id": Flag("", "Name of the run directory and wandb id; empty: random. The same name resumes that run."),
    "anonymous": Flag("", "wandb's anonymous mode.", choices=("", "allow", "must", "never")),
    "notes": Flag("", "Free text about the run, kept in its metadata and in wandb."),
    "entity": Flag("", "wandb user or team."),
    "prefix_to_id": Flag(False, "Put the prefix before the experiment_id too."),
}


def experiment_id(config) -> str:
    """The run's name: as given, or random, and then the same one on every process."""
    name = config.experiment_id or uuid.UUID(bytes=_same_everywhere(uuid.uuid4().bytes)).hex
    return f"{config.prefix}--{name}" if config.prefix and config.prefix_to_id else name


def given_id(config, run_dir: str) -> str:
    """The `experiment_id` that leads to this run directory again."""
    name = os.path.relpath(run_dir, config.output_dir) if config.output_dir else run_dir
    return name.removeprefix(f"{config.prefix}--") if config.prefix and config.prefix_to_id else name


def _same_everywhere(data: bytes) -> bytes:
    if jax.process_count() == 1:
        return data
    return np.asarray(multihost_utils.broadcast_one_to_all(np.frombuffer(data, np.uint8))).tobytes()


class Logger:
    """Appends each logged step's figures to `metrics.jsonl`, one JSON object a line, and sends them to wandb.

    A run that resumes appends: of repeated steps the last line counts. Figures that are not finite are written as null,
    since JSON knows no NaN. With `all_processes`, every process writes: process p > 0 to `metrics_{p}.jsonl`.

    Raises:
      UserError: if the run directory cannot be written, or wandb does not start.
    """

    def __init__(self, config, run_dir: str, run_settings: dict, all_processes: bool = False):
        process = jax.process_index()
        self._file = self._wandb = None
        if process and not all_processes:
            return
        path = os.path.join(run_dir, f"metrics_{process}.jsonl" if process else "metrics.jsonl")
        try:
            self._file = _open_to_append(path)
        except OSError as error:
            raise UserError(
                f"--logger.output_dir={config.output_dir}: cannot write {path} ({error.strerror})"
            ) from error
        _end_torn_line(self._file)
        self._wandb = _start_wandb(config, run_dir, run_settings, process)

    def log(self, figures: dict) -> None:
        """Writes one line; `figures` has `step` and anything JSON can hold."""
        if self._file is None:
            return
        row = {name: _json_value(value) for name, value in figures.items()}
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        self._wandb.log(row)

    def close(self) -> None:
        """Ends the wandb run and closes the file."""
        if self._file is not None:
            self._wandb.finish()
            self._file.close()
            self._file = None


def _open_to_append(path: str):
    if is_remote(path):
        return _RemoteFile(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return open(path, "ab+")


class _RemoteFile(io.BytesIO):
    """A file on a store, where nothing can be appended: written anew, at most once a minute and when it is closed."""

    def __init__(self, path: str):
        self._store, self._name = fsspec.url_to_fs(path)
        super().__init__(self._store.cat_file(self._name) if self._store.exists(self._name) else b"")
        self.seek(0, os.SEEK_END)
        self._written = time.monotonic()

    def flush(self) -> None:
        if time.monotonic() - self._written > _REMOTE_SECONDS:
            self._store.pipe_file(self._name, self.getvalue())
            self._written = time.monotonic()

    def close(self) -> None:
        if not self.closed:
            self._store.pipe_file(self._name, self.getvalue())
        super().close()


def _end_torn_line(file) -> None:
    """A killed run may have left half a line: what follows starts on one of its own."""
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def _json_value(value):
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _start_wandb(config, run_dir: str, run_settings: dict, process: int):
    import wandb

    if config.random_delay > 0:
        time.sleep(random.uniform(0, config.random_delay))
    directory = config.wandb_dir or (tempfile.gettempdir() if is_remote(run_dir) else run_dir)
    name = os.path.basename(os.path.normpath(run_dir)) + (f"-{process}" if process else "")
    try:
        os.makedirs(directory, exist_ok=True)
        return wandb.init(
            # WANDB_MODE, wandb's own variable, has the last word: a cluster without a network sets it to offline.
            mode=os.environ.get("WANDB_MODE") or ("online" if config.online else "offline"),
            project=f"{config.prefix}--{config.project}" if config.prefix else config.project,
            dir=directory,
            id=name,
            name=name,
            resume="allow",
            config=run_settings,
            notes=config.notes or None,
            entity=config.entity or None,
            settings=wandb.Settings(silent=True),
            **({"anonymous": config.anonymous} if config.anonymous else {}),  # newer versions warn of it
        )
    except (wandb.Error, OSError) as error:
        raise UserError(
            f"--logger.online={config.online} --logger.wandb_dir={directory}: wandb did not start ({error}); "
            "run `wandb login`, or set WANDB_MODE=offline or WANDB_MODE=disabled"
        ) from error
