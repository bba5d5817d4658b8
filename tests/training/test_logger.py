"""Metrics: `metrics.jsonl` after a kill, calls of wandb and TensorBoard, and services that fail."""

import json
import os
import subprocess
import sys
import time
import types

import jax
import pytest
import wandb
from fsspec.implementations.memory import MemoryFileSystem
from open_files import open_files

from EasyLM import flags
from EasyLM.errors import UserError
from EasyLM.training import metrics_delivery, metrics_log, metrics_sinks

SETTINGS = {"seed": 42}


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each `wandb.init`, and the bounds of each random delay."""
    seen = types.SimpleNamespace(inits=[], rows=[], delays=[])

    def init(**arguments):
        seen.inits.append(arguments)
        return types.SimpleNamespace(log=seen.rows.append, finish=lambda: seen.rows.append("finished"))

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(metrics_sinks, "random", types.SimpleNamespace(uniform=lambda *bounds: bounds))
    monkeypatch.setattr(metrics_sinks, "time", types.SimpleNamespace(sleep=seen.delays.append))
    monkeypatch.delenv("WANDB_MODE")
    return seen


def log(run_dir, *rows, all_processes=False, **values):
    config = flags.defaults(metrics_log.LOGGER_FLAGS)
    config.update(values)
    logger = metrics_log.Logger(config, str(run_dir), SETTINGS, all_processes)
    for row in rows:
        logger.log(row)
    logger.close()


DEFAULT = {
    "mode": "offline",
    "project": "lvm",
    "name": "a",
    "resume": "allow",
    "config": SETTINGS,
    "notes": None,
    "entity": None,
}


@pytest.mark.parametrize(
    "given, passed",
    [
        ({}, {}),
        ({"online": True}, {"mode": "online"}),
        ({"project": "video"}, {"project": "video"}),
        ({"project": "video", "prefix": "p"}, {"project": "p--video"}),
        ({"notes": "a try", "entity": "team"}, {"notes": "a try", "entity": "team"}),
        ({"anonymous": "must"}, {"anonymous": "must"}),
    ],
)
def test_flags_reach_wandb(tmp_path, calls, given, passed):
    log(tmp_path / "a", {"step": 0, "loss": float("nan")}, **given)
    (arguments,) = calls.inits
    assert arguments.pop("settings").silent is True
    assert (
        arguments == DEFAULT | {"dir": str(tmp_path / "a"), "id": metrics_sinks.wandb_id(str(tmp_path / "a"))} | passed
    )
    assert calls.rows == [{"step": 0, "loss": None}, "finished"] and calls.delays == []


def test_the_wandb_id_is_that_of_the_whole_path(tmp_path, monkeypatch):
    """And wandb accepts it whatever the name."""
    first, second = (metrics_sinks.wandb_id(str(tmp_path / experiment / "run")) for experiment in ("exp1", "exp2"))
    assert first != second and first.startswith("run-")
    monkeypatch.chdir(tmp_path)
    assert metrics_sinks.wandb_id("exp1/run") == metrics_sinks.wandb_id("./exp2/../exp1/run/") == first
    assert metrics_sinks.wandb_id("gs://bucket/a/run") != metrics_sinks.wandb_id("gs://bucket/b/run")
    for name in ("a:b", "a b?", "#'x;,", "ü" * 300, " "):
        wandb.Settings(run_id=metrics_sinks.wandb_id(str(tmp_path / name)) + "-17")


@pytest.mark.parametrize("project", ["a/b", "a:b", "50%", "", "x" * 129])
def test_a_project_that_wandb_refuses_is_found_with_the_flags(project):
    config = flags.defaults(metrics_log.LOGGER_FLAGS)
    config.project = project
    with pytest.raises(UserError, match=r"--logger\.project=.*: the wandb project .* must have 1 to 128 characters"):
        metrics_log.check_settings(config)
    config.wandb = False
    metrics_log.check_settings(config)


def test_a_project_that_is_accepted_is_accepted_by_wandb():
    config = flags.defaults(metrics_log.LOGGER_FLAGS)
    for config.prefix, config.project in (("", "x" * 128), ("p q", "ü,;'")):
        metrics_log.check_settings(config)
        wandb.Settings(project=metrics_sinks.wandb_project(config))


def test_wandb_mode_takes_precedence(tmp_path, calls, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log(tmp_path / "a", online=True)
    assert calls.inits[0]["mode"] == "disabled"


def test_wandb_dir_and_random_delay(tmp_path, calls):
    log(tmp_path / "a", wandb_dir=str(tmp_path / "w" / "b"), random_delay=5.0)
    assert calls.inits[0]["dir"] == str(tmp_path / "w" / "b") and (tmp_path / "w" / "b").is_dir()
    assert calls.delays == [(0, 5.0)]


@pytest.mark.parametrize("all_processes", [True, False])
def test_processes_above_0_log_on_request_under_their_own_names(tmp_path, calls, monkeypatch, all_processes):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log(tmp_path / "a", {"step": 0}, all_processes=all_processes)
    expected = (metrics_sinks.wandb_id(str(tmp_path / "a")) + "-1", "a-1")
    assert [(call["id"], call["name"]) for call in calls.inits] == [expected] * all_processes
    assert [path.name for path in tmp_path.rglob("*.jsonl")] == ["metrics_1.jsonl"] * all_processes


def test_wandb_that_does_not_start_is_an_error(tmp_path, calls, monkeypatch):
    def init(**_):
        raise wandb.Error("no API key")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(
        UserError, match=rf"--logger.wandb_dir={tmp_path}/a: wandb did not start \(no API key\)"
    ) as error:
        log(tmp_path / "a", online=True)
    assert error.tb and not open_files(tmp_path / "a")  # the traceback holds the logger


@pytest.mark.parametrize(
    "content, kept",
    [
        (None, ""),
        ("", ""),
        ('{"step": 0}\n', '{"step": 0}\n'),
        ('{"step": 0}\n{"step": 1, "lo', '{"step": 0}\n'),
        ('{"step": 0}\n{"step": 1, "\udcff', '{"step": 0}\n'),
        ('{"step": 0}', '{"step": 0}\n'),  # complete except for the newline
    ],
)
def test_a_truncated_last_line_is_removed(tmp_path, calls, content, kept):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content, errors="surrogateescape")
    log(tmp_path, {"step": 1}, {"step": 2})
    assert path.read_text() == kept + '{"step": 1}\n{"step": 2}\n'


def test_wandb_false_does_not_import_wandb(tmp_path):
    program = f"""
import sys
sys.modules["wandb"] = None  # an import raises ImportError
from EasyLM import flags
from EasyLM.training import metrics_log
config = flags.defaults(metrics_log.LOGGER_FLAGS)
config.wandb = False
logger = metrics_log.Logger(config, {str(tmp_path)!r}, {{}})
logger.log({{"step": 0}})
logger.close()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n'


def test_wandb_is_needed_only_online(tmp_path, monkeypatch, caplog):
    for module in (metrics_log, metrics_sinks):
        monkeypatch.setattr(module, "wandb_is_installed", lambda: False)
    log(tmp_path, {"step": 0})
    assert "wandb is not installed" in caplog.text
    with pytest.raises(UserError, match=r"--logger\.online=True needs the package wandb: pip install wandb"):
        log(tmp_path, {"step": 0}, online=True)


def test_a_service_that_fails_does_not_end_the_run(tmp_path, calls, monkeypatch, caplog):
    def fail(*_):
        raise ConnectionError("no network")

    monkeypatch.setattr(wandb, "init", lambda **_: types.SimpleNamespace(log=fail, finish=fail))
    log(tmp_path, {"step": 0}, {"step": 1})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert caplog.text.count("wandb cannot be written; the run continues, and tries again: no network") == 1
    assert caplog.text.count("wandb: 2 logged steps are not written") == 1


def test_wandb_is_started_again_after_a_failure(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(metrics_delivery, "_FIRST_PAUSE", 0.01)
    init, rows = wandb.init, []

    def fail(*_):
        raise ConnectionResetError("Connection lost")

    def init_after_failures(**arguments):
        run = init(**arguments)
        run.log = fail if len(calls.inits) == 1 else run.log
        if len(calls.inits) == 2:
            raise wandb.Error("no answer")
        return run

    monkeypatch.setattr(wandb, "init", init_after_failures)
    monkeypatch.setattr(wandb, "teardown", lambda: rows.append("ended") or fail())
    config = flags.defaults(metrics_log.LOGGER_FLAGS)
    logger = metrics_log.Logger(config, str(tmp_path), SETTINGS)
    monkeypatch.setenv("WANDB_SERVICE", "the address of a dead process")
    logger.log({"step": 0})
    deadline = time.monotonic() + 30
    while not calls.rows and time.monotonic() < deadline:
        time.sleep(0.001)
    logger.close()
    assert calls.rows == [{"step": 0}, "finished"] and rows == ["ended"]
    assert len(calls.inits) == 3 and len({call["id"] for call in calls.inits}) == 1
    assert "WANDB_SERVICE" not in os.environ


@pytest.mark.parametrize(
    "error, words",
    [
        (ConnectionError("no network"), "no network"),
        (TimeoutError("20 s are over"), "20 s are over; `wandb sync` uploads the rest from {}/wandb"),
    ],
)
def test_a_service_that_does_not_close_does_not_end_the_run(tmp_path, calls, monkeypatch, caplog, error, words):
    def fail():
        raise error

    monkeypatch.setattr(wandb, "init", lambda **_: types.SimpleNamespace(log=lambda row: None, finish=fail))
    log(tmp_path, {"step": 0})
    assert f"wandb did not close: {words.format(tmp_path)}" in caplog.text


def test_tensorboard_without_its_package_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--logger.tensorboard=True needs the package tensorboardX: pip .*tensorboard"):
        log(tmp_path, wandb=False, tensorboard=True)


def test_tensorboard_gets_each_finite_number(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    rows = [{"step": 3, "loss": 2.5, "lr": float("nan"), "device": "cpu"}, {"step": 4, "loss": 2.25, "epoch": 1}]
    log(tmp_path, *rows, wandb=False, tensorboard=True)
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, scalars = path.read_bytes(), []
    while data:  # of each record: the length, its checksum, the event, its checksum
        end = 12 + int.from_bytes(data[:8], "little")
        event, data = Event.FromString(data[12:end]), data[end + 4 :]
        scalars += [(value.tag, value.simple_value, event.step) for value in event.summary.value]
    assert scalars == [("loss", 2.5, 3), ("loss", 2.25, 4), ("epoch", 1, 4)]


def test_an_outage_at_the_start_does_not_erase_remote_metrics(tmp_path, calls, monkeypatch):
    """fsspec's `exists` calls a file missing if its store does not answer."""
    run_dir = f"memory:/{tmp_path}"
    path = f"{run_dir}/metrics.jsonl"
    monkeypatch.setattr(metrics_sinks, "time", time)
    log(run_dir, {"step": 1}, wandb=False)

    def fail(*arguments, **options):
        raise ConnectionResetError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "exists", lambda *arguments: False)
        patch.setattr(MemoryFileSystem, "cat_file", fail)
        with pytest.raises(UserError, match=rf"^{path}: not reachable \(ConnectionResetError"):
            log(run_dir, {"step": 2}, wandb=False)
    log(run_dir, {"step": 3}, wandb=False)
    lines = MemoryFileSystem().cat_file(path).splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]
