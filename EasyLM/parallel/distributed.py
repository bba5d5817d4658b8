"""The start of a multi-process run with jax.distributed."""

from typing import Any

import jax

from EasyLM.errors import UserError
from EasyLM.flags import Flag

JAX_DISTRIBUTED_FLAGS = {
    "initialize_jax_distributed": Flag(False, "Start jax.distributed: one process per host of a multi-host run."),
    "coordinator_address": Flag(None, "HOST:PORT of process 0; detected on SLURM and TPU pods.", type=str),
    "num_processes": Flag(None, "Number of processes; detected on SLURM and TPU pods.", type=int),
    "process_id": Flag(None, "Index of this process; detected on SLURM and TPU pods.", type=int),
    "local_device_ids": Flag(None, "Comma list of this process's devices; empty: all that are visible.", type=str),
}


def initialize_distributed(config: Any) -> None:
    """Joins the processes of a multi-host run if the flags ask for it. Call this before any other use of JAX.

    Args:
      config: values of JAX_DISTRIBUTED_FLAGS.

    Raises:
      UserError: if `local_device_ids` is not a comma list of integers, or the processes cannot connect.
    """
    if not config.initialize_jax_distributed:
        return
    try:
        ids = [int(i) for i in config.local_device_ids.split(",")] if config.local_device_ids else None
    except ValueError:
        raise UserError(
            f"--jax_distributed.local_device_ids={config.local_device_ids}: must be a comma list of integers, as 0,1,2"
        ) from None
    try:
        jax.distributed.initialize(config.coordinator_address, config.num_processes, config.process_id, ids)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--jax_distributed: the processes did not connect ({error}); check coordinator_address="
            f"{config.coordinator_address}, num_processes={config.num_processes}, process_id={config.process_id}"
        ) from error
