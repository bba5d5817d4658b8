"""What reaches wandb, and what a killed run's `metrics.jsonl` goes on as."""

import types

import jax
import pytest
import wandb

from EasyLM import flags
from EasyLM.errors import UserError
from EasyLM.training import metrics_log

SETTINGS = {"seed": 42}


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each `wandb.init`, and the bounds of each random delay."""
    seen = types.SimpleNamespace(inits=[], rows=[], delays=[])

    def init(**arguments):
        seen.inits.append(arguments)
        return types.SimpleNamespace(log=seen.rows.append, finish=lambda: seen.rows.append("finished"))

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(metrics_log, "random", types.SimpleNamespace(uniform=lambda *bounds: bounds))
    monkeypatch.setattr(metrics_log, "time", types.SimpleNamespace(sleep=seen.delays.append))
    monkeypatch.delenv("WANDB_MODE")
    return seen


def log(run_dir, *figures, all_processes=False, **values):
    config = flags.defaults(metrics_log.LOGGER_FLAGS)
    config.update(values)
    figures_log = metrics_log.Logger(config, str(run_dir), SETTINGS, all_processes)
    for row in figures:
        figures_log.log(row)
    figures_log.close()


DEFAULT = {
    "mode": "offline",
    "project": "lvm",
    "id": "a",
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
    assert arguments == DEFAULT | {"dir": str(tmp_path / "a")} | passed
    assert calls.rows == [{"step": 0, "loss": None}, "finished"] and calls.delays == []


def test_the_environment_has_the_last_word(tmp_path, calls, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log(tmp_path / "a", online=True)
    assert calls.inits[0]["mode"] == "disabled"


def test_wandb_writes_where_it_is_told_and_starts_late(tmp_path, calls):
    log(tmp_path / "a", wandb_dir=str(tmp_path / "w" / "b"), random_delay=5.0)
    assert calls.inits[0]["dir"] == str(tmp_path / "w" / "b") and (tmp_path / "w" / "b").is_dir()
    assert calls.delays == [(0, 5.0)]


@pytest.mark.parametrize("all_processes", [True, False])
def test_another_process_writes_on_request_under_a_name_of_its_own(tmp_path, calls, monkeypatch, all_processes):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log(tmp_path / "a", {"step": 0}, all_processes=all_processes)
    assert [(call["id"], call["name"]) for call in calls.inits] == [("a-1", "a-1")] * all_processes
    assert [path.name for path in tmp_path.rglob("*.jsonl")] == ["metrics_1.jsonl"] * all_processes


def test_wandb_that_does_not_start_says_so(tmp_path, calls, monkeypatch):
    def init(**_):
        raise wandb.Error("no API key")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match=rf"--logger.wandb_dir={tmp_path}/a: wandb did not start \(no API key\)"):
        log(tmp_path / "a", online=True)


@pytest.mark.parametrize(
    "found, kept",
    [
        (None, ""),
        ("", ""),
        ('{"step": 0}\n', '{"step": 0}\n'),
        ('{"step": 0}\n{"step": 1, "lo', '{"step": 0}\n{"step": 1, "lo\n'),
        ('{"step": 0}', '{"step": 0}\n'),  # all of it, but for the line's end
    ],
)
def test_what_follows_half_a_line_is_on_one_of_its_own(tmp_path, calls, found, kept):
    path = tmp_path / "metrics.jsonl"
    if found is not None:
        path.write_text(found)
    log(tmp_path, {"step": 1}, {"step": 2})
    assert path.read_text() == kept + '{"step": 1}\n{"step": 2}\n'
