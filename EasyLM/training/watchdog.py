"""A watchdog: logs what a run waits for, and ends a run that no longer makes progress."""

import contextlib
import faulthandler
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

from EasyLM.parallel import end_together

# The exit code of a run that the watchdog has ended. Its latest checkpoint is whole; the same command resumes the run.
# The number is EX_SOFTWARE of sysexits.h.
HANGS = 70
REPORT_SECONDS = 60  # between two messages about the same wait
_BACKSTOP_SECONDS = 60


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """Logs each minute that the body has not finished, without a limit.

    Args:
      what: for example "the compilation".
    """
    with Watchdog(0) as watchdog:
        watchdog.expect(what)
        yield


class Watchdog:
    """A context in which the training loop states what it waits for, with `expect`.

    A wait of a minute is logged. A wait longer than the limit ends all processes of the run: each prints what it waits
    for and the Python stacks of all its threads, and exits with code HANGS. Compilation is outside of the context.

    If a thread blocks Python itself, as a page fault of an unreachable file system does, the stacks are printed a
    minute later by a native thread, and the exit code is 1.

    Args:
      minutes: the limit; 0: none.
    """

    def __init__(self, minutes: float):
        self._minutes = minutes
        self._expected, self._begin, self._reported = "", time.monotonic(), 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.expect("the start of training")
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._closed.set()
        self._thread.join()
        if self._minutes:
            faulthandler.cancel_dump_traceback_later()

    def expect(self, what: str) -> None:
        """Starts a wait, and ends the one before it.

        Args:
          what: for example "step 12".
        """
        self._expected, self._begin, self._reported = what, time.monotonic(), 0.0

    def _watch(self) -> None:
        limit = 60 * self._minutes
        while not self._closed.wait(min(1.0, limit / 4 or 1.0)):
            what, waited = self._expected, time.monotonic() - self._begin
            if limit:
                # 2 is the standard error; `sys.stderr` of a notebook has no file descriptor.
                faulthandler.dump_traceback_later(limit + _BACKSTOP_SECONDS - waited, exit=True, file=2)
            if limit and waited > limit:
                end_together(
                    f"--watchdog_minutes={self._minutes:g}: {what} has not finished within this time; the stacks of "
                    "all threads follow; the same command resumes the run from its latest checkpoint",
                    HANGS,
                )
            if waited > self._reported + REPORT_SECONDS:
                self._reported = waited
                logging.warning("waiting for %s since %.0f s", what, waited)
