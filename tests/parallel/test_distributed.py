"""The start of several processes: errors are reported within seconds, in one line."""

import socket
import subprocess
import sys
import time

import pytest

from EasyLM import flags
from EasyLM.errors import UserError
from EasyLM.parallel import JAX_DISTRIBUTED_FLAGS, distributed, initialize_distributed

START = """
import sys
from EasyLM import flags
from EasyLM.parallel import JAX_DISTRIBUTED_FLAGS, distributed
distributed._REPORT_SECONDS = 1
definitions = {"jax_distributed": JAX_DISTRIBUTED_FLAGS}
flags.run(lambda config: distributed.initialize_distributed(config.jax_distributed), definitions)
"""


def settings(**changes):
    config = flags.defaults(JAX_DISTRIBUTED_FLAGS)
    config.initialize_jax_distributed = True
    config.update(changes)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_missing_process_is_reported(port, process):
    command = [sys.executable, "-c", START, "--jax_distributed.initialize_jax_distributed"]
    command += [f"--jax_distributed.coordinator_address=127.0.0.1:{port}", f"--jax_distributed.process_id={process}"]
    command += ["--jax_distributed.num_processes=2", "--jax_distributed.initialization_timeout=3"]
    begin = time.monotonic()
    completed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert completed.returncode == 2 and time.monotonic() - begin < 30
    assert f"waiting for the other processes to connect to 127.0.0.1:{port}" in completed.stderr
    assert "after 3 s not all processes have connected" in completed.stderr and "Traceback" not in completed.stderr


def test_a_port_in_use_is_refused():
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as the coordination service does
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is in use on this host"):
            initialize_distributed(settings(coordinator_address=f"127.0.0.1:{port}", num_processes=2, process_id=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_device_ids": "0,x"}, "local_device_ids=0,x: must be a comma list of integers"),
        ({"coordinator_address": "somewhere", "process_id": 0}, "coordinator_address=somewhere: must be HOST:PORT"),
    ],
)
def test_wrong_flags_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        initialize_distributed(settings(**changes))


@pytest.mark.parametrize(
    ("flag", "tasks_per_node", "ids"),
    [("", "1(x4)", []), ("", "1", []), ("", "8(x4)", None), ("", None, None), ("0,2", "1(x4)", [0, 2])],
)
def test_a_single_task_per_node_takes_all_devices(monkeypatch, flag, tasks_per_node, ids):
    """JAX itself takes one GPU per SLURM task. An empty list of ids means all."""
    monkeypatch.delenv("SLURM_STEP_TASKS_PER_NODE", raising=False)
    if tasks_per_node:
        monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks_per_node)
    assert distributed._local_device_ids(flag) == ids
