"""A stop signal with a notice: the state is saved if the time suffices, else the newest checkpoint remains."""

import signal
import threading
import types

import numpy as np
import pytest
from checkpoint_kit import make_checkpointer, save, small_state
from tiny_run import await_metrics, finish, start

from EasyLM import checkpoints
from EasyLM.training import preemption
from EasyLM.training.preemption import PreemptionNotice


@pytest.mark.parametrize(
    ("notice", "since_signal", "expected"),
    [(0, 1e6, True), (30, None, True), (30, 9.9, True), (30, 10.1, False), (15, None, True), (15, 0.0, False)],
)
def test_a_save_of_20_seconds_is_started_if_it_fits(monkeypatch, caplog, notice, since_signal, expected):
    monkeypatch.setattr(preemption, "seconds_since_signal", lambda: since_signal)
    checkpointer = types.SimpleNamespace(seconds_to_save=lambda state: 20.0)
    assert PreemptionNotice(notice, checkpointer).leaves_time_to_save(None) == expected
    assert ("a save takes about 20 s" in caplog.text) == (not expected)


@pytest.mark.parametrize("others", [True, False])
def test_one_process_without_time_decides_for_all(monkeypatch, others):
    monkeypatch.setattr(preemption, "seconds_since_signal", lambda: 0.0)
    monkeypatch.setattr(preemption, "from_all_processes", lambda own: [own, others])
    checkpointer = types.SimpleNamespace(seconds_to_save=lambda state: 20.0)
    assert PreemptionNotice(30, checkpointer).leaves_time_to_save(None) == others


def test_the_last_save_says_how_long_the_next_one_takes(tmp_path, monkeypatch):
    """Before the first save, the estimate of the planner does."""
    saver, state = make_checkpointer(tmp_path), small_state(1)
    num_bytes = 2 * (2 * 3 * 4 + 5) * 4 + 4
    assert saver.seconds_to_save(state) == pytest.approx(checkpoints.save_seconds(num_bytes, num_bytes))
    assert checkpoints.save_seconds(3 * 10**9, 10**10) == pytest.approx(2 + 3)
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr("EasyLM.checkpoints.saving.time.monotonic", lambda: clock.now)
    written, may_end = threading.Event(), threading.Event()
    commit = saver._directory.commit

    def slow_commit(*arguments):
        written.set()
        may_end.wait()
        clock.now += 8
        commit(*arguments)

    monkeypatch.setattr(saver._directory, "commit", slow_commit)
    may_end.set()
    save(saver, 1)
    assert saver.seconds_to_save(state) == 8
    written.clear(), may_end.clear()
    saver.save(small_state(2), 2, {}, {"step": 2})
    written.wait()
    clock.now += 3
    seconds = saver.seconds_to_save(state)
    may_end.set()
    saver.wait()
    assert seconds == 5 + 8  # the rest of this save, and the next one
    assert np.all(checkpoints.load(f"trainstate::{tmp_path}/streaming_train_state", state).step == 2)


@pytest.mark.slow
def test_without_time_to_save_the_newest_checkpoint_stands(tmp_path):
    # Between saves: a signal during a save would stop the run after a step that is saved.
    settings = {"total_steps": 10**6, "mesh_dim": "1,1,1", "save_model_freq": 300, "preemption_notice_seconds": 1e-3}
    process = start(tmp_path, devices=1, **settings)
    await_metrics([process], tmp_path / "run" / "latest" / "metadata.json")
    process.send_signal(signal.SIGTERM)
    output = finish(process, code=75)
    newest = checkpoints.latest_checkpoint(str(tmp_path / "run"))
    assert newest.step % 300 == 0
    assert "no checkpoint of this step: a save takes about " in output
    assert f"is not saved; the newest is checkpoints/step_{newest.step:08d}" in output
