"""Goodput: shares of the time of a run by activity, over all its starts, on a simulated clock."""

import json
import time
import types

import pytest
from tiny_run import train

from EasyLM.training import goodput
from EasyLM.training.goodput import BADPUT, Goodput

ZERO = {"step": 0.0, "data": 0.0, "save": 0.0, "eval": 0.0}


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(goodput, "time", types.SimpleNamespace(time=lambda: clock.now))
    return clock


def start(clock, path, first_step: int, last_step: int, seconds_per_step=10.0, log_freq=1) -> dict[str, float]:
    """A start of a run: loads for 5 s, compiles for 15 s, then runs and logs steps. Returns the seconds by activity."""
    begin = clock.now
    clock.now += 5
    current, loop = Goodput(str(path), first_step, begin), dict(ZERO)
    with current.compiling():
        clock.now += 15
    for step in range(first_step, last_step + 1):
        clock.now += seconds_per_step
        loop["step"] += seconds_per_step
        if step % log_freq == 0:
            row = {"step": step, **current.metrics(loop)}
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
    assert row["time"] <= clock.now
    return seconds_of(row)


def seconds_of(row: dict[str, float]) -> dict[str, float]:
    shares = {name: row[f"badput_{name}"] for name in BADPUT} | {"step": row["goodput"]}
    assert sum(shares.values()) == pytest.approx(1)
    return {name: pytest.approx(share * row["run_seconds"], abs=1e-6) for name, share in shares.items() if share}


def test_one_start(clock, tmp_path):
    current = Goodput(str(tmp_path / "metrics.jsonl"), first_step=0, begin=clock.now)
    clock.now += 4
    with current.compiling():
        clock.now += 6
    clock.now += 30
    row = current.metrics({"step": 21.0, "data": 2.0, "save": 3.0, "eval": 4.0})
    assert (row["time"], row["run_seconds"], row["goodput"]) == (1040, 40, 21 / 40)
    assert seconds_of(row) == {"start": 4, "compile": 6, "step": 21, "data": 2, "save": 3, "eval": 4}


def test_steps_that_are_run_again_do_not_count(clock, tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert start(clock, path, 0, 9) == {"start": 5, "compile": 15, "step": 100}
    clock.now += 300
    # The checkpoint had 6 steps, so 4 of the first start are lost.
    assert start(clock, path, 6, 7) == {"start": 10, "compile": 30, "step": 80, "repeated": 40, "down": 300}
    clock.now += 50
    # An older milestone: two more steps of the first start are lost, and both of the second one.
    assert start(clock, path, 4, 4) == {"start": 15, "compile": 45, "step": 50, "repeated": 80, "down": 350}


def test_repeated_steps_are_counted_once(clock, tmp_path):
    path = tmp_path / "metrics.jsonl"
    start(clock, path, 0, 9, log_freq=3)
    start(clock, path, 6, 7, seconds_per_step=100.0, log_freq=3)  # the steps 6 to 9 of the first start are lost
    expected = {"start": 15, "compile": 45, "step": 60 + 100 + 10, "repeated": 40, "down": 100}  # step 7 is not logged
    assert start(clock, path, 8, 8, log_freq=8) == expected


def test_a_start_that_ends_before_its_first_step_is_time_without_steps(clock, tmp_path):
    path = tmp_path / "metrics.jsonl"
    start(clock, path, 0, 3)
    clock.now += 20
    Goodput(str(path), 4, clock.now)
    clock.now += 30
    assert start(clock, path, 4, 4) == {"start": 10, "compile": 30, "step": 50, "down": 50}


def test_steps_between_logged_ones_are_interpolated(clock, tmp_path):
    path = tmp_path / "metrics.jsonl"
    start(clock, path, 0, 40, log_freq=20)  # logs the steps 0, 20 and 40
    assert start(clock, path, 31, 40, log_freq=40)["repeated"] == 100  # the steps 31 to 40
    path.unlink()
    start(clock, path, 0, 4, log_freq=4)
    assert start(clock, path, 0, 0)["repeated"] == 50  # all


@pytest.mark.parametrize("line", ['{"step": 3, "loss": 1.5}', '{"step": 3, "goodp', "[3]", '{"step": null}', "\udcff"])
def test_rows_without_these_numbers_are_passed_over(clock, tmp_path, line):
    """Rows of older versions, and one that a kill has truncated."""
    path = tmp_path / "metrics.jsonl"
    start(clock, path, 0, 1)
    path.write_bytes(line.encode("utf-8", "surrogateescape") + b"\n" + path.read_bytes())
    assert start(clock, path, 2, 2)["step"] == 30


def test_clocks_of_two_hosts_may_differ(clock, tmp_path):
    path = tmp_path / "metrics.jsonl"
    start(clock, path, 0, 1)
    clock.now -= 25
    assert "down" not in start(clock, path, 2, 2)


@pytest.mark.slow
def test_a_run_that_continues_adds_to_the_time_of_its_first_start(tmp_path):
    begin = time.time()
    for total_steps in (2, 4):
        run_dir = train(tmp_path, total_steps=total_steps, save_model_freq=1)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        seconds = seconds_of(row)
        assert {"step", "compile", "start"} <= seconds.keys() and "repeated" not in seconds
        assert ("down" in seconds) == (row["step"] >= 2)  # the last checkpoint of the first start, among others
    assert 0 < rows[0]["run_seconds"] < rows[1]["run_seconds"] < rows[3]["run_seconds"] < time.time() - begin
    assert rows[3]["badput_save"] > 0
