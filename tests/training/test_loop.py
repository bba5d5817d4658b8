"""The training loop: throughput metrics (on a simulated clock), the end of training, non-finite losses, signals."""

import contextlib
import dataclasses
import io
import json
import signal
import sys
import types

import jax
import numpy as np
import pytest
from tiny_run import train

from EasyLM.errors import UserError
from EasyLM.models.llama.costs import flops_per_token
from EasyLM.models.llama.llama_config import PRESETS
from EasyLM.training import loop, run, throughput
from EasyLM.training.stop_signal import STOP_SIGNALS, StopVote

DEVICES = 8  # of tests/conftest.py
WAIT, STEP, SAVE, EVAL = 0.25, 1.0, 0.5, 2.0  # seconds; sums of powers of two are exact
SETTINGS = loop.LoopSettings(
    total_steps=9,
    log_freq=4,
    save_model_freq=2,
    save_milestone_freq=0,
    max_nonfinite_steps=1,
)


def make_report(batches, settings=SETTINGS, unit="tokens", peak_tflops=0.002, log=None, run_dir=""):
    return loop.Report(settings, throughput.Throughput(batches, unit, 768, 6e9, peak_tflops), log, run_dir)


def fit(monkeypatch, unit="tokens", peak_tflops=0.002, evaluates=True) -> dict:
    """Runs the loop on a simulated clock: each activity has a fixed duration. Returns the logged metrics by step."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(throughput, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))

    def takes(seconds, result=None):
        def function(*_):
            clock.now += seconds
            return result

        return function

    class Batches:
        position, wait_seconds = 0, 100.0  # waited before the loop began

        def __next__(self):
            clock.now += WAIT
            self.wait_seconds += WAIT

    state = types.SimpleNamespace(step=0, params=None)
    rows, batches = [], Batches()
    loop.fit(
        state,
        lambda *_: takes(STEP, (state, {"loss": 1.0, "finite": True}))(),
        batches,
        SETTINGS,
        make_report(batches, unit=unit, peak_tflops=peak_tflops, log=rows.append),
        save=takes(SAVE, True),
        evaluate=takes(EVAL, {"eval_loss": 2.0}) if evaluates else None,
    )
    return {row["step"]: row for row in rows}


def test_a_run_beyond_total_steps_is_finished():
    state = types.SimpleNamespace(step=7, params=None)
    batches = types.SimpleNamespace(position=0, wait_seconds=0.0)
    settings = dataclasses.replace(SETTINGS, total_steps=5)
    assert loop.fit(state, None, batches, settings, make_report(batches, settings), save=lambda *_: None)[1]


@pytest.mark.parametrize("unit", ["tokens", "images"])
def test_rates_mfu_and_seconds_by_activity(monkeypatch, unit):
    rows = fit(monkeypatch, unit)
    assert list(rows) == [0, 4, 8]
    # Between the metrics of step 0 and step 4: four steps, two saves, and one evaluation, which is not training time.
    seconds = 4 * WAIT + 4 * STEP + 2 * SAVE
    assert rows[4] == {
        "step": 4,
        "loss": 1.0,
        "eval_loss": 2.0,
        "skipped_update": False,
        f"{unit}_per_second": 4 * 768 / seconds,
        f"{unit}_per_second_per_device": 4 * 768 / seconds / DEVICES,
        "mfu": 4 * 6e9 / seconds / (DEVICES * 0.002e12),
        "data_seconds": WAIT,
        "step_seconds": STEP,
        "save_seconds": 2 * SAVE / 4,
        "eval_seconds": EVAL / 4,
    }
    assert rows[4]["mfu"] == 0.25 and rows[4][f"{unit}_per_second"] == 512


def test_without_a_known_peak_there_is_no_mfu(monkeypatch):
    row = fit(monkeypatch, peak_tflops=0.0, evaluates=False)[4]
    assert "mfu" not in row and "eval_seconds" not in row and row["tokens_per_second"] == 512


@pytest.mark.parametrize(
    "kind, given, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 0.0, 989),
        ("NVIDIA H100 PCIe", 0.0, 756),
        ("NVIDIA H100 PCIe", 400.0, 400),  # --peak_tflops has precedence
        ("TPU v5 lite", 0.0, 197),
        ("TPU v5", 0.0, 459),
        ("cpu", 1.5, 1.5),
        ("cpu", 0.0, None),
    ],
)
def test_peak_flops_of_one_device(kind, given, tflops):
    assert throughput.peak_flops(given, kind) == (tflops and tflops * 1e12)


@pytest.mark.slow
def test_throughput_counts_all_tokens_of_a_step(tmp_path):
    run_dir = train(tmp_path, total_steps=4, log_freq=2, save_model_freq=1, peak_tflops=0.5)
    model = dataclasses.replace(PRESETS["vqlm_debug"], vocab_size=512, hidden_size=64, intermediate_size=128)
    for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()):
        seconds = row["step_seconds"] + row["data_seconds"] + row["save_seconds"]
        assert row["save_seconds"] > 0 or row["step"] == 0
        assert row["tokens_per_second"] * seconds == pytest.approx(4 * 128, rel=1e-9)
        assert row["tokens_per_second_per_device"] == pytest.approx(row["tokens_per_second"] / DEVICES)
        flops_per_second = row["tokens_per_second"] * flops_per_token(model, 128)
        assert row["mfu"] == pytest.approx(flops_per_second / (DEVICES * 0.5e12), rel=1e-9)


@pytest.mark.parametrize("failing", ["data", "evaluation", "metrics", "first save", "step"])
def test_an_error_ends_the_run_after_the_last_complete_step_is_saved(failing):
    """An error of a step saves nothing: the step has donated the state."""
    saved, calls = [], {"data": 0, "evaluation": 0, "metrics": 0, "first save": 0, "step": 0}

    def count(name, at):
        calls[name] += 1
        if name == failing and calls[name] == at:
            raise OSError(28, f"no space for {name}")

    class Batches:
        position, wait_seconds = 0, 0.0

        def __next__(self):
            count("data", 4)
            self.position += 8

    def step(state, batch):
        count("step", 4)
        return types.SimpleNamespace(step=state.step + 1), {"loss": 1.0, "finite": True}

    def save(state, done, position, milestone):
        count("first save", 1)
        saved.append((state.step, done, position))
        return True

    def evaluate(state):
        count("evaluation", 4)
        return {}

    settings = dataclasses.replace(SETTINGS, log_freq=1, save_model_freq=3 if failing == "first save" else 0)
    batches = Batches()
    report = make_report(batches, settings, log=lambda row: count("metrics", 3))
    with pytest.raises(OSError, match=f"no space for {failing}"):
        loop.fit(types.SimpleNamespace(step=0), step, batches, settings, report, save=save, evaluate=evaluate)
    done = {"data": 3, "evaluation": 4, "metrics": 4, "first save": 3}.get(failing)
    assert saved == ([(done, done, 8 * done)] if done else [])


def test_the_step_in_progress_when_training_stops_is_reported_and_saved(tmp_path):
    """Only step 3 is not finite. Step 4 has been dispatched before that is known."""
    rows, saved = [], []

    class Batches:
        position, wait_seconds = 0, 0.0

        def __next__(self):
            self.position += 8
            return {"input_tokens": jax.device_put(np.zeros((1, 1), np.int32))}

    def step(state, batch):
        done = state.step + 1
        return types.SimpleNamespace(step=done), {"loss": float(done), "finite": done != 4}

    settings = dataclasses.replace(SETTINGS, log_freq=1, save_model_freq=0)
    batches = Batches()
    with pytest.raises(loop.NonFiniteLossError, match=r"step 3: .* none of these updates was applied"):
        loop.fit(
            types.SimpleNamespace(step=0),
            step,
            batches,
            settings,
            make_report(batches, settings, log=rows.append, run_dir=str(tmp_path)),
            save=lambda state, done, position, milestone: saved.append((state.step, done, position)) is None,
        )
    assert [(row["step"], row["skipped_update"]) for row in rows] == [(n, n == 3) for n in range(5)]
    assert saved == [(5, 5, 40)]


@pytest.mark.parametrize(
    "error, waits", [(None, True), (loop.NonFiniteLossError("nan"), True), (UserError("a.jsonl:3: no"), False)]
)
def test_the_last_save_is_awaited_only_where_all_processes_await_it(error, waits):
    """After an error of one process the others are inside a step. Processes exit within seconds after an error."""
    calls = []
    checkpointer = types.SimpleNamespace(wait=lambda: calls.append("wait"))
    expected = pytest.raises(type(error)) if error else contextlib.nullcontext()
    with expected, run._last_save_on_disk(checkpointer, calls.append):
        if error:
            raise error
    assert calls == (["the last checkpoint", "wait"] if waits else [])


@pytest.mark.parametrize(
    ("start", "total_steps", "fails", "expected"),
    [(0, 9, True, [(3, True)]), (6, 6, False, [(6, True)]), (7, 7, False, [(7, False)]), (0, 0, False, [(0, False)])],
)
def test_a_milestone_is_not_saved_again_as_an_ordinary_checkpoint(start, total_steps, fails, expected):
    """On object stores the second save of a step replaces the first, and ordinary checkpoints are pruned."""
    saved = []

    class Batches:
        position, wait_seconds = 0, 0.0

        def __next__(self):
            if fails and self.position == 3:
                raise OSError("no more data")
            self.position += 1

    def step(state, batch):
        return types.SimpleNamespace(step=state.step + 1), {"loss": 1.0, "finite": True}

    settings = dataclasses.replace(SETTINGS, total_steps=total_steps, save_model_freq=0, save_milestone_freq=3)
    batches, state = Batches(), types.SimpleNamespace(step=start)
    report = make_report(batches, settings, log=lambda row: None)
    with pytest.raises(OSError) if fails else contextlib.nullcontext():
        loop.fit(
            state, step, batches, settings, report, save=lambda state, done, _, kept: saved.append((done, kept)) is None
        )
    assert saved == expected


@pytest.mark.parametrize("skipped", [True, False])
def test_a_save_that_was_skipped_is_tried_again(skipped):
    """For lack of time, before the last step ends the run."""
    tried = []
    batches = type("Batches", (), {"position": 0, "wait_seconds": 0.0, "__next__": lambda self: None})()

    def save(state, done, *_):
        tried.append(done)
        return not (skipped and len(tried) == 1)

    settings = dataclasses.replace(SETTINGS, total_steps=3, save_model_freq=3)
    report = make_report(batches, settings, log=lambda row: None)
    step = lambda state, batch: (types.SimpleNamespace(step=state.step + 1), {"loss": 1.0, "finite": True})  # noqa: E731
    loop.fit(types.SimpleNamespace(step=0), step, batches, settings, report, save=save)
    assert tried == ([3, 3] if skipped else [3])


def test_the_last_lines_of_a_run_whose_checkpoints_cannot_be_read(monkeypatch):
    """They raise no error: the exit code says that the run is to be started again."""

    def fail(directory):
        raise RuntimeError("SlowDown")

    monkeypatch.setattr(run.checkpoints, "latest_checkpoint", fail)
    values = types.SimpleNamespace(
        loop=SETTINGS,
        logger=types.SimpleNamespace(output_dir="gs://b", experiment_id="run", prefix="", prefix_to_id=False),
        checkpointer=types.SimpleNamespace(save_optimizer_state=True),
    )
    lines = list(run._end_lines(types.SimpleNamespace(settings=values, directory="gs://b/run"), 3, False))
    assert lines[:2] == [
        "stopped after step 3 of 9: gs://b/run",
        "the newest checkpoint cannot be read (RuntimeError: SlowDown)",
    ]
    assert lines[2].endswith("--logger.experiment_id=run") and len(lines) == 3


def test_a_step_is_logged_before_the_state_after_it_is_saved():
    """A run that is killed after the save resumes after the step, and would never log it."""
    events = []
    batches = type("Batches", (), {"position": 0, "wait_seconds": 0.0, "__next__": lambda self: None})()
    state = types.SimpleNamespace(step=0)

    def step(state, batch):
        return types.SimpleNamespace(step=state.step + 1), {"loss": 1.0, "finite": True}

    settings = dataclasses.replace(SETTINGS, total_steps=4, log_freq=1, save_model_freq=2, save_milestone_freq=0)
    report = make_report(batches, settings, log=lambda row: events.append(("logged", row["step"])))
    save = lambda state, done, *_: events.append(("saved", done)) is None  # noqa: E731
    loop.fit(state, step, batches, settings, report, save=save)
    assert events == [("logged", 0), ("logged", 1), ("saved", 2), ("logged", 2), ("logged", 3), ("saved", 4)]


@pytest.fixture
def restored_signals():
    """Restores the handlers, which a received signal changes for the rest of the process."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_repeated_signals_do_not_interrupt_the_save_but_ctrl_c_does(restored_signals, capfd):
    with StopVote() as vote:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.raise_signal(number)
        assert vote.stop({})
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)  # while the process exits


def test_without_a_signal_the_handlers_are_restored():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopVote():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_signal_during_a_print_stops_the_run(monkeypatch, capfd, restored_signals):
    """The progress bar prints at each step; a buffered file raises on a nested print."""
    signals = [signal.SIGTERM]

    class Terminal(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            if signals:
                signal.raise_signal(signals.pop())
            return len(data)

    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(Terminal()), line_buffering=True))
    with StopVote() as vote:
        assert not vote.stop({})
        print("step 1", file=sys.stderr, flush=True)
        assert vote.stop({})
    assert capfd.readouterr().err == "\nSIGTERM: stopping after the step in progress\n"
