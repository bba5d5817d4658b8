"""Jobs on a real SLURM: training on two nodes, requeue, time limit, killed tasks; a build as a job array."""

import contextlib
import json
import os
import pathlib
import signal
import sys
import time

import pytest
import slurm_kit
from tiny_run import TINY, dotted
from tokenizer_kit import tiny_vqgan, write_image

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 12
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm_kit.unavailable_reason()), reason=slurm_kit.unavailable_reason() or "available"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_kit.running_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def environment(tmp_path) -> dict[str, str]:
    """The environment of a job: this Python as the virtual environment, two virtual devices per node."""
    (tmp_path / "venv" / "bin").mkdir(parents=True, exist_ok=True)
    activate = tmp_path / "venv" / "bin" / "activate"
    activate.write_text(f'export PATH="{pathlib.Path(sys.executable).parent}:$PATH"\n')
    return os.environ | {
        "VENV": str(tmp_path / "venv"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path.parent / "compilation_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def submit(cluster, tmp_path, *options, **settings) -> str:
    """Submits scripts/slurm/train.sbatch with the tiny model; returns the job id."""
    flags = {**TINY, "mesh_dim": "2,-1,1", "total_steps": STEPS, "save_model_freq": 4, "logger.output_dir": tmp_path}
    flags |= {"logger.experiment_id": "run"} | dotted(settings)
    return cluster.submit(
        "--nodes=2",
        "--gpus-per-node=0",
        "--cpus-per-task=1",
        f"--output={tmp_path}/job.log",
        f"--chdir={ROOT}",
        *options,
        str(ROOT / "scripts" / "slurm" / "train.sbatch"),
        *(f"--{name}={value}" for name, value in flags.items()),
        env=environment(tmp_path),
    )


def losses(run_dir: pathlib.Path) -> dict[int, float]:
    """The loss of each step; of repeated steps the last counts."""
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows}


def log(tmp_path) -> str:
    """What the job has printed; empty before it starts."""
    path = tmp_path / "job.log"
    return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def uninterrupted(cluster, tmp_path_factory) -> pathlib.Path:
    """The directory of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    cluster.await_state(submit(cluster, directory), "COMPLETED")
    return directory / "run"


def assert_same(run_dir, uninterrupted):
    assert losses(run_dir) == losses(uninterrupted)
    assert (run_dir / "streaming_train_state").read_bytes() == (uninterrupted / "streaming_train_state").read_bytes()


def await_step(tmp_path, step: int) -> None:
    """Waits until the run has logged a step."""
    deadline = time.monotonic() + 240
    while not (tmp_path / "run" / "metrics.jsonl").exists() or max(losses(tmp_path / "run"), default=-1) < step:
        assert time.monotonic() < deadline, log(tmp_path)
        time.sleep(0.1)


def test_a_job_on_two_nodes_trains(uninterrupted):
    assert sorted(losses(uninterrupted)) == list(range(STEPS))


def test_a_requeued_job_continues_bit_equal(cluster, tmp_path, uninterrupted):
    job = submit(cluster, tmp_path, total_steps=STEPS)
    await_step(tmp_path, 2)
    cluster.run("node1", "scontrol", "requeue", job)
    cluster.start_requeued(job)
    cluster.await_state(job, "COMPLETED")
    assert "restart 1" in log(tmp_path)
    assert_same(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("node", slurm_kit.NODES)
def test_a_job_with_a_killed_task_fails_and_resumes_bit_equal(cluster, tmp_path, uninterrupted, node):
    job = submit(cluster, tmp_path)
    await_step(tmp_path, 2)
    (pid,) = [pid for pid in cluster.pids(node, "llama_train") if is_python(pid)]
    os.kill(pid, signal.SIGKILL)
    begin = time.monotonic()
    fields = cluster.await_state(job, "FAILED")
    assert time.monotonic() - begin < 90 and fields["Restarts"] == "0"
    cluster.await_state(submit(cluster, tmp_path), "COMPLETED")
    assert_same(tmp_path / "run", uninterrupted)


def test_before_the_time_limit_the_job_saves_and_requeues_itself(cluster, tmp_path):
    """The limit is a minute, SLURM's shortest.

    SLURM checks the limits every 30 s and sends the signal up to 30 s early: here 29 to 59 s after the start.
    """
    job = submit(cluster, tmp_path, "--time=1", "--signal=TERM@1", total_steps=10**6, save_model_freq=10**6)
    begin = time.monotonic()
    while "training ended" not in log(tmp_path):
        assert time.monotonic() - begin < 120, log(tmp_path)
        time.sleep(0.2)
    assert "training ended with exit code 75" in log(tmp_path)
    assert cluster.await_state(job, "PENDING")["Restarts"] == "1"
    cluster.run("node1", "scancel", job)
    metadata = json.loads((tmp_path / "run" / "metadata.json").read_text())
    assert metadata["step"] == max(losses(tmp_path / "run"), default=-1) + 1


def test_the_parts_of_an_array_build_concatenate_to_the_whole(cluster, tmp_path):
    for seed in range(10):
        write_image(tmp_path / "images" / f"{seed}.png", seed)
    build = [f"--input_dir={tmp_path}/images", f"--vqgan={tiny_vqgan(tmp_path / 'vqgan')}", "--kind=images"]
    script = str(ROOT / "scripts" / "slurm" / "build_array.sbatch")
    options = ["--gpus-per-task=0", "--cpus-per-task=1", f"--output={tmp_path}/%a.log", f"--chdir={ROOT}"]
    variables = environment(tmp_path)
    job = cluster.submit("--array=0-2", *options, script, str(tmp_path / "parts"), *build, env=variables)
    whole = cluster.submit("--array=0-0", *options, script, str(tmp_path / "whole"), *build, env=variables)
    for task in (f"{job}_0", f"{job}_1", f"{job}_2", f"{whole}_0"):
        cluster.await_state(task, "COMPLETED")
    parts = b"".join((tmp_path / "parts" / f"part_{i}.jsonl").read_bytes() for i in range(3))
    assert parts and parts == (tmp_path / "whole" / "part_0.jsonl").read_bytes()


# Every Python of a job runs it first.
IMPATIENT = """
from EasyLM.storage import heartbeat_lock
heartbeat_lock.HEARTBEAT_SECONDS, heartbeat_lock.STALE_SECONDS = 0.2, 2.0
"""


def test_jobs_of_an_array_take_over_the_parts_of_a_killed_one(cluster, tmp_path):
    """The first job whose lock is seen is killed: during its first part, or in whatever it does then.

    Without a heartbeat for two seconds, a job counts as dead. If one is only slow, another job builds the same bytes.
    """
    for seed in range(40):
        write_image(tmp_path / "images" / f"{seed}.png", seed)
    build = [f"--input_dir={tmp_path}/images", f"--vqgan={tiny_vqgan(tmp_path / 'vqgan')}", "--kind=images"]
    script, parts = str(ROOT / "scripts" / "slurm" / "build_array.sbatch"), tmp_path / "parts"
    options = ["--gpus-per-task=0", "--cpus-per-task=1", f"--output={tmp_path}/%a.log", f"--chdir={ROOT}"]
    variables = environment(tmp_path)
    (tmp_path / "site" / "sitecustomize.py").parent.mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(IMPATIENT)
    impatient = variables | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), variables["PYTHONPATH"]])}
    job = cluster.submit("--array=0-2", *options, script, str(parts), "--parts=7", *build, env=impatient)
    deadline = time.monotonic() + 240
    while not (locks := list(parts.glob(".part_?.jsonl.lock"))):
        assert time.monotonic() < deadline, [path.read_text() for path in tmp_path.glob("*.log")]
        time.sleep(0.01)
    with contextlib.suppress(OSError, ValueError):  # it has released the lock, or is writing it
        os.kill(json.loads(locks[0].read_text())["process"], signal.SIGKILL)
    for task in range(3):
        cluster.await_state(f"{job}_{task}", "COMPLETED", "FAILED")
    whole = cluster.submit("--array=0-0", *options, script, str(tmp_path / "whole"), *build, env=variables)
    cluster.await_state(f"{whole}_0", "COMPLETED")
    joined = b"".join((parts / f"part_{i}.jsonl").read_bytes() for i in range(7))
    assert joined and joined == (tmp_path / "whole" / "part_0.jsonl").read_bytes()


def is_python(pid: int) -> bool:
    """Whether a process is the trainer, and not the srun that started it."""
    return os.path.basename(os.readlink(f"/proc/{pid}/exe")).startswith("python")
