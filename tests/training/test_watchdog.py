"""The watchdog: it reports long waits, and ends a run whose step, checkpoint or evaluation does not finish."""

import subprocess
import sys
import time

import jax
import pytest
from tiny_run import TINY, train

from EasyLM import checkpoints
from EasyLM.training import run, watchdog
from EasyLM.training.watchdog import Watchdog

HANGING = """
import time
from EasyLM.training.watchdog import Watchdog
def hang():
    time.sleep(60)
with Watchdog(0.01) as watchdog:
    watchdog.expect("step 3")
    hang()
"""


def test_a_wait_beyond_the_limit_ends_the_process_with_its_stacks():
    completed = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=60, check=False)
    assert completed.returncode == watchdog.HANGS == 70
    lines = completed.stderr.strip().splitlines()
    assert lines[0].startswith("error: --watchdog_minutes=0.01: step 3 has not finished within this time")
    assert "in hang" in completed.stderr


def test_it_ends_the_process_where_the_error_stream_is_no_file():
    """As in a notebook, whose `sys.stderr` has no file descriptor."""
    program = f"import io, sys\nsys.stderr = io.StringIO()\n{HANGING}"
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert completed.returncode == watchdog.HANGS
    assert "in hang" in completed.stderr and "in _watch" in completed.stderr


@pytest.fixture
def ended(monkeypatch):
    """The errors with which the watchdog would have ended the process."""
    seen = []
    monkeypatch.setattr(watchdog, "end_together", lambda error, code: seen.append(error))
    return seen


@pytest.mark.slow
def test_progress_restarts_the_time(ended):
    with Watchdog(0.03) as running:  # 1.8 s
        for step in range(4):
            running.expect(f"step {step}")
            time.sleep(0.9)
    assert not ended
    with Watchdog(0) as running:
        running.expect("step 0")
        time.sleep(1.5)
    assert not ended


@pytest.mark.slow
def test_a_long_wait_is_logged_again_and_again(monkeypatch, caplog):
    monkeypatch.setattr(watchdog, "REPORT_SECONDS", 0.3)
    with Watchdog(1) as running:
        running.expect("the data of step 7")
        deadline = time.monotonic() + 30
        while caplog.text.count("waiting for the data of step 7 since") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.slow
def test_a_thread_that_blocks_python_is_noticed_by_a_native_thread():
    program = """
import ctypes, sys
from EasyLM.training import watchdog
watchdog._BACKSTOP_SECONDS = 1
with watchdog.Watchdog(0.05):
    import time; time.sleep(1.5)
    ctypes.PyDLL(None).sleep(60)  # keeps the lock of the interpreter
"""
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert completed.returncode == 1 and "Timeout" in completed.stderr and 'File "<string>", line 7' in completed.stderr


@pytest.mark.slow
@pytest.mark.parametrize("part", ["data", "evaluation", "checkpoint"])
def test_each_part_of_the_loop_is_watched(tmp_path, monkeypatch, ended, part):
    def slowly(function):
        def slow(*arguments, **options):
            time.sleep(3)
            return function(*arguments, **options)

        return slow

    if part == "data":
        monkeypatch.setattr(run.Batches, "__next__", slowly(run.Batches.__next__))
    elif part == "checkpoint":
        monkeypatch.setattr(checkpoints.Checkpointer, "save", slowly(checkpoints.Checkpointer.save))
    else:
        monkeypatch.setattr(run.jax, "device_get", slowly(jax.device_get))
    settings = {name.replace("train", "eval"): value for name, value in TINY.items() if "train_dataset" in name}
    settings |= {"eval_steps": int(part == "evaluation")}
    train(tmp_path, total_steps=1, save_model_freq=1, watchdog_minutes=0.03, **settings)
    expected = {
        "data": "the data of step 0",
        "evaluation": "the evaluation",
        "checkpoint": "the checkpoint after 1 steps",
    }[part]
    assert any(f"--watchdog_minutes=0.03: {expected} has" in error for error in ended)


def test_a_long_compilation_is_reported_and_not_ended(monkeypatch, caplog, ended):
    monkeypatch.setattr(watchdog, "REPORT_SECONDS", 0.2)
    with watchdog.reported("the compilation"):
        deadline = time.monotonic() + 30
        while "waiting for the compilation since" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert not ended
