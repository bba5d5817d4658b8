"""A file or a service that fails or hangs neither ends nor delays a run, gets its rows later, and is counted."""

import json
import logging
import resource
import shutil
import threading
import time
import types

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from open_files import open_files

from EasyLM import flags
from EasyLM.training import metrics_delivery, metrics_file, metrics_log, metrics_sinks

SECONDS = 30  # the longest wait for a thread


class Sink:
    """Keeps the steps that it gets. `answer` is called for each."""

    def __init__(self, answer=lambda step: None):
        self.steps, self.answer, self.ended = [], answer, []

    def log(self, row):
        self.answer(row["step"])
        self.steps.append(row["step"])

    def close(self):
        self.answer("close")
        self.ended.append("closed")

    def abandon(self):
        self.ended.append("abandoned")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(metrics_delivery, "_FIRST_PAUSE", 0.01)


def close(delivery, seconds=SECONDS):
    delivery.start_closing()
    delivery.finish_closing(time.monotonic() + seconds)


def wait_until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "root"]


def test_what_fails_is_tried_again(caplog):
    """Each outage is logged once, and so is its end. No row is lost or out of order."""
    outages = {2: 3, 5: 1}  # step -> failures

    def answer(step):
        if outages.get(step, 0):
            outages[step] -= 1
            raise ConnectionError("no network")

    delivery = metrics_delivery.Delivery("wandb", sink := Sink(answer))
    for step in range(8):
        delivery.log({"step": step})
    wait_until(lambda: len(sink.steps) >= 8)
    close(delivery)
    assert sink.steps == list(range(8)) and sink.ended == ["closed"]
    failed = "wandb cannot be written; the run continues, and tries again: no network"
    assert messages(caplog) == [failed, "wandb can be written again; no step is missing"] * 2


def test_pauses_between_tries_grow(monkeypatch):
    """Counted in time: an outage of a day does not mean millions of tries."""
    pauses, failures = [], iter([True] * 12 + [False] * 3)

    class Condition(threading.Condition):
        def wait_for(self, predicate, timeout=None):
            if threading.current_thread().name == "metrics to wandb" and timeout is not None:
                pauses.append(timeout)
                timeout = 0
            return super().wait_for(predicate, timeout)

    def answer(step):
        if next(failures):
            raise ConnectionError("no network")

    monkeypatch.setattr(metrics_delivery, "_FIRST_PAUSE", 1.0)
    monkeypatch.setattr(metrics_delivery.threading, "Condition", Condition)
    delivery = metrics_delivery.Delivery("wandb", sink := Sink(answer))
    delivery.log({"step": 0})
    wait_until(lambda: sink.steps)
    close(delivery)
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]


def test_what_never_works_again_is_counted(caplog):
    """The end tries once more, and closes the sink."""

    def answer(step):
        if step in (2, 3, 4):
            raise ConnectionError("no network")

    delivery = metrics_delivery.Delivery("wandb", sink := Sink(answer))
    for step in range(5):
        delivery.log({"step": step})
    close(delivery)
    assert sink.steps == [0, 1] and sink.ended == ["closed"]
    assert messages(caplog)[1:] == ["wandb: 3 logged steps are not written"]


@pytest.mark.parametrize("hangs_at, missing", [(1, "3 logged steps are"), (3, "1 logged step is"), ("close", None)])
def test_what_hangs_delays_neither_steps_nor_the_end(caplog, hangs_at, missing):
    released = threading.Event()
    delivery = metrics_delivery.Delivery(
        "wandb", sink := Sink(lambda step: released.wait(SECONDS) if step == hangs_at else None)
    )
    for step in range(4):
        delivery.log({"step": step})
    wait_until(lambda: len(delivery._waiting) == (0 if hangs_at == "close" else 4 - hangs_at))
    close(delivery, seconds=0.2)
    assert sink.ended == ["abandoned"]
    expected = ["wandb did not close within 30 s; the run ends without it"]
    assert messages(caplog) == expected + [f"wandb: {missing} not written"] * bool(missing)
    released.set()


def test_a_sink_that_hangs_is_reported_and_waited_for_once(caplog):
    released = threading.Event()
    delivery = metrics_delivery.Delivery("metrics.jsonl", sink := Sink(lambda step: released.wait(SECONDS)))
    delivery.log({"step": 0})
    delivery.wait(0.1)
    for step in (1, 2):
        delivery.log({"step": step})
        delivery.wait(2 * SECONDS)
    assert not sink.steps, "a later row waits, too"
    assert messages(caplog) == [
        "metrics.jsonl cannot be written; the run continues, and tries again: no answer for 0.1 s"
    ]
    released.set()
    delivery.log({"step": 3})
    close(delivery)
    assert sink.steps == [0, 1, 2, 3]
    assert messages(caplog)[1:] == ["metrics.jsonl can be written again; no step is missing"]


def test_a_service_that_nobody_waits_for_is_reported(monkeypatch, caplog):
    monkeypatch.setattr(metrics_delivery, "_SILENT_SECONDS", 0)
    released = threading.Event()
    delivery = metrics_delivery.Delivery("wandb", Sink(lambda step: released.wait(SECONDS)))
    for step in range(3):
        delivery.log({"step": step})
        time.sleep(0.01)
    released.set()
    close(delivery)
    assert messages(caplog)[0].endswith("no answer for 0 s") and len(messages(caplog)) == 2


def test_rows_beyond_the_limit_are_dropped_and_counted(monkeypatch, caplog):
    monkeypatch.setattr(metrics_delivery, "_MOST_ROWS", 4)
    released = threading.Event()
    delivery = metrics_delivery.Delivery("wandb", sink := Sink(lambda step: released.wait(SECONDS)))
    for step in range(10):
        delivery.log({"step": step})
    released.set()
    close(delivery)
    assert sink.steps == [0, 1, 2, 3]
    assert messages(caplog) == ["wandb: 6 logged steps are not written"]


def make_sink(name, directory):
    if name == "TensorBoard":
        pytest.importorskip("tensorboardX")
        return metrics_sinks.TensorBoardSink(str(directory / "tensorboard"))
    return metrics_file.JsonLinesSink(str(directory / "metrics.jsonl"))


def written_steps(name, directory) -> list[int]:
    if name == "metrics.jsonl":
        return [json.loads(line)["step"] for line in (directory / name).read_text().splitlines()]
    from tensorboardX.proto.event_pb2 import Event

    steps = []
    for path in sorted((directory / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while len(data) >= 12 and len(data) >= 16 + (size := int.from_bytes(data[:8], "little")):
            event = Event.FromString(data[12 : 12 + size])
            steps += [event.step] * event.HasField("summary")
            data = data[16 + size :]
    return steps


def test_metrics_after_a_deletion_of_the_run_are_in_a_new_file(tmp_path):
    sink = metrics_file.JsonLinesSink(str(tmp_path / "run" / "metrics.jsonl"))
    sink.log({"step": 0})
    shutil.rmtree(tmp_path / "run")
    sink.log({"step": 1})
    sink.log({"step": 2})
    sink.close()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("name", ["metrics.jsonl", pytest.param("TensorBoard", marks=pytest.mark.slow)])
def test_a_disk_that_was_full_for_a_while(tmp_path, monkeypatch, caplog, name):
    """A limit of the operating system on the size of files takes a part of a row, and refuses the rest."""
    monkeypatch.setattr(metrics_sinks, "FLUSH_SECONDS", -1)
    delivery = metrics_delivery.Delivery(name, make_sink(name, tmp_path))
    row = {"loss": 2.5, "text": "x" * 100}
    delivery.log({"step": 0, **row})
    delivery.wait(SECONDS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
    try:
        for step in (1, 2):
            delivery.log({"step": step, **row})
            delivery.wait(SECONDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    delivery.log({"step": 3, **row})
    close(delivery)
    steps = written_steps(name, tmp_path)  # TensorBoard takes a repeated step
    assert sorted(set(steps)) == [0, 1, 2, 3] and (name == "TensorBoard" or len(steps) == 4)
    assert len(messages(caplog)) == 2 and "File too large" in messages(caplog)[0]
    assert messages(caplog)[1] == f"{name} can be written again; no step is missing"


def test_events_that_were_not_flushed_are_repeated_after_a_failure(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    sink = make_sink("TensorBoard", tmp_path)
    sink.log({"step": 0, "loss": 1.0})
    monkeypatch.setattr(sink._writer, "write_event", lambda event: int("broken"))
    with pytest.raises(ValueError):
        sink.log({"step": 1, "loss": 1.0})
    assert not open_files(tmp_path)
    sink.log({"step": 1, "loss": 1.0})
    sink.close()
    assert sorted(set(written_steps("TensorBoard", tmp_path))) == [0, 1]


def test_an_object_store_that_fails_for_a_while(monkeypatch, caplog, tmp_path):
    """No row is lost between two uploads. What the last upload would have saved is counted."""
    path = f"memory:/{tmp_path}/metrics.jsonl"
    monkeypatch.setattr(metrics_file, "FLUSH_SECONDS", -1)
    delivery = metrics_delivery.Delivery(path, metrics_file.RemoteJsonLinesSink(path))

    def fail(*arguments, **options):
        raise ConnectionResetError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "pipe_file", fail)
        for step in range(3):
            delivery.log({"step": step})
            delivery.wait(SECONDS)
    delivery.log({"step": 3})
    wait_until(lambda: len(messages(caplog)) == 2 and not delivery._waiting)
    assert [json.loads(line)["step"] for line in MemoryFileSystem().cat_file(path).splitlines()] == [0, 1, 2, 3]
    monkeypatch.setattr(metrics_file, "FLUSH_SECONDS", 1e9)
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", fail)
    delivery.log({"step": 4})
    close(delivery)
    assert "did not close: the last 1 logged step is not written: " in messages(caplog)[-1]


def test_a_run_waits_for_its_own_file_alone(tmp_path, monkeypatch):
    """The row is on disk when `log` returns: a run that is killed after the next save does not repeat the step."""
    released = threading.Event()
    monkeypatch.setattr(
        metrics_log, "WandbSink", lambda *_: types.SimpleNamespace(log=lambda row: released.wait(SECONDS), close=int)
    )
    logger = metrics_log.Logger(flags.defaults(metrics_log.LOGGER_FLAGS), str(tmp_path), {})
    for step in range(50):
        logger.log({"step": step})
        assert written_steps("metrics.jsonl", tmp_path)[-1] == step
    released.set()
    logger.close()
