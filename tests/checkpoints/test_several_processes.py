"""Several processes save one file together: the bytes of one process, a share for each, and errors that all know."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest
import saving_program
from checkpoint_kit import assert_equal, make_checkpointer

from EasyLM import checkpoints
from EasyLM.checkpoints.directories import file_sizes

ROOT = pathlib.Path(__file__).parents[2]
KILLED = "ended without an error message; it was probably killed, for example for lack of memory"
FILES = ("streaming_train_state", "checksums.json", "dataset.json")


def run_program(results, run_dirs, port, **flags) -> list[tuple[int, list[str], str]]:
    """Runs the program with a process of two devices for each of the directories.

    Args:
      results: a new folder for the results of the processes.

    Returns:
      (exit code, lines of the results, stderr) of each process.
    """
    results.mkdir()
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    environment = os.environ | devices | {"PYTHONPATH": str(ROOT)}
    flags |= {"jax_distributed.initialize_jax_distributed": True, "jax_distributed.num_processes": len(run_dirs)}
    flags["jax_distributed.coordinator_address"] = f"127.0.0.1:{port}"
    command = [sys.executable, saving_program.__file__, *(f"--{name}={value}" for name, value in flags.items())]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(
            [*command, f"--run_dir={path}", f"--output={results}/{i}", f"--jax_distributed.process_id={i}"],
            env=environment,
            **pipes,
        )
        for i, path in enumerate(run_dirs)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        (process.returncode, (results / str(i)).read_text().splitlines(), stderr)
        for i, (process, (_, stderr)) in enumerate(zip(processes, outputs, strict=True))
    ]


def save_alone(directory, step) -> pathlib.Path:
    saver = make_checkpointer(directory)
    saver.save(saving_program.values(step), step, {"step": step}, {"step": step, "flags": {}})
    saver.wait()
    return directory


@pytest.mark.slow
def test_each_process_saves_and_loads_its_share(tmp_path, port):
    """Also: a full disk of one process, a killed one, and a restart on two processes that do not share a disk."""
    run_dir, alone = tmp_path / "run", save_alone(tmp_path / "1", 1)
    outcomes = run_program(tmp_path / "results", [run_dir] * 4, port, mesh_dim="2,2,2", full=2, killed=3)
    size = (alone / FILES[0]).stat().st_size
    for process, (code, lines, errors) in enumerate(outcomes):
        saved, loaded = json.loads(lines[0]), json.loads(lines[1])
        assert max(saved["written"], saved["memory"], loaded["read"]) <= 1.1 * size / 4, (process, lines)
        cause = "No space left on device" if process == 2 else "process 2: No space left on device"
        assert loaded["messages"] == 1  # that of process 0; those with the parts are deleted
        assert lines[2] == f"{run_dir}: the checkpoint was not saved ({cause}); checkpoints/step_00000001 is intact"
        assert code == (-signal.SIGKILL if process == 3 else 1)
        assert process == 3 or re.search(f"^error: process 3 on .*: {KILLED}$", errors, re.MULTILINE), errors
    interrupted, whole = sorted(os.listdir(run_dir / "checkpoints"))
    assert whole == "step_00000001" and interrupted.startswith(".tmp-3-")
    for name in FILES:
        assert (run_dir / name).read_bytes() == (alone / name).read_bytes()
    assert_equal(
        checkpoints.load(f"trainstate::{run_dir}/{FILES[0]}", saving_program.values(0)), saving_program.values(1)
    )
    shutil.copytree(run_dir, tmp_path / "copy", symlinks=True)
    first, second = run_program(tmp_path / "more_results", [run_dir, tmp_path / "copy"], port, load=True, full=0)
    assert first[0] == second[0] == 0, (first, second)
    assert "not all processes see this directory" in first[2]
    assert "(No space left on device)" in first[1][1] and "(process 0: No space left on device)" in second[1][1]
    assert os.listdir(run_dir / "checkpoints") == ["step_00000003"]
    alone = save_alone(tmp_path / "3", 3)
    for name in FILES:
        assert (run_dir / name).read_bytes() == (alone / name).read_bytes()


@pytest.mark.slow
def test_each_process_writes_its_shards_with_orbax(tmp_path, port):
    """And reads them again. The last state is loaded by one process on one device."""
    run_dir = tmp_path / "run"
    outcomes = run_program(tmp_path / "results", [run_dir] * 2, port, mesh_dim="1,2,2", format="orbax")
    for code, lines, errors in outcomes:
        assert code == 0 and json.loads(lines[0])["memory"] == 0, (lines, errors)
    assert os.listdir(run_dir / "checkpoints") == ["step_00000003"]
    state = run_dir / "orbax_train_state"
    assert_equal(
        checkpoints.load(f"trainstate::{state}", saving_program.values(0, "orbax")), saving_program.values(3, "orbax")
    )
    sizes = file_sizes(str(state))
    shares = [sum(size for path, size in sizes.items() if path.startswith(f"ocdbt.process_{i}/")) for i in range(2)]
    assert max(shares) <= 1.1 * sum(shares) / 2
