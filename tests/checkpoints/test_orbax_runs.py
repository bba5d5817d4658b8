"""Runs that save with Orbax: layout, pruning, damaged and interrupted saves, a copy, another format."""

import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoint_kit import assert_equal, contents, make_checkpointer, save, small_state

from EasyLM import checkpoints
from EasyLM.errors import UserError
from EasyLM.training.start import StartFiles, find_start, read_arrays

NEWEST, STATE = "checkpoints/step_00000040", "orbax_train_state"


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory) -> pathlib.Path:
    """A run that has saved 20, a milestone, 30 and 40. All numbers of a state are its step."""
    run_dir = tmp_path_factory.mktemp("orbax") / "run"
    saver = make_checkpointer(run_dir, format="orbax")
    for step in (20, 30, 40):
        save(saver, step, milestone=step == 20)
    return run_dir


@pytest.fixture
def run(saved_run, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved_run, tmp_path / "run", symlinks=True))


@pytest.mark.slow
def test_layout_and_pruning(run):
    assert sorted(os.listdir(run / "checkpoints")) == ["step_00000020", "step_00000040"]
    assert sorted(os.listdir(run / "latest")) == ["dataset.json", "metadata.json", STATE]
    names = {"dataset", "metadata"}
    links = {STATE, "latest", *(f"{name}.json" for name in names)}
    milestone = {f"{STATE}_20", *(f"{name}_20.json" for name in names)}
    assert set(os.listdir(run)) == {"checkpoints"} | links | milestone
    assert contents(str(run)) == (40, 40, 40)
    for prefix, target in (("trainstate", small_state(0)), ("trainstate_params", small_state(0).params)):
        loaded = checkpoints.load(f"{prefix}::{run}/{STATE}_20", target)
        assert all(np.all(array == 20) for array in jax.tree.leaves(loaded))


@pytest.mark.slow
def test_orbax_s_manager_reads_the_steps(run):
    """With its own options for the names of directories. Also `orbax::`, which takes the newest step."""
    options = ocp.CheckpointManagerOptions(step_prefix="step", step_format_fixed_length=8)
    with ocp.CheckpointManager(run / "checkpoints", options=options) as manager:
        assert manager.all_steps() == [20, 40]
        state = manager.restore(40, args=ocp.args.Composite(orbax_train_state=ocp.args.StandardRestore()))[STATE]
    assert_equal(state["params"], small_state(40).params)
    for path in (run, run / "checkpoints", run / "latest"):
        assert_equal(checkpoints.load(f"orbax::{path}"), small_state(40).params)


@pytest.mark.slow
def test_the_format_may_change_between_two_starts(run):
    save(make_checkpointer(run), 44)  # the milestone was saved in another directory, of which this one is a copy
    assert contents(str(run)) == (44, 44, 44) and not os.path.lexists(run / STATE)
    save(make_checkpointer(run, format="orbax"), 48)
    assert contents(str(run)) == (48, 48, 48) and not os.path.lexists(run / "streaming_train_state")
    assert not os.path.lexists(run / "checksums.json")
    assert sorted(os.listdir(run / "checkpoints"))[-1] == "step_00000048"
    assert "step_00000044" not in os.listdir(run / "checkpoints")


@pytest.mark.slow
def test_parameters_alone(tmp_path):
    """In bf16, and below `params`, as other tools save them."""
    saver = make_checkpointer(tmp_path, save_optimizer_state=False, format="orbax")
    save(saver, 3)
    newest = checkpoints.latest_checkpoint(str(tmp_path))
    assert newest.spec == f"orbax::{tmp_path}/checkpoints/step_00000003/orbax_params"
    params = checkpoints.load(newest.spec)
    assert_equal(params, jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), small_state(3).params))


def data_files(run) -> list[pathlib.Path]:
    """The files of the newest state that hold arrays, the largest first."""
    files = [path for path in (run / NEWEST / STATE).rglob("*") if path.is_file() and path.parent.name == "d"]
    return sorted(files, key=lambda path: -path.stat().st_size)


def whole(run):
    pass


def latest_is_missing(run):
    (run / "latest").unlink()


def newest_is_gone(run):
    shutil.rmtree(run / NEWEST)


def newest_is_truncated(run):
    path = data_files(run)[0]
    os.truncate(path, path.stat().st_size - 7)


def newest_lacks_a_file(run):
    data_files(run)[0].unlink()


def newest_has_no_state(run):
    shutil.rmtree(run / NEWEST / STATE)


def newest_has_a_damaged_tree(run):
    path = run / NEWEST / STATE / "_METADATA"
    path.write_bytes(b"x" * path.stat().st_size)


def newest_has_damaged_metadata(run):
    (run / NEWEST / "metadata.json").write_text('{"step": 4')


def newest_has_a_changed_data_position(run):
    path = run / NEWEST / "dataset.json"
    path.write_text(path.read_text().replace('"step": 40', '"step": 41'))


def newest_has_no_data_position(run):
    (run / NEWEST / "dataset.json").unlink()


def copied_into_files(run):
    subprocess.run(["cp", "-rL", run, run.with_name("copy")], check=True)
    shutil.rmtree(run)
    run.with_name("copy").rename(run)


def copied_into_files_at_the_top_only(run):
    copied_into_files(run)
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "latest")


def only_the_milestone(run):
    newest_is_gone(run)
    for name in ("latest", STATE, "dataset.json", "metadata.json"):
        (run / name).unlink()


def interrupted_save_beside_whole_ones(run):
    directory = run / "checkpoints" / ".tmp-44-0123abcd" / f"{STATE}.orbax-checkpoint-tmp"
    shutil.copytree(run / NEWEST / STATE, directory)


def all_are_damaged(run):
    newest_is_truncated(run)
    (run / "checkpoints" / "step_00000020" / "dataset.json").unlink()


# State -> the step at which the run goes on, or the words of the refusal; a part of the log.
TABLE = {
    whole: (40, ""),
    latest_is_missing: (40, ""),
    newest_is_gone: (20, "latest: checkpoints/step_00000040 no longer exists"),
    newest_is_truncated: (20, r"/d/\w+: has \d+ bytes, but \d+ were saved"),
    newest_lacks_a_file: (20, r"/d/\w+ is missing"),
    newest_has_no_state: (20, "step_00000040: the state is missing"),
    newest_has_a_damaged_tree: (20, "step_00000040/orbax_train_state: Orbax cannot read it"),
    newest_has_damaged_metadata: (20, "step_00000040/metadata.json: not JSON"),
    newest_has_a_changed_data_position: (20, "step_00000040/dataset.json: its values are not those"),
    newest_has_no_data_position: (20, "step_00000040: dataset.json is missing"),
    copied_into_files: (40, ""),
    copied_into_files_at_the_top_only: (40, ""),
    only_the_milestone: (20, ""),
    interrupted_save_beside_whole_ones: (40, ""),
    all_are_damaged: ("none of its checkpoints can be used: .* bytes.*; .*dataset.json is missing", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("state", TABLE, ids=lambda state: state.__name__)
def test_every_state(run, caplog, state):
    """The run goes on from the newest whole checkpoint and says why not from a newer one, or refuses."""
    caplog.set_level(logging.INFO)
    state(run)
    outcome, words = TABLE[state]
    if isinstance(outcome, str):
        with pytest.raises(UserError, match=outcome):
            find_start(StartFiles(), str(run), checkpoints.CHECKPOINT_FORMATS)
        return
    start = find_start(StartFiles(), str(run), checkpoints.CHECKPOINT_FORMATS)
    assert start.step == outcome and f"resuming after step {outcome}" in caplog.text
    assert re.search(words, caplog.text)
    assert all(np.all(array == outcome) for array in jax.tree.leaves(read_arrays(start, small_state(0))))
    save(make_checkpointer(run, format="orbax"), 50)
    assert contents(str(run)) == (50, 50, 50)
    assert not list((run / "checkpoints").glob(".tmp*"))


@pytest.mark.slow
def test_a_failed_save_leaves_the_previous_checkpoint(tmp_path):
    """With a limit of the operating system on the size of files."""
    program = f"""
        import resource, signal
        from checkpoint_kit import make_checkpointer, save
        from EasyLM.errors import UserError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        saver = make_checkpointer({str(tmp_path)!r}, format="orbax")
        save(saver, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 1 << 30))
        try:
            save(saver, 2)
        except UserError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        save(saver, 3)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}: the checkpoint was not saved (Orbax: " in done.stdout
    assert "File too large" in done.stdout and "checkpoints/step_00000001 is intact" in done.stdout
    assert contents(str(tmp_path)) == (3, 3, 3) and os.listdir(tmp_path / "checkpoints") == ["step_00000003"]


def test_orbax_on_object_stores(tmp_path):
    """It writes to gs:// alone."""
    for run_dir, expected in (("gs://b/run", True), ("s3://b/run", False), (str(tmp_path), False)):
        assert checkpoints.uses_orbax("auto", run_dir) == expected
        assert not checkpoints.uses_orbax("streaming", run_dir)
    assert checkpoints.uses_orbax("orbax", str(tmp_path)) and checkpoints.uses_orbax("orbax", "gs://b/run")
    with pytest.raises(UserError, match=r"^Orbax cannot write to s3://b/run: it writes to local paths and gs:// only"):
        make_checkpointer("s3://b/run", format="orbax")
    with pytest.raises(UserError, match="format='zip': choose one of 'auto', 'streaming', 'orbax'"):
        make_checkpointer(tmp_path, format="zip")
