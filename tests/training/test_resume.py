"""A run that was stopped and resumed equals an uninterrupted run bit for bit."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import optax
import pytest
import run_states_kit as states
from fsspec.implementations.memory import MemoryFileSystem
from tiny_run import GOLDEN, MODEL_METRICS, TINY, assert_close, await_metrics, finish, metrics, start, train

from EasyLM import flags
from EasyLM.checkpoints import layout, listing, load_metadata, streaming
from EasyLM.data import packed_file, records
from EasyLM.errors import UserError
from EasyLM.models.llama import llama_train, training_task
from EasyLM.parallel import make_mesh
from EasyLM.training import RUN_FLAGS, metrics_log, run
from EasyLM.training.stop_signal import STOP_SIGNALS

STEPS = 14
# The data has about 212 rows (24 sentences of 768 to 1500 tokens, 128 tokens per row). With 24 rows per step, an epoch
# ends within the run.
VARIANTS = {
    "float32": {},
    "bfloat16": {"dtype": "bf16"},
    "accumulation": {"optimizer.accumulate_gradient_steps": 3},
    "palm": {"optimizer.type": "palm", "optimizer.palm_optimizer.lr_warmup_steps": 5},
    "muon": {
        "optimizer.type": "muon",
        "optimizer.ema_decay": 0.9,
        "optimizer.muon_optimizer.schedule": "wsd",
        "optimizer.muon_optimizer.lr_warmup_steps": 5,
        "optimizer.muon_optimizer.lr_decay_steps": 12,
        "optimizer.muon_optimizer.wsd_decay_steps": 4,
        "llama.z_loss_weight": 1e-3,
    },
    "shuffled epochs": {"train_dataset.json_dataset.shuffle_seed": 7, "train_dataset.json_dataset.batch_size": 24},
    "epochs": {"train_dataset.json_dataset.batch_size": 24},
    "documents": {"train_dataset.json_dataset.document_mask": True, "llama.num_key_value_heads": 2},
    "dropout": {"llama.resid_pdrop": 0.1, "llama.fcm_max_ratio": 0.3},
}


def final_state(run_dir) -> dict:
    return {entry.key: entry.read() for entry in streaming.read_streaming(run_dir / "streaming_train_state")}


def assert_same_run(run, reference):
    assert metrics(run, *MODEL_METRICS) == metrics(reference, *MODEL_METRICS)
    state, expected = final_state(run), final_state(reference)
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == value.dtype
        assert state[key].tobytes() == value.tobytes(), key


@pytest.mark.slow
def test_the_schedule_continues_from_parameters_only(tmp_path):
    settings = {"optimizer__accumulate_gradient_steps": 2, "checkpointer__save_optimizer_state": False}
    settings |= {"save_model_freq": 6}
    whole = train(tmp_path, total_steps=10, logger__experiment_id="whole", **settings)
    train(tmp_path, total_steps=6, **settings)
    resumed = train(tmp_path, total_steps=10, **settings)
    assert metrics(resumed, "step", "learning_rate") == metrics(whole, "step", "learning_rate")


@pytest.mark.slow
@pytest.mark.parametrize("before, after, updates", [(4, 1, [2, 3, 4, 5]), (1, 4, [8, 8, 8, 8, 9, 9, 9, 9])])
def test_updates_are_counted_across_a_change_of_accumulation(tmp_path, before, after, updates):
    """8 micro-steps are 2 updates of 4, or 8 of 1. A second resume counts from the first one's updates."""
    settings = {"checkpointer__save_optimizer_state": False, "save_model_freq": 100}
    train(tmp_path, total_steps=8, optimizer__accumulate_gradient_steps=before, **settings)
    for part in (1, 2):
        total_steps = 8 + part * len(updates) // 2
        run_dir = train(tmp_path, total_steps=total_steps, optimizer__accumulate_gradient_steps=after, **settings)
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 5, 30, 3e-4)
    resumed = metrics(run_dir, "learning_rate")
    np.testing.assert_allclose([resumed[8 + i][0] for i in range(len(updates))], list(map(rate, updates)), rtol=1e-6)


@pytest.mark.slow
def test_a_copied_run_directory_is_resumed(tmp_path, caplog):
    """The links have become files, and `latest` is gone."""
    settings = {"save_model_freq": 2, "save_milestone_freq": 4}
    run_dir = train(tmp_path, total_steps=6, **settings)
    copied = tmp_path / "copied"
    subprocess.run(["cp", "-rL", run_dir, copied], check=True)
    shutil.rmtree(copied / "latest")
    before = states.digests(copied / "checkpoints") | states.digests(copied)
    train(tmp_path, total_steps=8, logger__experiment_id="copied", **settings)
    assert f"{copied}: resuming after step 6, from checkpoints/step_00000006" in caplog.text
    assert sorted(metrics(copied, "loss")) == list(range(8))
    changed = before - states.digests(copied)
    assert len(changed) == 1, "only metrics.jsonl has changed"


@pytest.mark.slow
def test_two_runs_in_one_directory(tmp_path):
    """The second one names the first. After a kill, the next one starts at once."""
    settings = {"total_steps": 10**6, "mesh_dim": "1,1,1", "save_model_freq": 1}
    first = start(tmp_path, devices=1, **settings)
    await_metrics([first], path := tmp_path / "run" / "metrics.jsonl")
    output = finish(start(tmp_path, devices=1, **settings), code=2)
    assert f"{tmp_path}/run: in use by process {first.pid} on host" in output
    assert "give another --logger.experiment_id" in output and "Traceback" not in output
    first.kill()
    first.communicate()
    second = start(tmp_path, devices=1, **settings)
    deadline = time.monotonic() + 120
    while f'"process": {second.pid},' not in (tmp_path / "run" / "run_lock.json").read_text():
        assert time.monotonic() < deadline and second.poll() is None
        time.sleep(0.05)
    second.send_signal(signal.SIGTERM)
    output = finish(second, code=75)
    assert f"taking over the lock of process {first.pid}" in output and "waiting up to" not in output
    assert not (tmp_path / "run" / "run_lock.json").exists()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == sorted(steps) and sorted(set(steps)) == list(range(steps[-1] + 1))


@pytest.mark.slow
def test_two_runs_on_one_object_store(monkeypatch):
    """The second one starts, and is refused, while the first one is between two steps and writes a checkpoint."""
    output_dir, log, refusals = "memory://two", metrics_log.Logger.log, []
    settings = {"total_steps": 4, "save_model_freq": 1}

    def log_and_start_another(logger, row):
        log(logger, row)
        if row["step"] == 2:
            monkeypatch.setattr(metrics_log.Logger, "log", log)  # the other run starts no third one
            with pytest.raises(UserError) as caught:
                train(output_dir, **settings)
            refusals.append(str(caught.value))

    monkeypatch.setattr(metrics_log.Logger, "log", log_and_start_another)
    train(output_dir, **settings)
    (line,) = refusals
    assert line.startswith(f"{output_dir}/run: in use by process {os.getpid()} on host {socket.gethostname()} since")
    assert line.endswith("or give another --logger.experiment_id")
    store = MemoryFileSystem()
    rows = map(json.loads, store.cat_file(f"{output_dir}/run/metrics.jsonl").splitlines())
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert listing.latest_checkpoint(f"{output_dir}/run").step == 4
    names = {path.rsplit("/", 1)[1] for path in store.ls(f"{output_dir}/run/checkpoints", detail=False)}
    assert names == {"step_00000004"} and not store.exists(f"{output_dir}/run/run_lock.json")


@pytest.mark.slow
def test_every_changed_model_setting_is_listed(tmp_path):
    run_dir = train(tmp_path, total_steps=1, save_model_freq=1)
    before = sorted(run_dir.rglob("*"))
    with pytest.raises(UserError) as caught:
        train(tmp_path, total_steps=2, llama__rms_norm_eps=1e-5, llama__rope_theta=500.0, llama__scan_layers=False)
    path = run_dir / "checkpoints" / "step_00000001" / "metadata.json"
    differences = "rms_norm_eps=1e-05 (saved: 1e-06), rope_theta=500.0 (saved: 10000.0)"  # scan_layers may change
    assert str(caught.value) == f"{path}: the checkpoint's model has other settings: {differences}"
    assert sorted(run_dir.rglob("*")) == before
    assert sorted(metrics(run_dir, "loss")) == [0]


@pytest.mark.slow
def test_evaluation_is_compiled_once_and_its_time_is_logged(tmp_path, monkeypatch):
    traced = []
    original = training_task.model_without_extra

    def counted(*arguments):
        model = original(*arguments)
        return dataclasses.replace(model, evaluate=lambda *values: (traced.append(1), model.evaluate(*values))[1])

    monkeypatch.setattr(training_task, "model_without_extra", counted)
    held_out = {"eval_dataset__" + name.removeprefix("train_dataset."): value for name, value in TINY.items()
                if name.startswith("train_dataset.")}  # fmt: skip
    run_dir = train(tmp_path, total_steps=3, eval_steps=2, **{k.replace(".", "__"): v for k, v in held_out.items()})
    assert len(traced) == 1
    for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()):
        assert row["eval_loss"] > 0 and row["eval_seconds"] > 0


@pytest.mark.parametrize("prefix", ["", "p"])
def test_the_printed_command_leads_to_the_same_run(tmp_path, prefix):
    config = flags.defaults(RUN_FLAGS)
    config.logger.update(output_dir=str(tmp_path), experiment_id="a/b", prefix=prefix, prefix_to_id=True)
    run_dir = run.run_directory(config.logger)
    config.logger.experiment_id = metrics_log.given_id(config.logger, run_dir)
    assert run.run_directory(config.logger) == run_dir


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_is_bit_equal(tmp_path, request, variant):
    """Also where each start compiles its step anew: the first variant."""
    if variant == "float32":
        request.getfixturevalue("without_the_cache")
    settings = {name.replace(".", "__"): value for name, value in VARIANTS[variant].items()}
    settings |= {"save_model_freq": 100}
    reference = train(tmp_path / "reference", total_steps=STEPS, **settings)
    resumed = None
    for stop in (4, 9, STEPS):  # 4 is in the middle of an accumulation cycle of 3
        resumed = train(tmp_path / "resumed", total_steps=stop, **settings)
    assert_same_run(resumed, reference)


def half_written(run_dir) -> int | None:
    """Returns the step whose checkpoint is incomplete: being written, or abandoned when the process was killed."""
    names = (path.name for path in (run_dir / "checkpoints").glob("*"))
    matches = (re.fullmatch(rf"{re.escape(layout.TEMPORARY)}(\d+)-[\w.-]+", name) for name in names)
    return next((int(match[1]) for match in matches if match), None)


def wait_for_a_save(process, run_dir, delay):
    """Waits until `delay` seconds after the next checkpoint is complete."""
    newest = os.path.realpath(run_dir / "latest")
    deadline = time.monotonic() + 240
    while os.path.realpath(run_dir / "latest") == newest and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)


def wait_until_it_saves(process, run_dir, delay):
    """Waits until the run is saving, not for the first time, and stops it so that the save does not complete."""
    wait_for_a_save(process, run_dir, delay)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if half_written(run_dir):
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if half_written(run_dir):
                return
            process.send_signal(signal.SIGCONT)
        assert process.poll() is None, "finished before a save was observed"
    raise AssertionError("no save in 120 s")


@pytest.mark.slow
@pytest.mark.parametrize("wait", [wait_for_a_save, wait_until_it_saves], ids=["after a save", "during a save"])
def test_a_kill_at_any_moment_loses_no_checkpoint(tmp_path, wait):
    settings = {"save_model_freq": 1, "mesh_dim": "1,1,1"}
    run, reference = tmp_path / "killed" / "run", tmp_path / "reference" / "run"
    for delay in (0.0, 0.01, 0.03):
        process = start(tmp_path / "killed", devices=1, total_steps=10**6, **settings)
        wait(process, run, delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "killed before it finished"
        state = final_state(run)
        assert state, "the latest checkpoint is readable after a kill"
        if saving := half_written(run):
            assert saving == int(state["step",]) + 1, "the latest state is that of the previous save"
    settings["total_steps"] = int(state["step",]) + 5
    for output_dir in (tmp_path / "killed", tmp_path / "reference"):
        finish(start(output_dir, devices=1, **settings))
    assert_same_run(run, reference)
    assert half_written(run) is None


@pytest.mark.slow
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_finishes_the_step_saves_and_prints_how_to_resume(tmp_path, number):
    settings = {"total_steps": 10**6, "mesh_dim": "1,1,1"}
    process = start(tmp_path, devices=1, **settings)
    await_metrics([process], tmp_path / "run" / "metrics.jsonl")
    process.send_signal(number)
    output = finish(process, code=75)
    assert "to resume" in output and "--logger.experiment_id=run" in output
    done = max(metrics(tmp_path / "run", "loss")) + 1
    assert int(final_state(tmp_path / "run")[("step",)]) == done
    output = finish(start(tmp_path, devices=1, **settings | {"total_steps": done + 2}))
    assert f"finished after step {done + 2}" in output
    assert sorted(metrics(tmp_path / "run", "loss")) == list(range(done + 2))


@pytest.mark.slow
def test_a_signal_during_start_up_stops_before_the_first_step(tmp_path, without_the_cache):
    """The run directory appears before the step is compiled, which takes seconds."""
    process = start(tmp_path, devices=1, total_steps=10**6, mesh_dim="1,1,1")
    deadline = time.monotonic() + 120
    while not (tmp_path / "run").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert "stopped after step 0" in finish(process, code=75)
    assert int(final_state(tmp_path / "run")[("step",)]) == 0


@pytest.mark.slow
def test_a_run_resumes_on_fewer_devices(tmp_path, monkeypatch):
    """First on four, then on two that split rows, then on one."""

    def train_on(devices, name, stop):
        mesh = make_mesh("dp:1,fsdp:1,mp:1,sp:2" if devices == 2 else "1,-1,1", jax.devices()[:devices])
        with monkeypatch.context() as patch:
            patch.setattr("EasyLM.models.llama.llama_train.make_mesh", lambda text: mesh)
            return train(tmp_path / name, total_steps=stop, save_model_freq=100, mesh_dim="1,-1,1")

    whole = train_on(4, "whole", STEPS)
    for devices, stop in ((4, 5), (2, 10), (1, STEPS)):
        resumed = train_on(devices, "resumed", stop)
        mesh = load_metadata(str(resumed / "metadata.json"))["mesh"]
        assert mesh["fsdp"] * mesh["sp"] == devices and mesh["sp"] == (2 if devices == 2 else 1)
    assert metrics(resumed, "dataset_total_tokens") == metrics(whole, "dataset_total_tokens")
    assert_close(metrics(resumed, *MODEL_METRICS), metrics(whole, *MODEL_METRICS), 1e-4)


@pytest.mark.slow
def test_a_mixture_resumes_with_a_packed_part(tmp_path):
    """A shuffled mixture starts on JSONL files and resumes with one part packed; the result is the same."""
    lines = (GOLDEN / "dataset.jsonl").read_bytes().splitlines(keepends=True)
    for name, part in (("a", lines[:8]), ("b", lines[8:])):
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(part))
    records_of_b = records.read_records(str(tmp_path / "b.jsonl"), 512)
    packed_file.write(str(tmp_path / "b.packed"), [(str(tmp_path / "b.jsonl"), records_of_b)], keep_others=True)
    settings = {"train_dataset__json_dataset__weights": "2,1", "train_dataset__json_dataset__shuffle_seed": 3}
    settings |= {"save_model_freq": 100}
    runs = {}
    for name, paths in (("whole", ["b.jsonl"]), ("resumed", ["b.jsonl", "b.packed"])):
        for stop, path in zip((6, STEPS)[-len(paths) :], paths):
            path = f"{tmp_path / 'a.jsonl'},{tmp_path / path}"
            runs[name] = train(tmp_path / name, total_steps=stop, train_dataset__json_dataset__path=path, **settings)
    assert_same_run(runs["resumed"], runs["whole"])
    rows = STEPS * 4
    for part, share in enumerate((2 / 3, 1 / 3)):
        (epochs,) = metrics(runs["whole"], f"dataset_epoch_{part}")[STEPS - 1]
        tokens = sum(len(ids) for ids, _ in records.read_records(str(tmp_path / f"{'ab'[part]}.jsonl"), 512))
        assert abs(epochs * tokens / 128 - rows * share) <= 2


@pytest.mark.slow
def test_a_data_file_that_is_truncated_ends_the_run_with_its_state_saved(tmp_path, monkeypatch, capsys):
    """A packed file is memory-mapped: to read beyond its end would kill the process. The run resumes bit for bit."""
    lines, packed = shutil.copy(GOLDEN / "dataset.jsonl", tmp_path / "data.jsonl"), tmp_path / "data.packed"
    packed_file.write(str(packed), [(str(lines), records.read_records(str(lines), 512))], keep_others=False)
    settings, log = {"total_steps": STEPS, "save_model_freq": 100}, metrics_log.Logger.log
    reference = train(tmp_path / "reference", **settings)
    for path in (lines, packed):
        settings["train_dataset.json_dataset.path"] = str(path)
        output_dir, whole = tmp_path / path.suffix, path.read_bytes()
        part = len(whole) // 8

        def log_and_truncate(logger, row, path=path, part=part):
            log(logger, row)
            if row["step"] == 4:
                os.truncate(path, part)

        values = {**TINY, **settings, "logger.output_dir": output_dir}
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
            patch.setattr(metrics_log.Logger, "log", log_and_truncate)
            flags.run(llama_train.main, llama_train.FLAGS, ["llama_train", *(f"--{k}={v}" for k, v in values.items())])
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
        assert exit.value.code == 2 and f"{path}: " in line
        done = int(final_state(output_dir / "run")["step",])
        assert 5 <= done < STEPS and sorted(metrics(output_dir / "run", "loss")) == list(range(done))
        path.write_bytes(whole)
        assert_same_run(train(output_dir, **settings), reference)


@pytest.mark.slow
def test_a_run_that_saves_with_orbax_resumes_bit_for_bit(tmp_path, without_the_cache):
    """Stopped, resumed, stopped, and resumed by a run that saves streaming files."""
    settings = {"save_model_freq": 100, "compilation_cache_dir": str(tmp_path / "cache")}
    settings |= {"optimizer__accumulate_gradient_steps": 3}
    whole = train(tmp_path, total_steps=8, logger__experiment_id="whole", **settings)
    for steps, name in ((4, "orbax"), (5, "orbax"), (8, "streaming")):
        run_dir = train(tmp_path, total_steps=steps, checkpointer__format=name, **settings)
    assert_same_run(run_dir, whole)


@pytest.mark.slow
def test_a_save_within_an_update_resumes_bit_for_bit_and_on_any_mesh(tmp_path):
    """Groups along dp keep gradients of their own. A save reduces them, and training continues from what it saved."""
    settings = {"optimizer__accumulate_gradient_steps": 3, "mesh_dim": "2,2,2", "save_model_freq": 4}
    whole = train(tmp_path, total_steps=6, logger__experiment_id="whole", **settings)
    stopped = train(tmp_path, total_steps=4, **settings)
    shutil.copytree(stopped, tmp_path / "other", symlinks=True)
    assert_same_run(train(tmp_path, total_steps=6, **settings), whole)
    settings["mesh_dim"] = "1,4,2"
    other = train(tmp_path, total_steps=6, logger__experiment_id="other", **settings)
    assert_close(metrics(other, *MODEL_METRICS), metrics(whole, *MODEL_METRICS), 1e-4)
