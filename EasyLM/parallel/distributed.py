"""The start of a multi-process run with jax.distributed."""

import contextlib
import errno
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from EasyLM.errors import USER_ERROR, UserError
from EasyLM.flags import Flag
from EasyLM.parallel.peers import connect_peers

JAX_DISTRIBUTED_FLAGS = {
    "initialize_jax_distributed": Flag(False, "Start jax.distributed: one process per host of a multi-host run."),
    "coordinator_address": Flag(None, "HOST:PORT of process 0; detected on SLURM and TPU pods.", type=str),
    "num_processes": Flag(None, "Number of processes; detected on SLURM and TPU pods.", type=int, least=1),
    "process_id": Flag(None, "Index of this process; detected on SLURM and TPU pods.", type=int, least=0),
    "local_device_ids": Flag(
        None,
        "Comma list of this process's devices. Empty: all of the host; with several SLURM tasks per node, one each.",
        type=str,
    ),
    "initialization_timeout": Flag(300, "Seconds to wait until all processes have connected.", least=1),
    "heartbeat_timeout_seconds": Flag(100, "Seconds without a heartbeat until a process counts as dead.", least=1),
    "shutdown_timeout_seconds": Flag(30, "Seconds that a process waits for the others when it exits.", least=1),
}
_REPORT_SECONDS = 30  # between two messages of a process that waits for the others
_GRACE_SECONDS = 60  # JAX's own timeout is later by this: JAX aborts the process with a native stack trace


def initialize_distributed(config: Any) -> None:
    """Joins the processes of a multi-host run if the flags ask for it. Call this before any other use of JAX.

    Logs a message every 30 seconds while it waits for other processes.

    Args:
      config: values of JAX_DISTRIBUTED_FLAGS.

    Raises:
      UserError: if `local_device_ids` is not a comma list of integers, the port is in use, or the processes cannot
        connect. Exits with code 2 after `initialization_timeout`.
    """
    if not config.initialize_jax_distributed:
        return
    ids = _local_device_ids(config.local_device_ids)
    # JAX's preemption service would take SIGTERM away from the handlers of this framework.
    jax.config.update("jax_enable_preemption_service", False)
    _check_port(config)
    try:
        with _reported_wait(config):
            jax.distributed.initialize(
                config.coordinator_address,
                config.num_processes,
                config.process_id,
                ids,
                initialization_timeout=config.initialization_timeout + _GRACE_SECONDS,
                heartbeat_timeout_seconds=config.heartbeat_timeout_seconds,
                shutdown_timeout_seconds=config.shutdown_timeout_seconds,
            )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--jax_distributed: the processes did not connect ({error}); check coordinator_address="
            f"{config.coordinator_address}, num_processes={config.num_processes}, process_id={config.process_id}"
        ) from error
    connect_peers(config.coordinator_address, config.heartbeat_timeout_seconds)


def _local_device_ids(text: str | None) -> list[int] | None:
    """Parses `local_device_ids`. Returns an empty list for all devices of the host, None for those that JAX detects."""
    if text:
        try:
            return [int(i) for i in text.split(",")]
        except ValueError:
            raise UserError(
                f"--jax_distributed.local_device_ids={text}: must be a comma list of integers, such as 0,1,2"
            ) from None
    # Under SLURM JAX takes one GPU per task, even if a node has a single task. SLURM_STEP_TASKS_PER_NODE is, for
    # example, 1(x4): one task on each of four nodes.
    tasks_per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0]
    return [] if tasks_per_node == "1" else None


def _check_port(config: Any) -> None:
    """Checks on process 0 that the port is free.

    The coordination service binds with SO_REUSEPORT. Two jobs with the same port on one host would both start, and
    each would receive connections meant for the other.
    """
    process_id = config.process_id if config.process_id is not None else os.environ.get("SLURM_PROCID")
    if str(process_id) != "0" or not config.coordinator_address:
        return
    host, _, port = config.coordinator_address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--jax_distributed.coordinator_address={config.coordinator_address}: must be HOST:PORT")
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignores closed connections
        try:
            listener.bind(("", int(port)))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return  # for example no IPv6; JAX reports other errors
            raise UserError(
                f"--jax_distributed.coordinator_address={config.coordinator_address}: port {port} is in use on this "
                "host, perhaps by another job; give each job its own port, on SLURM for example "
                "$((12000 + SLURM_JOB_ID % 20000))"
            ) from None


@contextlib.contextmanager
def _reported_wait(config: Any) -> Iterator[None]:
    """Logs while the body waits for other processes. After the timeout, prints one line and exits with code 2."""
    connected, address = threading.Event(), config.coordinator_address or "process 0"

    def report() -> None:
        end = time.monotonic() + config.initialization_timeout
        while not connected.wait(min(_REPORT_SECONDS, max(0.0, end - time.monotonic()))):
            if time.monotonic() >= end:
                print(
                    f"error: --jax_distributed: after {config.initialization_timeout} s not all processes have "
                    f"connected to {address}; start all {config.num_processes or ''} of them, "
                    "check coordinator_address, num_processes and the network, or raise initialization_timeout",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(USER_ERROR)
            logging.warning(
                "waiting for the other processes to connect to %s; giving up in %.0f s",
                address,
                end - time.monotonic(),
            )

    thread = threading.Thread(target=report, name="distributed start", daemon=True)
    thread.start()
    try:
        yield
    finally:
        connected.set()
        thread.join()
