"""Where metrics are written besides `metrics.jsonl`: wandb, TensorBoard. Each is a `MetricsSink`."""

import contextlib
import importlib.util
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from EasyLM.errors import UnavailableError, UserError, check_installed, error_line
from EasyLM.storage import is_remote, json_digest

_LONGEST_NAME = 128  # characters of a wandb project
FLUSH_SECONDS = 60  # between two uploads of a file on an object store, and two flushes of events to the disk
CLOSE_SECONDS = 30  # given to all sinks at the end of a run
_FINISH_SECONDS = 20  # of these, given to wandb for its uploads
Row = dict[str, Any]  # metrics of a step: JSON values by name, `step` among them


class MetricsSink(Protocol):
    """A destination of the metrics of the logged steps."""

    def log(self, row: Row) -> None:
        """Writes the metrics of a step. After an exception the same row may be given again."""

    def close(self) -> None:
        """Writes what is buffered and releases the file or the connection."""

    def abandon(self) -> None:
        """Called by another thread if `close` does not return, so that it does not keep the process from exiting."""


def logged_steps(number: int) -> str:
    """Returns a number of logged steps with its verb."""
    return f"{number} logged step{' is' if number == 1 else 's are'}"


@contextlib.contextmanager
def counts_lost_steps(number: int) -> Iterator[None]:
    """Converts an error at the end of a sink to an UnavailableError that says how many steps it loses."""
    try:
        yield
    except Exception as error:  # each store has its own
        raise UnavailableError(f"the last {logged_steps(number)} not written: {error_line(error)}") from error


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
        if settings.random_delay > 0:
            time.sleep(random.uniform(0, settings.random_delay))
        directory = settings.wandb_dir or (tempfile.gettempdir() if is_remote(run_dir) else run_dir)
        suffix = f"-{process}" if process else ""
        name = os.path.basename(os.path.normpath(run_dir)) + suffix
        # WANDB_MODE, wandb's own variable, takes precedence: a cluster without a network sets it to offline.
        mode = os.environ.get("WANDB_MODE") or ("online" if settings.online else "offline")
        self._arguments = {
            "mode": mode,
            "project": wandb_project(settings),
            "dir": directory,
            "id": wandb_id(run_dir) + suffix,
            "name": name[-_LONGEST_NAME:],
            "resume": "allow",
            "config": dict(run_settings),
            "notes": settings.notes or None,
            "entity": settings.entity or None,
            **({"anonymous": settings.anonymous} if settings.anonymous else {}),  # deprecated: warns if given
        }
        self._online = settings.online
        self._run: Any = self._start()

    def _start(self) -> Any:
        import wandb

        directory = self._arguments["dir"]
        limits = wandb.Settings(silent=True, finish_timeout=_FINISH_SECONDS, finish_timeout_raises=True)
        try:
            os.makedirs(directory, exist_ok=True)
            return wandb.init(**self._arguments, settings=limits)
        except (wandb.Error, OSError) as error:
            raise UserError(
                f"--logger.online={self._online} --logger.wandb_dir={directory}: wandb did not start ({error}); "
                "run `wandb login`, or set --logger.online=False or --logger.wandb=False"
            ) from error

    def log(self, row: Row) -> None:
        """Sends the metrics, or adds them to the offline files. After a failure wandb is started anew."""
        if self._run is None:
            self._run = self._start()
        try:
            self._run.log(row)
        except Exception:
            self._run = None
            _end_wandb()
            raise

    def close(self) -> None:
        """Ends the wandb run.

        Raises:
          TimeoutError: if the server does not take all in time.
        """
        if self._run is None:
            return
        try:
            self._run.finish()
        except TimeoutError as error:
            raise TimeoutError(f"{error}; `wandb sync` uploads the rest from {self._arguments['dir']}/wandb") from None

    def abandon(self) -> None:
        """Withdraws wandb's function that waits for its process when this one exits."""
        threading.Thread(target=_end_wandb, daemon=True).start()


def _end_wandb() -> None:
    """Ends wandb's own process, so that the next `wandb.init` starts another one."""
    import wandb

    with contextlib.suppress(Exception):  # the process may be dead
        wandb.teardown()
    os.environ.pop("WANDB_SERVICE", None)  # the address of a process; `teardown` leaves that of a dead one


class TensorBoardSink:
    """TensorBoard event files, each metric a scalar over the steps.

    Does not use `SummaryWriter`: its thread ends at the first error, and then its queue blocks the caller forever.

    Args:
      directory: where the event files are written.

    Raises:
      UserError: if the package tensorboardX is missing.
      OSError: if the directory cannot be written.
    """

    def __init__(self, directory: str):
        check_installed("--logger.tensorboard=True", "tensorboard", "tensorboardX")
        self._directory, self._num_files = directory, 0
        self._unflushed: list[Any] = []  # events that a new file repeats after a failure
        self._writer: Any = None
        self._open()

    def _open(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.record_writer import directory_check

        self._num_files += 1
        directory_check(self._directory)  # creates a local one
        self._writer = EventsWriter(os.path.join(self._directory, "events"), f".{os.getpid()}.{self._num_files}")
        for event in self._unflushed:
            self._writer.write_event(event)
        self._flush()

    def _flush(self) -> None:
        self._writer.flush()
        self._flushed, self._unflushed = time.monotonic(), []

    def log(self, row: Row) -> None:
        """Adds the numbers of a step; a metric that is not finite is left out. After a failure begins another file."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        event = Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values))
        try:
            if self._writer is None:
                self._open()
            self._writer.write_event(event)
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._flush()
            else:
                self._unflushed.append(event)
        except Exception:
            broken, self._writer = self._writer, None
            if broken is not None:
                with contextlib.suppress(Exception):
                    broken.close()
            raise

    def close(self) -> None:
        """Writes the last events and closes the file.

        Raises:
          UnavailableError: if that fails, with the number of logged steps that are lost.
        """
        with counts_lost_steps(len(self._unflushed)):
            if self._writer is None and self._unflushed:
                self._open()
            if self._writer is not None:
                self._writer.close()

    def abandon(self) -> None:
        """Does nothing: the file does not keep the process from exiting."""


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
