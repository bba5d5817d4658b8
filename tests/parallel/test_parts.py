"""The part of a process: each of 0..n-1 once, from the variables of SLURM and of TPU slices."""

import pytest

from EasyLM.errors import UserError
from EasyLM.parallel import own_part


def _array(task: int, first: int = 0, last: int = 3, count: int = 4) -> dict[str, str]:
    values = {"ID": task, "MIN": first, "MAX": last, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def _step(task: int, count: int = 3) -> dict[str, str]:
    return {"SLURM_PROCID": str(task), "SLURM_STEP_NUM_TASKS": str(count)}


# What the batch script of a job with several tasks sees, before it starts any.
_BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}


def _slice(worker: int, **others: str) -> dict[str, str]:
    return {"TPU_WORKER_ID": str(worker), "TPU_WORKER_HOSTNAMES": "a,b", **others}


@pytest.mark.parametrize(
    "processes",
    [
        [_BATCH | _array(task) for task in range(4)],
        [_BATCH | _step(task) for task in range(3)],
        [_BATCH | _array(task) | _step(step) for task in range(4) for step in range(3)],
        [_slice(worker) for worker in range(2)],
        [_slice(w, MEGASCALE_SLICE_ID=str(s), MEGASCALE_NUM_SLICES="3") for s in range(3) for w in range(2)],
    ],
)
def test_processes_have_all_parts_once(processes):
    assert [own_part(environ) for environ in processes] == [(i, len(processes)) for i in range(len(processes))]


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "not a task of a SLURM array or of srun, or a host of a pod: give i/n"),
        (_BATCH, "not a task of"),  # srun was forgotten: every process would be part 0
        (_array(3, 3, 3, 1), r"the 1 tasks of the SLURM array are 3 to 3, .* --shard=\$SLURM_ARRAY_TASK_ID/n"),
        (_array(4, 0, 4, 3), "the 3 tasks of the SLURM array are 0 to 4"),
    ],
)  # fmt: skip
def test_a_process_without_a_part_is_refused(environ, message):
    with pytest.raises(UserError, match=message):
        own_part(environ)
