"""Coordination of processes: waits without a time limit, shared errors, and stopping after the same step."""

import json
import os
import re
import signal
import socket
import types

import jax
import numpy as np
import pytest
from tiny_run import GOLDEN, await_metrics, finish, metrics, start_two, train

from EasyLM.checkpoints import streaming
from EasyLM.errors import UserError
from EasyLM.parallel import (
    SHARE_VARIABLES,
    coordination,
    device_memory,
    host_memory,
    make_mesh,
    more_device_memory,
    usable_memory,
)
from EasyLM.training import run


class Service:
    """A key-value service: its first three reads time out at once, then it answers."""

    timeouts = 3

    def __init__(self, values: dict[str, str]):
        self.values, self.reads = values, 0

    def key_value_set(self, key, value):
        assert self.values.setdefault(key, value) is value, f"{key} is not new"

    def blocking_key_value_get(self, key, timeout_ms):
        self.reads += 1
        if self.reads <= self.timeouts:
            raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {key} after {timeout_ms}ms")
        if key not in self.values:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses\n\nfurther lines")
        return self.values[key]


def key(call, process):
    return f"EasyLM/on_first_process_first/{call}/{process}"


@pytest.fixture
def second_of_two(monkeypatch):
    """Makes this process the second of two; returns a function that gives it a service with these values."""

    def with_service(values):
        service = Service({key(call, process): text for (call, process), text in values.items()})
        monkeypatch.setattr(coordination, "jax_client", lambda: service)
        return service

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(coordination, "_calls", iter(range(10)))
    return with_service


def test_the_second_process_waits_for_the_first_without_a_limit(second_of_two):
    service = second_of_two({(0, 0): "done", (1, 0): "done"})
    assert coordination.on_first_process_first(lambda: service.reads) == service.timeouts + 1, "called after the first"
    assert coordination.on_first_process_first(lambda: "again") == "again"
    assert service.values[key(0, 1)] == service.values[key(1, 1)] == "done"


@pytest.mark.parametrize(
    "values, error", [({(0, 0): "a.jsonl:3: no"}, "^a.jsonl:3: no$"), ({}, "^process 0 is not reachable: U.*s$")]
)
def test_the_second_process_raises_the_error_of_the_first(second_of_two, values, error):
    second_of_two(values)
    with pytest.raises(UserError, match=error):
        coordination.on_first_process_first(lambda: pytest.fail("called without the first"))


@pytest.mark.parametrize(
    "error, message", [(UserError("a:3: no"), "a:3: no"), (KeyError("x"), "process 1 stopped: KeyError: 'x'")]
)
def test_an_error_is_published_to_the_other_processes(second_of_two, error, message):
    service = second_of_two({(0, 0): "done"})

    def fail():
        raise error

    with pytest.raises(type(error)):
        coordination.on_first_process_first(fail)
    assert service.values[key(0, 1)] == message


def test_processes_that_start_from_different_states_stop(second_of_two):
    """This happens where each process has a run directory on its own disk, and only the first has a checkpoint."""
    service = second_of_two({(0, 0): "done", (1, 0): "done", (2, 0): "done"})
    service.values["EasyLM/check_same/0"] = service.values["EasyLM/check_same/2"] = '{"its step": 20, "its row": 80}'
    service.values[key(3, 0)] = "done"
    coordination.check_same({"its step": 20, "its row": 80})
    with pytest.raises(
        UserError, match="its step is 0 on process 1 and 20 on process 0; all processes need the same run dir"
    ):
        coordination.check_same({"its step": 0, "its row": 0})
    assert service.values[key(3, 1)].startswith("the processes start from different states")


@pytest.mark.parametrize("other, least", [(7, 7), (9, 8), (None, 8)])
def test_all_processes_plan_with_the_least_memory(second_of_two, other, least):
    """CPUs have no statistics, or none of the limit."""
    second_of_two({}).values["EasyLM/from_all_processes/0/0"] = json.dumps(other)
    stats = [{"bytes_limit": 8}, {"bytes_limit": 11}, {}, None]
    devices = [types.SimpleNamespace(memory_stats=lambda values=values: values) for values in stats]
    assert device_memory(types.SimpleNamespace(local_devices=devices)) == least


def test_cpus_have_no_limit_but_shares_of_their_machine():
    mesh = make_mesh("1,-1,1")
    assert device_memory(mesh) is None
    assert usable_memory(mesh) == host_memory() // len(mesh.local_devices) > 10**6


@pytest.mark.parametrize("reports, share", [(["other", 500, 2], 500 // 2), ([None, 1000, 4], 1000 // (2 + 4))])
def test_processes_of_one_machine_share_its_memory(second_of_two, monkeypatch, reports, share):
    """The first process has 2 devices on another machine of 500 bytes, or 4 devices on this one of 1000 bytes."""
    service = second_of_two({})
    service.values["EasyLM/from_all_processes/0/0"] = "null"  # no limit
    service.values["EasyLM/from_all_processes/1/0"] = json.dumps([reports[0] or socket.gethostname(), *reports[1:]])
    monkeypatch.setattr("EasyLM.parallel.memory.host_memory", lambda: 1000)
    devices = [types.SimpleNamespace(memory_stats=lambda: None, platform="cpu") for _ in range(2)]
    assert usable_memory(types.SimpleNamespace(local_devices=devices, devices=np.array(devices))) == share


def test_the_memory_of_other_devices_without_statistics_is_unknown():
    device = types.SimpleNamespace(memory_stats=lambda: None, platform="gpu")
    assert usable_memory(types.SimpleNamespace(local_devices=[device], devices=np.array([device]))) is None


def test_the_advice_names_the_variable_that_is_set(monkeypatch):
    """JAX refuses to start with both of its names."""
    for name in SHARE_VARIABLES:
        monkeypatch.setenv(name, "")
    assert more_device_memory().startswith("XLA_CLIENT_MEM_FRACTION=0.95 in the environment")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert more_device_memory().startswith("XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment")


_JOB = "slurm/uid_7/job_12/step_0"


@pytest.mark.parametrize(
    ("groups", "limits", "least"),
    [
        (None, {}, None),
        (None, {"memory.max": "max\n"}, None),
        (None, {"memory.max": "1048576\n"}, 2**20),  # a container
        (None, {"memory/memory.limit_in_bytes": "1048576\n"}, 2**20),
        ("4:memory:/docker/7a\n", {"memory/memory.limit_in_bytes": "1048576\n"}, 2**20),  # its path on the host
        ("0::/\n", {"memory.max": "9223372036854771712\n"}, None),
        (f"0::/{_JOB}\n", {f"{_JOB}/memory.max": "2097152\n", "memory.max": "max\n"}, 2**21),
        (f"0::/{_JOB}/task_0\n", {f"{_JOB}/task_0/memory.max": "max", f"{_JOB}/memory.max": "1048576"}, 2**20),
        (f"0::/{_JOB}\n", {f"{_JOB}/memory.max": "2097152", "slurm/memory.max": "1048576"}, 2**20),
        (f"3:cpu,memory:/{_JOB}\n0::/\n", {f"memory/{_JOB}/memory.limit_in_bytes": "1048576"}, 2**20),
        (f"3:cpuset:/{_JOB}\n", {f"memory/{_JOB}/memory.limit_in_bytes": "1048576"}, None),  # of another process
    ],
)
def test_a_container_or_batch_job_has_its_own_limit(tmp_path, monkeypatch, groups, limits, least):
    monkeypatch.setattr("EasyLM.parallel.memory._GROUPS", tmp_path / "fs")
    monkeypatch.setattr("EasyLM.parallel.memory._OWN_GROUPS", tmp_path / "cgroup")
    if groups:
        (tmp_path / "cgroup").write_text(groups)
    for name, text in limits.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    assert host_memory() == (least or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def test_messages_arrive_in_order(second_of_two):
    first = {"EasyLM/channel/a/0/0": '{"value":[1]}', "EasyLM/channel/a/0/1": '{"error":"process 0: disk full"}'}
    service, channel = second_of_two({}), None
    service.values.update(first)
    channel = coordination.Channel("a")
    assert channel.receive(0) == [1]
    with pytest.raises(coordination.PeerError, match=r"^process 0: disk full$"), channel.failing_together():
        channel.receive(0)
    channel.send({"b": None})
    with pytest.raises(OSError), channel.failing_together():
        raise OSError(28, "disk full", "/a/file")
    own = [service.values[f"EasyLM/channel/a/1/{i}"] for i in range(3)]
    assert own == [
        '{"error":"process 0: disk full"}',
        '{"value":{"b":null}}',
        '{"error":"process 1: disk full: /a/file"}',
    ]


@pytest.mark.slow
def test_run_directories_that_are_not_shared_stop_both_processes(tmp_path, port):
    train(tmp_path / "0", mesh_dim="1,4,2", total_steps=1, save_model_freq=1)
    running = start_two((tmp_path / "0", tmp_path / "1"), port, mesh_dim="1,4,1", total_steps=2)
    for output in finish(*running, code=2):
        assert "a checkpoint is False on process 1 and True on process 0" in output and "Traceback" not in output


@pytest.mark.slow
def test_an_error_in_training_does_not_wait_for_other_processes(tmp_path, monkeypatch):
    """The other processes are inside a step and would never answer, so the error would never be printed."""

    def fit(*_, **__):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(coordination, "jax_client", lambda: pytest.fail("waits for the others"))
        raise UserError("the data of this process is gone")

    monkeypatch.setattr(run, "fit", fit)
    monkeypatch.setattr(run, "compile_step", lambda *_: None)
    with pytest.raises(UserError, match="the data of this process is gone"):
        train(tmp_path)


@pytest.mark.slow
def test_a_bad_line_stops_both_processes_with_the_same_error(tmp_path, port):
    lines = (GOLDEN / "dataset.jsonl").read_bytes().splitlines(keepends=True)
    path = tmp_path / "dataset.jsonl"
    path.write_bytes(b"".join([*lines[:2], b'{"tokens": \n', *lines[2:]]))
    running = start_two(tmp_path, port, mesh_dim="1,4,1", train_dataset__json_dataset__path=path)
    for output in finish(*running, code=2):
        (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert re.match(rf"error: (process [01] on \S+: )?{path}:3: not JSON", error) and "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path, port, signalled):
    running = start_two(tmp_path, port, mesh_dim="1,4,1", total_steps=10**6, log_all_worker=True)
    run_dir = tmp_path / "run"
    await_metrics(running, *(run_dir / name for name in LOGS))
    running[signalled].send_signal(signal.SIGTERM)
    first, second = finish(*running, code=75)
    assert "to resume" in first and "--logger.experiment_id=run" in first and "to resume" not in second
    (done,) = {len((run_dir / name).read_text().splitlines()) for name in LOGS}
    assert 0 < done < 10**6 and done == max(metrics(run_dir, "loss")) + 1
    saved = {entry.key: entry.read() for entry in streaming.read_streaming(run_dir / "streaming_train_state")}
    assert int(saved["step",]) == done


LOGS = ("metrics.jsonl", "metrics_1.jsonl")
