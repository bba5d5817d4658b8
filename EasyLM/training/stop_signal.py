"""Handling of signals that ask a run to stop after the step in progress."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# SIGINT: Ctrl-C. SIGTERM: SLURM, Kubernetes and TPU VMs send it before they end a job. SIGUSR1: a common choice for
# SLURM's option --signal. SIGHUP: a closed terminal.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopVote:
    """A context in which STOP_SIGNALS ask all processes to stop after the same step.

    Each step every process votes 0 or 1, and the maximum of the previous step decides. The vote follows the train step
    on the devices, so no process waits for it. The first signal restores the previous handlers, so a second signal has
    its usual effect.
    """

    def __enter__(self) -> "StopVote":
        self._requested, self._previous_vote = False, None
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._handlers[number] = signal.signal(number, self._request)
        if jax.process_count() > 1:
            self._mesh = Mesh(np.array(jax.devices()), ("device",))
            self._maximum = jax.jit(jnp.max, out_shardings=NamedSharding(self._mesh, P()))
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        self._restore()
        message = f"\n{signal.Signals(number).name}: finishing the step, then saving\n"
        with contextlib.suppress(OSError):
            os.write(2, message.encode())  # `print` raises if the signal interrupts another `print`

    def stop(self, metrics: dict) -> bool:
        """Returns whether to stop now. Every process calls this once a step.

        Args:
          metrics: what the train step returned.
        """
        if jax.process_count() == 1:
            return self._requested
        if jax.default_backend() == "cpu":  # on CPUs (gloo) two concurrent multi-process programs deadlock
            jax.block_until_ready(metrics)
        votes = np.full(jax.local_device_count(), self._requested, np.int32)
        vote = self._maximum(multihost_utils.host_local_array_to_global_array(votes, self._mesh, P("device")))
        decided, self._previous_vote = self._previous_vote, vote
        if jax.default_backend() == "cpu":
            vote.block_until_ready()
        return decided is not None and bool(decided)
