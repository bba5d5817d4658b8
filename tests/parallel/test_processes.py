"""Processes of a run that wait for each other: however long it takes, to the same error, to the same last step."""

import signal

import jax
import pytest
from tiny_run import GOLDEN, await_figures, finish, metrics, start_two, train

from EasyLM.checkpoints import saving, streaming
from EasyLM.errors import UserError
from EasyLM.parallel import coordination
from EasyLM.training import run


class Service:
    """A coordination service of which each look for a key that is not there yet lasts no time."""

    def __init__(self, told: dict[str, str]):
        self.told, self.looks, self.late = told, 0, 3

    def key_value_set(self, key, value):
        assert self.told.setdefault(key, value) is value, f"{key} is not new"

    def blocking_key_value_get(self, key, timeout_ms):
        self.looks += 1
        if self.looks <= self.late:
            raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {key} after {timeout_ms}ms")
        if key not in self.told:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses\n\nfurther facts")
        return self.told[key]


def key(call, process):
    return f"EasyLM/first_process_first/{call}/{process}"


@pytest.fixture
def second_of_two(monkeypatch):
    """Makes this process the second of two; returns what gives it a service that knows these keys."""

    def with_service(told):
        service = Service({key(call, process): text for (call, process), text in told.items()})
        monkeypatch.setattr(coordination.distributed.global_state, "client", service)
        return service

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(coordination, "_calls", iter(range(10)))
    return with_service


def test_one_waits_for_the_first_as_long_as_it_takes(second_of_two):
    service = second_of_two({(0, 0): "done", (1, 0): "done"})
    assert coordination.first_process_first(lambda: service.looks) == service.late + 1, "not made before it was told to"
    assert coordination.first_process_first(lambda: "again") == "again"
    assert service.told[key(0, 1)] == service.told[key(1, 1)] == "done"


@pytest.mark.parametrize(
    "told, error", [({(0, 0): "a.jsonl:3: no"}, "^a.jsonl:3: no$"), ({}, "^process 0 is gone: U.*s$")]
)
def test_one_stops_where_the_first_did(second_of_two, told, error):
    second_of_two(told)
    with pytest.raises(UserError, match=error):
        coordination.first_process_first(lambda: pytest.fail("made without the first"))


@pytest.mark.parametrize(
    "error, said", [(UserError("a:3: no"), "a:3: no"), (KeyError("x"), "process 1 stopped: KeyError: 'x'")]
)
def test_an_error_is_told_to_the_others(second_of_two, error, said):
    service = second_of_two({(0, 0): "done"})

    def fail():
        raise error

    with pytest.raises(type(error)):
        coordination.first_process_first(fail)
    assert service.told[key(0, 1)] == said


def test_processes_that_do_not_begin_alike_stop(second_of_two):
    """As where each has a run directory on a disk of its own, and only the first finds the checkpoint."""
    second_of_two({(0, 0): "done", (1, 0): "done", (2, 0): "done"})
    service = coordination.distributed.global_state.client
    service.told["EasyLM/check_same/0"] = service.told["EasyLM/check_same/2"] = '{"its step": 20, "its row": 80}'
    service.told[key(3, 0)] = "done"
    coordination.check_same({"its step": 20, "its row": 80})
    with pytest.raises(UserError, match="its step is 0 on process 1 and 20 on process 0; all need the same run dir"):
        coordination.check_same({"its step": 0, "its row": 0})
    assert service.told[key(3, 1)].startswith("the processes do not begin alike")


@pytest.mark.slow
def test_a_run_directory_that_only_one_process_sees_stops_both(tmp_path, port):
    train(tmp_path / "0", mesh_dim="1,4,2", total_steps=1, save_model_freq=1)
    running = start_two((tmp_path / "0", tmp_path / "1"), port, mesh_dim="1,4,1", total_steps=2)
    for said in finish(*running, code=2):
        assert "a checkpoint is False on process 1 and True on process 0" in said and "Traceback" not in said


def test_an_error_of_one_process_while_it_trains_asks_no_other(tmp_path, monkeypatch):
    """The others are in the middle of a step: they would never answer, and the error would never be seen."""

    def fit(*_, **__):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(saving.multihost_utils, "broadcast_one_to_all", lambda _: pytest.fail("it asks"))
        raise UserError("the data of this process is gone")

    monkeypatch.setattr(run, "fit", fit)
    monkeypatch.setattr(run, "_compiled_step", lambda *_: None)
    with pytest.raises(UserError, match="the data of this process is gone"):
        train(tmp_path)


@pytest.mark.slow
def test_a_bad_line_ends_both_processes_with_the_same_words(tmp_path, port):
    lines = (GOLDEN / "dataset.jsonl").read_bytes().splitlines(keepends=True)
    path = tmp_path / "dataset.jsonl"
    path.write_bytes(b"".join([*lines[:2], b'{"tokens": \n', *lines[2:]]))
    running = start_two(tmp_path, port, mesh_dim="1,4,1", train_dataset__json_dataset__path=path)
    for said in finish(*running, code=2):
        (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert error.startswith(f"error: {path}:3: not JSON") and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path, port, asked):
    running = start_two(tmp_path, port, mesh_dim="1,4,1", total_steps=10**6, log_all_worker=True)
    run_dir = tmp_path / "run"
    await_figures(running, *(run_dir / name for name in LOGS))
    running[asked].send_signal(signal.SIGTERM)
    first, second = finish(*running)
    assert "to resume" in first and "--logger.experiment_id=run" in first and "to resume" not in second
    (done,) = {len((run_dir / name).read_text().splitlines()) for name in LOGS}
    assert 0 < done < 10**6 and done == max(metrics(run_dir, "loss")) + 1
    saved = {entry.key: entry.read() for entry in streaming.read_streaming(run_dir / "streaming_train_state")}
    assert int(saved["step",]) == done


LOGS = ("metrics.jsonl", "metrics_1.jsonl")
