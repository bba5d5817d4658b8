"""Handling of signals that ask a run to stop after the step in progress."""

import contextlib
import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM.interrupt import INTERRUPTED, raise_interrupt

# SIGINT: Ctrl-C. SIGTERM: SLURM, Kubernetes and TPU VMs send it before they end a job. SIGUSR1: a common choice for
# SLURM's option --signal. SIGHUP: a closed terminal.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

_STUCK_SECONDS = 3  # without a handler's call: the main thread is inside native code


class StopSignals(contextlib.ContextDecorator):
    """Records STOP_SIGNALS while it is entered, instead of their usual effect.

    Commands decorate `main` with it, so that a signal during start-up or compilation is not lost. A nested use shares
    the record of the outermost one. Outside the main thread, where Python cannot handle signals, it does nothing.

    After the first signal, Ctrl-C has its usual effect again, also during a compilation, which Python cannot interrupt.
    The other signals are ignored until the process exits: schedulers repeat them while the state is saved, and
    `srun --kill-on-bad-exit` sends them when the first of several processes has exited with STOPPED.
    """

    _outermost: "StopSignals | None" = None

    def __enter__(self) -> "StopSignals":
        if StopSignals._outermost is not None:
            return StopSignals._outermost
        self.received_at: float | None = None  # time.monotonic() of the first signal
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            StopSignals._outermost = self
            self._handlers = {number: signal.signal(number, self._record) for number in STOP_SIGNALS}
            self._handled, self._interrupted = threading.Event(), threading.Event()
            receiver, self._sender = socket.socketpair()
            self._sender.setblocking(False)
            self._wakeup_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._exit_if_stuck, args=(receiver,), name="stop signals", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        if StopSignals._outermost is self:
            StopSignals._outermost = None
            signal.set_wakeup_fd(self._wakeup_fd)
            self._sender.close()  # ends the thread
            if self.received_at is None:
                for number, handler in self._handlers.items():
                    signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received_at = time.monotonic()
        self._handled.set()
        for each in self._handlers:
            signal.signal(each, self._interrupt if each == signal.SIGINT else signal.SIG_IGN)
        _write(f"\n{signal.Signals(number).name}: stopping after the step in progress\n")

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted.set()
        raise_interrupt(number, frame)

    def _exit_if_stuck(self, receiver: socket.socket) -> None:
        """Prints a message, and exits at a second Ctrl-C, while the main thread compiles and runs no signal handlers.

        Args:
          receiver: receives the number of each signal at once.
        """
        stopping = False
        with receiver:
            while number := receiver.recv(1):
                if stopping and number[0] == signal.SIGINT and not self._interrupted.wait(_STUCK_SECONDS):
                    _write("\ninterrupted\n")
                    os._exit(INTERRUPTED)
                stopping = stopping or number[0] in STOP_SIGNALS
                if not self._handled.wait(_STUCK_SECONDS):
                    _write("\nstopping after the compilation in progress; Ctrl-C exits at once\n")


def request_stop() -> None:
    """Stops the run as SIGTERM does, by sending it, where StopSignals handles it. Any thread may call this."""
    if StopSignals._outermost is not None:
        os.kill(os.getpid(), signal.SIGTERM)


def seconds_since_signal() -> float | None:
    """Returns the time since this process has received a stop signal, or None if it has not."""
    signals = StopSignals._outermost
    if signals is None or signals.received_at is None:
        return None
    return time.monotonic() - signals.received_at


def _write(message: str) -> None:
    """Writes to stderr. `print` raises if a signal interrupts another `print`."""
    with contextlib.suppress(OSError):
        os.write(2, message.encode())


class StopVote:
    """A context that decides after each step whether all processes stop because one of them has received a stop signal.

    Each step every process votes 0 or 1, and the maximum of the previous step decides. The vote follows the train step
    on the devices, so no process waits for it.
    """

    def __enter__(self) -> "StopVote":
        self._context, self._previous_vote = StopSignals(), None
        self._signals = self._context.__enter__()
        if jax.process_count() > 1:
            self._mesh = Mesh(np.array(jax.devices()), ("device",))
            self._maximum = jax.jit(jnp.max, out_shardings=NamedSharding(self._mesh, P()))
        return self

    def __exit__(self, *exception: object) -> None:
        self._context.__exit__(*exception)

    def stop(self, metrics: dict) -> bool:
        """Returns whether to stop now. Every process calls this once before the first step and once after each step.

        Args:
          metrics: what the train step returned; empty before the first step.
        """
        if jax.process_count() == 1:
            return self._signals.received_at is not None
        if jax.default_backend() == "cpu":  # on CPUs (gloo) two concurrent multi-process programs deadlock
            jax.block_until_ready(metrics)
        votes = np.full(jax.local_device_count(), self._signals.received_at is not None, np.int32)
        vote = self._maximum(multihost_utils.host_local_array_to_global_array(votes, self._mesh, P("device")))
        decided, self._previous_vote = self._previous_vote, vote
        if jax.default_backend() == "cpu":
            vote.block_until_ready()
        return decided is not None and bool(decided)
