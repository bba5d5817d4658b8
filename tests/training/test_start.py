"""The start of a run: which files it uses, and that it reads each once."""

import collections

import numpy as np
import pytest
from tiny_run import GOLDEN, finish, start, train

from EasyLM import checkpoints, flags
from EasyLM.checkpoints import streaming
from EasyLM.checkpoints.run_directory import open_run_directory
from EasyLM.errors import UserError
from EasyLM.models.llama import llama_train
from EasyLM.training import run
from EasyLM.training.settings import RunSettings
from EasyLM.training.start import StartFiles, StartPoint, check_settings, find_start
from EasyLM.training.task import ModelSettings

SETTINGS = ModelSettings("model", {}, frozenset())
FORMATS = {**checkpoints.CHECKPOINT_FORMATS, "huggingface": lambda path: []}


def start_of(run_dir, load_checkpoint="") -> StartFiles:
    return find_start(StartFiles(load_checkpoint), str(run_dir), FORMATS).files


def save_step(run_dir, step, start, milestone=False):
    """Writes those files of a run started at `start` that the next start reads."""
    metadata = {"step": step, "flags": {"load_checkpoint": "of the last start only"}, "started_from": start.history}
    writers = {
        "streaming_train_state": lambda file: streaming.write_entry(file, ("step",), np.array(step, np.int32)),
        "dataset.json": lambda file: file.write(b"{}"),
    }
    directory = open_run_directory(str(run_dir))
    directory.prepare()
    directory.commit(directory.begin(step), step, writers, metadata, milestone)
    return str(run_dir / "checkpoints" / f"step_{step:08d}")


def test_a_requeued_command_resumes_the_run(tmp_path):
    run_dir, elsewhere = tmp_path / "run", f"huggingface::{tmp_path}"
    assert start_of(run_dir, elsewhere).checkpoint == elsewhere
    save_step(run_dir, 4, start_of(run_dir, elsewhere), milestone=True)
    newest = save_step(run_dir, 6, start_of(run_dir))  # resumed without the flag
    for again in ("", elsewhere):
        assert start_of(run_dir, again).checkpoint == f"trainstate::{newest}/streaming_train_state"
    with pytest.raises(UserError, match=f"already holds a run that started from '{elsewhere}'"):
        start_of(run_dir, "huggingface::other")

    back = f"trainstate::{run_dir}/streaming_train_state_4"
    start = start_of(run_dir, back)
    assert start.checkpoint == back and start.metadata.endswith("step_00000004/metadata.json")
    assert start_of(run_dir, back).checkpoint == back, "nothing has been saved since"
    newest = save_step(run_dir, 5, start)
    for again in ("", elsewhere, back):
        assert start_of(run_dir, again).checkpoint == f"trainstate::{newest}/streaming_train_state"


@pytest.mark.parametrize("frequency", ["", "save_model_freq", "save_milestone_freq"])
def test_a_run_that_will_not_be_saved_is_told_so(tmp_path, caplog, frequency):
    config = flags.defaults(llama_train.FLAGS)
    config.logger.update(output_dir=str(tmp_path), experiment_id="run")
    if frequency:
        config[frequency] = 10
    with run.open_run(RunSettings.from_flags(config), SETTINGS):
        assert ("--save_model_freq=0: what this run trains is not saved" in caplog.text) == (not frequency)


def test_each_starting_file_is_read_once(tmp_path, monkeypatch):
    calls = collections.Counter()

    def count(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda path: (calls.update([str(path)]), original(path))[1])

    count(streaming, "read_streaming")
    count(checkpoints, "load_metadata")
    count(checkpoints, "load_dataset_state")
    monkeypatch.setattr(run, "compile_step", lambda *_: None)
    monkeypatch.setattr(run, "fit", lambda state, *_, **__: (state, True))
    files = {
        "load_checkpoint": f"{GOLDEN}/step15/streaming_train_state",
        "load_dataset_state": f"{GOLDEN}/step15/dataset.pkl",
        "load_metadata": f"{GOLDEN}/step15/metadata.pkl",
    }
    train(tmp_path, **files | {"load_checkpoint": f"trainstate::{files['load_checkpoint']}"})
    assert calls == dict.fromkeys(files.values(), 1)


@pytest.mark.parametrize("level", ["INFO", "WARNING"])
def test_a_start_at_0_in_a_directory_with_metrics_is_a_warning(tmp_path, caplog, level):
    """The run has ended before its first save, or its checkpoints were deleted."""
    caplog.set_level("INFO")
    if level == "WARNING":
        (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    assert start_of(tmp_path).checkpoint == ""
    (record,) = caplog.records
    metrics = ", although it has metrics" if level == "WARNING" else ""
    assert record.levelname == level
    assert record.getMessage() == f"{tmp_path}: holds no checkpoint{metrics}; starting from step 0"


@pytest.mark.parametrize("given", ["adamw", "palm", None])
def test_the_optimizer_of_a_train_state_is_compared(given):
    spec = f"trainstate::{GOLDEN}/step15/streaming_train_state"
    for files in (StartFiles(spec), StartFiles(spec.replace("::", "_params::"))):
        point = StartPoint(files, [], None, {"flags": {"optimizer": {"type": "adamw"}}}, "run")
        if given == "palm" and files.checkpoint == spec:
            advice = rf"--load_checkpoint=trainstate_params::{GOLDEN}"
            with pytest.raises(UserError, match=rf"^--optimizer\.type=palm: {spec} has the state of adamw; .*{advice}"):
                check_settings(point, SETTINGS, {"type": given})
        else:
            check_settings(point, SETTINGS, {"type": given} if given else {})


@pytest.mark.slow
def test_a_start_says_that_it_compiles_and_not_which_devices_are_absent(tmp_path):
    """JAX looks for devices of all kinds, as on a user's machine."""
    output = finish(start(tmp_path, devices=1, platforms="", total_steps=1, mesh_dim="1,1,1"))
    assert output.index("compiling the train step") < output.index("compiled the train step in ")
    assert "Unable to initialize backend" not in output
