"""Run directories, local and remote: layout, milestones, pruning, repeated steps."""

import os

import fsspec
import numpy as np
import pytest
from checkpoint_kit import (
    assert_equal,
    contents,
    make_checkpointer,
    save,
    small_state,
)

from EasyLM import checkpoints, flags
from EasyLM.checkpoints import run_directory, streaming
from EasyLM.errors import UserError
from EasyLM.training import metrics_log


def test_layout_milestones_and_pruning(tmp_path):
    saver = make_checkpointer(tmp_path)
    assert checkpoints.latest_checkpoint(str(tmp_path)) is None
    for step in range(1, 7):
        save(saver, step, milestone=step in (2, 4))
        assert contents(str(tmp_path)) == (step, step, step)
    sidecars = ("checksums", "dataset", "metadata")
    names = {"streaming_train_state", *(f"{name}.json" for name in sidecars)}
    milestones = {f"streaming_train_state_{n}" for n in (2, 4)} | {
        f"{name}_{n}.json" for n in (2, 4) for name in sidecars
    }
    assert set(os.listdir(tmp_path)) == {"checkpoints", "latest"} | names | milestones
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000002", "step_00000004", "step_00000006"]
    assert set(os.listdir(tmp_path / "latest")) == names
    for step in (2, 4):
        milestone = checkpoints.load(f"trainstate::{tmp_path}/streaming_train_state_{step}", small_state(0))
        assert_equal(milestone, small_state(step))
        beside = checkpoints.sidecar_path(f"{tmp_path}/streaming_train_state_{step}", "metadata")
        assert checkpoints.load_metadata(beside)["step"] == step
    assert (
        checkpoints.load_metadata(checkpoints.sidecar_path(f"{tmp_path}/streaming_train_state", "dataset"))["step"] == 6
    )


def test_moved_run_directory(tmp_path):
    save(make_checkpointer(str(tmp_path / "a")), 3, milestone=True)
    os.rename(tmp_path / "a", tmp_path / "b")
    assert contents(str(tmp_path / "b")) == (3, 3, 3)
    saver = make_checkpointer(str(tmp_path / "b"))
    save(saver, 4)
    assert contents(str(tmp_path / "b")) == (4, 4, 4)
    assert os.path.exists(tmp_path / "b" / "streaming_train_state_3")


def test_repeated_steps(tmp_path):
    """A run that resumes from a milestone saves the later steps again."""
    for _ in range(3):
        saver = make_checkpointer(tmp_path)
        for step in (5, 6):
            save(saver, step, milestone=True)
            assert contents(str(tmp_path)) == (step, step, step)
    assert len(os.listdir(tmp_path / "checkpoints")) == 2


@pytest.mark.parametrize("kept", [True, False])
def test_load_during_saves_reads_one_checkpoint(tmp_path, kept):
    """An evaluation loads a checkpoint while the run saves the next one."""
    saver = make_checkpointer(tmp_path)
    save(saver, 1, milestone=kept)
    entries = checkpoints.open_checkpoint(f"trainstate::{tmp_path}/streaming_train_state")
    save(saver, 2)
    if kept:
        assert all(np.all(entry.read() == 1) for entry in entries)
    else:
        with pytest.raises(UserError, match="step_00000001/streaming_train_state: was deleted during the load"):
            entries[0].read()


def test_switch_from_train_state_to_parameters(tmp_path):
    save(make_checkpointer(tmp_path), 1)
    save(make_checkpointer(str(tmp_path), save_optimizer_state=False), 2)
    assert not os.path.lexists(tmp_path / "streaming_train_state")
    saved = checkpoints.latest_checkpoint(str(tmp_path))
    assert saved.spec.startswith("params::") and checkpoints.load_metadata(saved.metadata)["step"] == 2
    params = checkpoints.load(saved.spec)
    assert np.all(params["params"]["transformer"]["ln_f"] == 2)


def test_a_directory_that_another_host_remembers_as_missing_is_seen(tmp_path, monkeypatch):
    """An NFS client answers from memory until it is asked to create the directory."""
    first, second = (run_directory.open_run_directory(str(tmp_path / "run")) for _ in range(2))
    first.prepare()
    missing, mkdir, exists = {str(tmp_path / "run" / "checkpoints")}, os.mkdir, os.path.exists
    with first.visible_file() as path:

        def create(directory, *arguments):
            missing.discard(str(directory))
            mkdir(directory, *arguments)

        monkeypatch.setattr(os, "mkdir", create)
        monkeypatch.setattr(os.path, "exists", lambda path: os.path.dirname(path) not in missing and exists(path))
        assert second.is_visible(path)
        assert not run_directory.open_run_directory(str(tmp_path / "another")).is_visible(path)


def test_unwritable_run_directory_is_rejected(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match=rf"{blocked}/run: cannot write checkpoints there \(Not a directory\)"):
        make_checkpointer(str(blocked / "run"))
    (tmp_path / "copied" / "latest").mkdir(parents=True)
    with pytest.raises(UserError, match="copied/latest: does not belong to a complete checkpoint"):
        make_checkpointer(str(tmp_path / "copied"))


def test_remote_run_directory(monkeypatch):
    run_dir = "memory://bucket/run"
    saver = make_checkpointer(run_dir)
    assert checkpoints.latest_checkpoint(run_dir) is None
    for step in range(1, 5):
        save(saver, step, milestone=step == 2)
        assert contents(run_dir) == (step, step, step)
    files = saver._directory._files
    steps = sorted(name.rsplit("/", 1)[1] for name in files.ls("/bucket/run/checkpoints", detail=False))
    assert steps == ["step_00000002", "step_00000004"]
    path = f"{run_dir}/checkpoints/step_00000002/streaming_train_state"
    assert checkpoints.load_metadata(checkpoints.sidecar_path(path, "metadata"))["step"] == 2
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "write_rows", lambda *_: os.close(-1))  # an OSError
        with pytest.raises(UserError, match="was not saved"):
            save(saver, 5)
    assert contents(run_dir) == (4, 4, 4)
    save(saver, 6)
    assert contents(run_dir) == (6, 6, 6)
    back = make_checkpointer(run_dir)  # of a run that went back to the milestone
    save(back, 3)
    assert contents(run_dir) == (3, 3, 3)


def test_remote_step_is_replaced_after_the_new_save(monkeypatch):
    """A finished run is started again."""
    run_dir = "memory://bucket/again"
    save(make_checkpointer(run_dir), 4)
    again = make_checkpointer(run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "write_rows", lambda *_: os.close(-1))  # an OSError
        with pytest.raises(UserError, match="checkpoints/step_00000004 is intact"):
            save(again, 4)
    assert contents(run_dir) == (4, 4, 4)
    for _ in range(3):
        save(again, 4)
        assert contents(run_dir) == (4, 4, 4)
        assert len(again._directory._files.ls("/bucket/again/checkpoints", detail=False)) == 1


def test_metrics_of_a_remote_run(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    config = flags.defaults(metrics_log.LOGGER_FLAGS)
    for step in (1, 2):
        figures = metrics_log.Logger(config, "memory://bucket/figures", {})
        figures.log({"step": step})
        figures.close()
    with fsspec.open("memory://bucket/figures/metrics.jsonl") as file:
        assert file.read() == b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("run_dir", ["memory://bucket/kept", None])
def test_the_latest_and_every_fourth_are_kept(tmp_path, run_dir):
    """Also across starts, and after the run goes back to a milestone and saves lower steps again."""
    run_dir = run_dir or str(tmp_path)

    def steps():
        names = [os.path.basename(saved.name) for saved in checkpoints.list_checkpoints(run_dir)]
        return sorted({int(name.split("_")[1]) for name in names if name.startswith("step_")})

    for first in (1, 6):
        saver = make_checkpointer(run_dir, keep_latest=2, keep_every=4)
        for step in range(first, first + 5):
            save(saver, step)
    assert steps() == [4, 8, 9, 10]
    back = make_checkpointer(run_dir, keep_latest=2)
    for _ in range(2):  # the second one replaces the first
        save(back, 5)
        assert steps() == [4, 5, 8, 10] and checkpoints.latest_checkpoint(run_dir).step == 5
