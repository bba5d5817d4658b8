"""Saves the checkpoints of a run in the background."""

import collections
import functools
import itertools
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from EasyLM.checkpoints import layout, listing, run_directory, saves
from EasyLM.checkpoints.orbax_save import OrbaxSave
from EasyLM.checkpoints.saved_part import SavedPart, save_seconds, uses_orbax
from EasyLM.checkpoints.streaming_save import StreamingSave
from EasyLM.errors import UnavailableError, UserError, error_line
from EasyLM.parallel import Channel, PeerError
from EasyLM.storage import is_remote

_checkpointers = itertools.count()  # all processes create them in the same order


class Checkpointer:
    """Saves a run's states asynchronously. `save` copies the state to host memory; a thread writes the copy.

    In a run of several processes, each copies and writes its share of the state, into one streaming file or into a
    directory of Orbax. Process 0 then adds the other files. If streaming files go to an object store, or to a disk that
    not all processes share, process 0 gathers and writes the whole state. Every process must call the methods at the
    same steps, except `close`.

    Args:
      run_dir: a local path, or a remote path that fsspec supports; see `run_directory`.
      float_dtype, save_optimizer_state, format, keep_latest, keep_every: see CHECKPOINTER_FLAGS.
      guard: see `Saves`; called on process 0.

    Raises:
      UserError: if the type or the format is unknown, the run directory is not writable, or Orbax cannot save in it.
    """

    def __init__(
        self,
        run_dir: str,
        *,
        float_dtype: str = "",
        save_optimizer_state: bool = False,
        format: str = "auto",
        keep_latest: int = 1,
        keep_every: int = 0,
        guard: Callable[[], None] = lambda: None,
    ):
        part = SavedPart(float_dtype, save_optimizer_state)
        with_orbax = uses_orbax(format, run_dir)
        self._keep_every = keep_every
        self._directory = run_directory.open_run_directory(run_dir, keep_latest, guard)
        self._name, self._channels = f"checkpointer/{next(_checkpointers)}", collections.deque[Channel]()
        self._number = 0
        self._others = range(1, jax.process_count())
        is_shared = self._prepare_directory(self._next_channel())
        if with_orbax and self._others and not (is_shared or is_remote(run_dir)):
            raise UserError(
                f"Orbax needs a directory on a disk that all processes share: not all see {run_dir}; choose the format "
                "streaming, or another directory"
            )
        self._writer = (
            OrbaxSave(self._directory, part) if with_orbax else StreamingSave(self._directory, part, is_shared)
        )
        self._part, self._save_begin, self._save_seconds = part, 0.0, 0.0
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def prepare(self, state: Any) -> None:
        """Allocates host memory for a state of these shapes, in a background thread. Warns if the disk is too small."""
        if jax.process_index() == 0 and not is_remote(self._directory.path):
            self._warn_of_small_disk(self._part.sizes(state)[0])
        self._start(functools.partial(self._writer.prepare, state))

    def save(self, state: Any, step: int, dataset_state: Mapping, metadata: Mapping, milestone: bool = False) -> None:
        """Saves a state (`step`, `params`, `opt_state`). The caller may donate its arrays afterwards.

        Waits for a save that is still in progress.

        Args:
          milestone: whether the checkpoint is kept for good.

        Raises:
          UserError: if the previous save failed. Earlier checkpoints remain intact.
        """
        self.wait()
        self._save_begin = time.monotonic()
        milestone = milestone or (self._keep_every > 0 and step % self._keep_every == 0)
        channel = self._next_channel()

        def commit(directory: str, writers: saves.Writers) -> None:
            writers = {**writers, layout.DATASET: saves.json_writer(dataset_state)}
            self._directory.commit(directory, step, writers, metadata, milestone)

        def write() -> None:
            with channel.failing_together():
                finish(commit)
                if jax.process_index() == 0:
                    channel.send("saved")
                else:
                    channel.receive(0)
            self._save_seconds = time.monotonic() - self._save_begin

        try:
            with channel.failing_together():
                finish = self._writer.start(state, functools.partial(self._directory.begin, step), channel)
        except (OSError, UserError) as failure:  # as those of the background thread
            self._fail(failure)
            return
        self._start(write)

    def seconds_to_save(self, state: Any) -> float:
        """Returns how long a save of a state would take from now on until it is on disk.

        That is the time of the last save, or before the first one an estimate from the bytes. If a save is in progress,
        its remaining time is included.
        """
        file_bytes, host_bytes = self._part.sizes(state)
        seconds = self._save_seconds or save_seconds(file_bytes, host_bytes // jax.process_count())
        if self._thread is not None and self._thread.is_alive():
            return seconds + max(0.0, self._save_begin + seconds - time.monotonic())
        return seconds

    def wait(self) -> None:
        """Blocks until the last save is on disk.

        Raises:
          UserError: if the last save failed. Every process raises it.
        """
        if self._thread is not None:
            self._thread.join()
        failure, self._thread, self._failure = self._failure, None, None
        if isinstance(failure, OSError | UnavailableError | PeerError):
            raise UserError(
                f"{self._directory.path}: the checkpoint was not saved ({error_line(failure)}); {self._remaining()}"
            ) from failure
        if failure is not None:
            raise failure

    def _warn_of_small_disk(self, needed_bytes: int) -> None:
        """A warning, not an error: space may become free before the first save."""
        free_bytes = shutil.disk_usage(self._directory.path).free
        if needed_bytes > free_bytes:
            logging.warning(
                "%s: a checkpoint needs %.3g GB, and %.3g GB of the disk are free: the first save will end the run",
                self._directory.path,
                needed_bytes / 1e9,
                free_bytes / 1e9,
            )

    def _remaining(self) -> str:
        """Says which checkpoint remains after a failed save."""
        try:
            newest = listing.latest_checkpoint(self._directory.path)
        except Exception as error:  # the disk or store may fail again; each store has its own exceptions
            return f"the earlier ones cannot be listed ({error_line(error)})"
        if newest:
            return f"{newest.name} is intact"
        return "the earlier ones no longer exist" if self._directory.has_saved else "there is no earlier one"

    def close(self) -> None:
        """Blocks until the last save is written. Raises no error.

        Use it after an error on this process alone, while the other processes execute a step.
        """
        if self._thread is not None:
            self._thread.join()

    def _start(self, work: Callable[[], Any]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as failure:
                self._fail(failure)

        self._thread = threading.Thread(target=run, name="checkpoint writer")
        self._thread.start()

    def _fail(self, failure: BaseException) -> None:
        """Records an error, which `wait` raises."""
        self._failure = failure
        logging.error("saving a checkpoint failed: %s", failure)

    def _next_channel(self) -> Channel:
        """Returns a channel for the messages of one save. Deletes those of the save before the last one."""
        self._channels.append(Channel(f"{self._name}/{self._number}"))
        self._number += 1
        if len(self._channels) > 2:
            # The last save is complete. Each process took part in it after it had received all messages of the save
            # before.
            self._channels.popleft().delete()
        return self._channels[-1]

    def _prepare_directory(self, channel: Channel) -> bool:
        """Prepares the run directory on process 0. Returns whether all processes see its files."""
        with channel.failing_together():
            if jax.process_index() != 0:
                path = channel.receive(0)
                channel.send(path is not None and self._directory.is_visible(path))
                return channel.receive(0)
            self._directory.prepare()
            with self._directory.visible_file() as path:
                channel.send(path)
                seen = [channel.receive(process) for process in self._others]
            is_shared = all(seen)
            channel.send(is_shared)
            if path is not None and not is_shared:
                logging.warning(
                    "%s: not all processes see this directory: process 0 gathers and writes all of a checkpoint",
                    self._directory.path,
                )
            return is_shared
