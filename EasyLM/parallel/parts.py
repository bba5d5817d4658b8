"""Which part of divided work is this process's: the task of a batch system, or the host of a pod."""

from collections.abc import Mapping

import jax

from EasyLM.errors import UserError


def own_part(environ: Mapping[str, str]) -> tuple[int, int]:
    """Returns (part i from 0, number of parts n) of this process.

    The parts are the tasks of a SLURM array, the tasks of `srun`, both (each task of an array has as many parts as
    `srun` starts tasks in it), the hosts of TPU slices, or the processes of jax.distributed.

    Args:
      environ: environment variables.

    Raises:
      UserError: if this process is none of these, or the array does not have the tasks 0..n-1.
    """
    if "SLURM_ARRAY_TASK_ID" in environ or "SLURM_STEP_NUM_TASKS" in environ:
        array_task, array_tasks = _array_task(environ)
        # A batch script itself, which is not started by `srun`, has no step. SLURM_NTASKS is that of the job there.
        step_task, step_tasks = 0, 1
        if "SLURM_STEP_NUM_TASKS" in environ:
            step_task, step_tasks = int(environ["SLURM_PROCID"]), int(environ["SLURM_STEP_NUM_TASKS"])
        return array_task * step_tasks + step_task, array_tasks * step_tasks
    if "TPU_WORKER_ID" in environ and "TPU_WORKER_HOSTNAMES" in environ:
        hosts = len(environ["TPU_WORKER_HOSTNAMES"].split(","))
        slice_id, slices = (
            int(environ.get(f"MEGASCALE_{name}", i)) for i, name in enumerate(("SLICE_ID", "NUM_SLICES"))
        )
        return slice_id * hosts + int(environ["TPU_WORKER_ID"]), slices * hosts
    if jax.process_count() > 1:
        return jax.process_index(), jax.process_count()
    raise UserError("this process is not a task of a SLURM array or of srun, or a host of a pod: give i/n, or --parts")


def _array_task(environ: Mapping[str, str]) -> tuple[int, int]:
    if "SLURM_ARRAY_TASK_ID" not in environ:
        return 0, 1
    task, tasks = int(environ["SLURM_ARRAY_TASK_ID"]), int(environ["SLURM_ARRAY_TASK_COUNT"])
    first, last = int(environ["SLURM_ARRAY_TASK_MIN"]), int(environ["SLURM_ARRAY_TASK_MAX"])
    if (first, last) != (0, tasks - 1):  # perhaps some tasks of a larger array, submitted again
        raise UserError(
            f"the {tasks} tasks of the SLURM array are {first} to {last}, not 0 to {tasks - 1}: to build some parts "
            f"again, give --shard=$SLURM_ARRAY_TASK_ID/n with the n of the whole array"
        )
    return task, tasks
