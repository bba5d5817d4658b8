"""Delivers metrics to a sink in the background: one that fails or hangs neither ends nor delays the run."""

import collections
import logging
import threading
import time

from EasyLM.errors import error_line
from EasyLM.training.metrics_sinks import CLOSE_SECONDS, MetricsSink, Row, logged_steps

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 300.0  # seconds between two tries of a row; the pause doubles
_SILENT_SECONDS = 60  # a sink that takes longer for a row counts as failed
_MOST_ROWS = 10_000  # that wait


class Delivery:
    """Delivers rows to a sink, in order.

    A row that fails is tried again until it succeeds. The first failure is logged, and so is the success that ends it.
    Meanwhile `_MOST_ROWS` rows wait. Further ones are dropped, and counted as missing.

    Args:
      name: the sink's name in log messages.
      sink: used by this object alone.
    """

    def __init__(self, name: str, sink: MetricsSink):
        self._name, self._sink = name, sink
        self._changed = threading.Condition()  # guards what follows
        self._waiting = collections.deque[Row]()  # the first one is being delivered
        self._begin = 0.0  # time.monotonic() when the delivery of the first one began
        self._missing = 0
        self._has_failed = False  # since the last success
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"metrics to {name}", daemon=True)
        self._thread.start()

    def log(self, row: Row) -> None:
        """Hands over the metrics of a step. Does not wait."""
        with self._changed:
            if len(self._waiting) == _MOST_ROWS:
                self._missing += 1
            else:
                if not self._waiting:
                    self._begin = time.monotonic()
                self._waiting.append(row)
                self._changed.notify_all()
            if time.monotonic() - self._begin > _SILENT_SECONDS:
                self._fail(f"no answer for {_SILENT_SECONDS} s")

    def wait(self, seconds: float) -> None:
        """Waits until all rows are delivered, unless the sink fails, or takes longer than this time."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._waiting or self._has_failed, seconds):
                self._fail(f"no answer for {seconds:g} s")

    def start_closing(self) -> None:
        """Asks the thread to try the waiting rows once more, and to close the sink."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def finish_closing(self, deadline: float) -> None:
        """Waits until the sink is closed. Logs how many steps are missing in it.

        Args:
          deadline: by time.monotonic(). Then the sink is abandoned.
        """
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logging.warning("%s did not close within %d s; the run ends without it", self._name, CLOSE_SECONDS)
            self._sink.abandon()
        with self._changed:
            if missing := self._missing + len(self._waiting):
                logging.warning("%s: %s not written", self._name, logged_steps(missing))

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while (row := self._next()) is not None:
            try:
                self._sink.log(row)
            except Exception as error:  # each service and store has its own
                with self._changed:
                    self._fail(error_line(error))
                    if self._closing:
                        break
                    self._changed.wait_for(lambda: self._closing, pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                pause = _FIRST_PAUSE
                self._succeed()
        try:
            self._sink.close()
        except Exception as error:
            logging.warning("%s did not close: %s", self._name, error_line(error))

    def _next(self) -> Row | None:
        """Waits for a row. Returns None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            self._begin = time.monotonic()
            return self._waiting[0] if self._waiting else None

    def _succeed(self) -> None:
        with self._changed:
            self._waiting.popleft()
            if self._has_failed:
                self._has_failed = False
                so_far = f"{logged_steps(self._missing)} not written" if self._missing else "no step is missing"
                logging.warning("%s can be written again; %s", self._name, so_far)
            self._changed.notify_all()

    def _fail(self, reason: str) -> None:
        """Logs the first of several failures. The caller holds the lock."""
        if not self._has_failed:
            logging.warning("%s cannot be written; the run continues, and tries again: %s", self._name, reason)
        self._has_failed = True
        self._changed.notify_all()
