"""Where metrics are written: `metrics.jsonl`, wandb, TensorBoard. Each is a `MetricsSink`."""

import contextlib
import importlib.util
import io
import json
import os
import random
import re
import tempfile
import time
from collections.abc import Mapping
from typing import IO, Any, Literal, Protocol, cast

from EasyLM.errors import UserError, check_installed
from EasyLM.storage import is_remote, json_digest, names_store_errors, remote_file_system

_LONGEST_NAME = 128  # characters of a wandb project
_MOST_LINE_BYTES = 1 << 20
_REMOTE_FLUSH_SECONDS = 60  # between two uploads of a file on an object store
Row = dict[str, Any]  # metrics of a step: JSON values by name, `step` among them


class MetricsSink(Protocol):
    """A destination of the metrics of the logged steps."""

    def log(self, row: Row) -> None:
        """Writes the metrics of a step."""

    def close(self) -> None:
        """Writes what is buffered and releases the file or the connection."""


class JsonLinesSink:
    """Appends one JSON object per line. Removes the truncated last line that a kill or a full disk has left.

    Args:
      path: a local or remote path. A missing local directory is created.

    Raises:
      OSError: if the file cannot be opened.
      UnavailableError: if an object store cannot be reached.
    """

    def __init__(self, path: str):
        self.path, self._file = path, _open_to_append(path)
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(0, size - _MOST_LINE_BYTES))
        last = self._file.read().rpartition(b"\n")[2]
        if _is_json(last):
            self._file.write(b"\n")
        else:
            self._file.truncate(size - len(last))
            self._file.seek(0, os.SEEK_END)

    def log(self, row: Row) -> None:
        """Writes and flushes a line."""
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _open_to_append(path: str) -> IO[bytes]:
    if not is_remote(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return open(path, "ab+")
    store, name = remote_file_system(path)
    content = b""
    with contextlib.suppress(FileNotFoundError), names_store_errors(path):  # not `exists`: any error is "no" to it
        content = store.cat_file(name)
    return _RemoteFile(store, name, content)


class _RemoteFile(io.BytesIO):
    """A file on an object store, which cannot append. It is uploaded whole, at most once a minute and when closed."""

    def __init__(self, store: Any, name: str, content: bytes):
        super().__init__(content)
        self._store, self._name = store, name
        self.seek(0, os.SEEK_END)
        self._uploaded = time.monotonic()

    def flush(self) -> None:
        if time.monotonic() - self._uploaded > _REMOTE_FLUSH_SECONDS:
            self._store.pipe_file(self._name, self.getvalue())
            self._uploaded = time.monotonic()

    def close(self) -> None:
        if not self.closed:
            self._store.pipe_file(self._name, self.getvalue())
        super().close()


class WandbSink:
    """A wandb run, online or as offline files.

    Args:
      settings: the values of LOGGER_FLAGS.
      run_dir: the run directory; its last part names the wandb run, its path identifies it.
      run_settings: all settings of the run, shown by wandb.
      process: the index of this process; processes above 0 log to runs of their own.

    Raises:
      UserError: if wandb is not installed, or does not start.
    """

    def __init__(self, settings: Any, run_dir: str, run_settings: Mapping[str, Any], process: int):
        if not wandb_is_installed():
            raise UserError("--logger.online=True needs the package wandb: pip install wandb")
        import wandb

        if settings.random_delay > 0:
            time.sleep(random.uniform(0, settings.random_delay))
        directory = settings.wandb_dir or (tempfile.gettempdir() if is_remote(run_dir) else run_dir)
        suffix = f"-{process}" if process else ""
        name = os.path.basename(os.path.normpath(run_dir)) + suffix
        # WANDB_MODE, wandb's own variable, takes precedence: a cluster without a network sets it to offline.
        mode = os.environ.get("WANDB_MODE") or ("online" if settings.online else "offline")
        try:
            os.makedirs(directory, exist_ok=True)
            self._run = wandb.init(
                mode=cast(Literal["online", "offline", "disabled"], mode),
                project=wandb_project(settings),
                dir=directory,
                id=wandb_id(run_dir) + suffix,
                name=name[-_LONGEST_NAME:],
                resume="allow",
                config=dict(run_settings),
                notes=settings.notes or None,
                entity=settings.entity or None,
                settings=wandb.Settings(silent=True),
                **({"anonymous": settings.anonymous} if settings.anonymous else {}),  # deprecated: warns if given
            )
        except (wandb.Error, OSError) as error:
            raise UserError(
                f"--logger.online={settings.online} --logger.wandb_dir={directory}: wandb did not start ({error}); "
                "run `wandb login`, or set --logger.online=False or --logger.wandb=False"
            ) from error

    def log(self, row: Row) -> None:
        """Sends the metrics, or adds them to the offline files."""
        self._run.log(row)

    def close(self) -> None:
        """Ends the wandb run."""
        self._run.finish()


class TensorBoardSink:
    """TensorBoard event files, each metric a scalar over the steps.

    Args:
      directory: where the event files are written.

    Raises:
      UserError: if the package tensorboardX is missing.
    """

    def __init__(self, directory: str):
        check_installed("--logger.tensorboard=True", "tensorboard", "tensorboardX")
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(directory)

    def log(self, row: Row) -> None:
        """Adds the numbers of a step; a metric that is not finite is left out."""
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Writes the last events and closes the file."""
        self._writer.close()


def wandb_project(settings: Any) -> str:
    """Returns the name of the wandb project.

    Args:
      settings: the values of LOGGER_FLAGS.

    Raises:
      UserError: if wandb does not accept the name.
    """
    project = f"{settings.prefix}--{settings.project}" if settings.prefix else settings.project
    if not project.strip() or len(project) > _LONGEST_NAME or any(character in project for character in "/\\#?%:"):
        raise UserError(
            f"--logger.project={settings.project} --logger.prefix={settings.prefix}: the wandb project {project!r} "
            f"must have 1 to {_LONGEST_NAME} characters, without any of / \\ # ? % :"
        )
    return project


def wandb_id(run_dir: str) -> str:
    """Returns the wandb id of a run: the name of its directory and a digest of the whole path.

    Two runs of one name in different directories are two runs in wandb. A run that resumes continues its wandb run.
    Characters that wandb does not accept become dashes.
    """
    path = run_dir if is_remote(run_dir) else os.path.realpath(run_dir)
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", os.path.basename(os.path.normpath(path)))
    return f"{name[-_LONGEST_NAME // 2 :]}-{json_digest(path)}"


def wandb_is_installed() -> bool:
    """Whether wandb is installed. Does not import it."""
    return importlib.util.find_spec("wandb") is not None
