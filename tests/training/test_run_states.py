"""A run directory in any state, and every request: the run goes on from the newest whole state, or refuses.

The run never starts at step 0 in silence, and deletes or replaces nothing that it did not write.
"""

import hashlib
import logging
import os
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import run_states_kit as states
from checkpoint_kit import make_checkpointer, save

from EasyLM import checkpoints
from EasyLM.errors import UserError
from EasyLM.training.start import StartFiles, StartPoint, find_start, read_arrays

MILESTONE = "streaming_train_state_20"
# State -> outcomes of the requests "resume" (also in a copy of the directory) and "go back to the milestone": the step
# at which the run goes on, or the words of the refusal. A third item is a part of the log.
NO_MILESTONE = f"there is no .*/{MILESTONE}"
TABLE = {
    states.whole: (40, 20),
    states.latest_is_missing: (40, 20),
    states.newest_is_gone: (20, 20, r"latest: checkpoints/step_00000040 no longer exists"),
    states.newest_is_truncated: (20, 20, r"checkpoints/step_00000040: .* bytes"),
    states.newest_lacks_its_last_array: (20, 20, r"checkpoints/step_00000040: .* bytes"),
    states.newest_is_joined_to_itself: (20, 20, r"checkpoints/step_00000040: .* occurs twice"),
    states.newest_is_joined_to_itself_without_checksums: (20, 20, r"checkpoints/step_00000040: .* occurs twice"),
    states.newest_has_damaged_metadata: (20, 20, r"step_00000040/metadata.json: not JSON"),
    states.newest_has_a_changed_data_position: (20, 20, r"step_00000040/dataset.json: its values are not those"),
    states.newest_has_a_changed_step: (20, 20, r"step_00000040/metadata.json: its values are not those"),
    states.newest_records_no_flags: (40, 20),
    states.newest_records_flags_of_another_type: (20, 20, r"step_00000040/metadata.json: .*flags"),
    states.newest_records_an_optimizer_of_another_type: (20, 20, r"step_00000040/metadata.json: .*optimizer"),
    states.newest_has_no_data_position: (20, 20, r"checkpoints/step_00000040: dataset.json is missing"),
    states.newest_is_empty: (20, 20, r"checkpoints/step_00000040: metadata.json is missing; dataset.json is missing"),
    states.newest_has_damaged_checksums: (20, 20, r"step_00000040/checksums.json"),
    # The arrays are read last. The refusal names the damaged one, and the milestone.
    states.newest_has_a_flipped_bit: (
        r"step_00000040/streaming_train_state: the array opt_state/mu/params/transformer/ln_f is damaged.*"
        r"--load_checkpoint: trainstate::.*/checkpoints/step_00000020/streaming_train_state \(step 20\)$",
        20,
    ),
    states.copied_into_files: (40, 20),
    states.copied_into_files_without_step_directories: (40, 20),
    states.copied_into_files_at_the_top_only: (40, 20),
    states.copied_into_files_and_latest_moved_away: (40, 20),
    states.copied_into_files_by_an_older_version: (40, 20),
    states.saved_by_an_older_version: (40, 20),
    states.only_dangling_links: (
        "none of its checkpoints can be used: streaming_train_state: latest/streaming_train_state no longer exists",
        NO_MILESTONE,
    ),
    states.only_the_milestone: (20, 20),
    states.only_the_milestone_as_files: (20, 20),
    states.files_of_the_release: (15, NO_MILESTONE),
    states.milestone_of_the_release: (15, NO_MILESTONE),
    states.state_of_the_release_alone: (r"streaming_train_state: does not belong to a complete checkpoint",) * 2,
    states.truncated_state_of_the_release: (r"none of its checkpoints can be used: .* truncated", NO_MILESTONE),
    states.interrupted_save_beside_whole_ones: (40, 20),
    states.interrupted_save_alone: (0, NO_MILESTONE, "holds no checkpoint, only an interrupted save"),
    states.all_are_damaged: (
        r"none of its checkpoints can be used: checkpoints/step_00000040: .*; checkpoints/step_00000020: .* truncated",
        "step_00000020/streaming_train_state: .* truncated",
    ),
    states.milestone_is_gone: (40, NO_MILESTONE),
    states.milestone_has_no_data_position: (40, "no dataset.json beside it; name one with --load_dataset_state"),
    states.milestone_has_no_metadata: (40, "no metadata.json beside it; name one with --load_metadata"),
    states.foreign_file_in_the_place_of_a_link: (r"dataset.json: does not belong to a complete checkpoint",) * 2,
    states.state_replaced_by_a_foreign_file: (r"streaming_train_state: does not belong to a complete checkpoint",) * 2,
    states.empty: (0, NO_MILESTONE, "holds no checkpoint; starting from step 0"),
}


def start(run_dir: pathlib.Path, load_checkpoint: str = "") -> int:
    """Starts a run and reads its state. Returns the step, which is the same in all files and arrays."""
    point = find_start(StartFiles(load_checkpoint), str(run_dir), checkpoints.CHECKPOINT_FORMATS)
    if not point.files.checkpoint:
        return 0
    assert point.dataset_state is not None
    state = read_arrays(point)
    assert int(state["step"]) == point.step
    if point.step != 15:  # the release's state has weights
        assert all(np.all(array == point.step) for array in jax.tree.leaves(state))
    return point.step


def copied(run_dir: pathlib.Path) -> pathlib.Path:
    """Copies a run directory with its links."""
    return pathlib.Path(shutil.copytree(run_dir, run_dir.with_name("copy"), symlinks=True))


@pytest.mark.parametrize("request_name", ["resume", "resume a copy", "go back to the milestone"])
@pytest.mark.parametrize("state", TABLE, ids=lambda state: state.__name__)
def test_every_state_and_request(tmp_path, caplog, state, request_name):
    caplog.set_level(logging.INFO)
    run_dir = tmp_path / "run"
    state(run_dir)
    resumed, back, *log = TABLE[state]
    run_dir = copied(run_dir) if request_name == "resume a copy" else run_dir
    spec, outcome = (f"trainstate::{run_dir}/{MILESTONE}", back) if request_name.startswith("go") else ("", resumed)
    before = states.digests(run_dir)
    if isinstance(outcome, str):
        with pytest.raises(UserError, match=outcome) as caught:
            start(run_dir, spec)
        assert "\n" not in str(caught.value) and str(run_dir) in str(caught.value)
        assert states.digests(run_dir) == before
        return
    own = set() if request_name == "resume a copy" else states.digests(run_dir / states.NEWEST)  # may be pruned
    caplog.clear()
    assert start(run_dir, spec) == outcome
    if not spec:
        assert f"resuming after step {outcome}" in caplog.text or outcome == 0
        assert all(re.search(words, caplog.text) for words in log)
    saver = make_checkpointer(run_dir)
    save(saver, outcome + 1)
    assert start(run_dir) == outcome + 1
    assert os.path.realpath(run_dir / states.STATE).endswith(f"checkpoints/step_{outcome + 1:08d}/{states.STATE}")
    assert before - own <= states.digests(run_dir) | interrupted(state, run_dir)


def test_updates_of_older_metadata_follow_its_accumulation():
    flags = {"optimizer": {"accumulate_gradient_steps": 4}}
    for metadata, updates in (
        ({}, 40),
        ({"flags": {}}, 40),
        ({"flags": flags}, 10),
        ({"flags": flags, "updates": 7}, 7),
    ):
        assert StartPoint(StartFiles(), [], None, {"step": 40, **metadata}, "run").updates == updates


def interrupted(state, run_dir) -> set[str]:
    """Temporary files are deleted."""
    return {hashlib.sha256(b"half").hexdigest()} if "interrupted" in state.__name__ else set()


def test_the_release_s_files_move_into_a_step_directory(tmp_path, caplog):
    run_dir = tmp_path / "run"
    states.files_of_the_release(run_dir)
    saver = make_checkpointer(run_dir)
    save(saver, 20)
    kept = run_dir / "checkpoints" / "kept_00000015"
    assert sorted(path.name for path in kept.iterdir()) == ["dataset.pkl", "metadata.pkl", states.STATE]
    assert "kept_00000015" in caplog.text
    save(saver, 21)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000021")
    assert start(run_dir) == 15


def test_a_later_save_of_a_lower_step_is_newer(tmp_path):
    """The run went back to its milestone; `latest` was then lost."""
    states.whole(tmp_path / "run")
    save(make_checkpointer(tmp_path / "run"), 24)
    save(make_checkpointer(tmp_path / "run"), 22, milestone=True)
    (tmp_path / "run" / "latest").unlink()
    assert start(tmp_path / "run") == 22


def test_a_step_directory_of_another_run_is_not_deleted(tmp_path):
    states.whole(tmp_path / "other")
    states.whole(tmp_path / "run")
    foreign = tmp_path / "run" / "checkpoints" / "step_00000030"
    shutil.copytree(tmp_path / "other" / states.NEWEST, foreign)
    for step in (44, 48):
        save(make_checkpointer(tmp_path / "run"), step)
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step_00000020", "step_00000030", "step_00000048"]


def test_a_milestone_is_replaced_only_by_a_milestone(tmp_path):
    states.whole(tmp_path / "run")
    saver = make_checkpointer(tmp_path / "run")
    save(saver, 20)
    save(saver, 21)
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step_00000020", "step_00000021"]
    assert start(tmp_path / "run", f"trainstate::{tmp_path}/run/{MILESTONE}") == 20


def test_a_file_system_without_links(tmp_path, monkeypatch, caplog):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", no_links)
    run_dir = tmp_path / "run"
    states.whole(run_dir)
    assert "no symbolic links" in caplog.text
    assert sorted(os.listdir(run_dir / "checkpoints")) == ["step_00000020", "step_00000040"]
    assert (run_dir / "latest").read_text() == "step_00000040"
    assert start(run_dir) == 40
    assert start(run_dir, f"trainstate::{run_dir}/{states.MILESTONE}/{states.STATE}") == 20
    monkeypatch.undo()  # copied to a file system with links
    assert start(run_dir) == 40
    save(make_checkpointer(run_dir), 44)
    assert (run_dir / "latest").is_symlink() and start(run_dir) == 44


def test_links_that_fail_do_not_lose_the_checkpoint(tmp_path, monkeypatch, caplog):
    saver = make_checkpointer(tmp_path / "run")
    save(saver, 20)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", full)
        save(saver, 24)
    assert "step_00000024 is saved; its links are not up to date" in caplog.text
    assert start(tmp_path / "run") == 24
    save(saver, 28)
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step_00000028"]


@pytest.mark.parametrize("damage", ["latest", "metadata.json", "streaming_train_state"])
def test_object_stores(damage):
    """A store without links: the object `latest`, or files of the newest checkpoint, are gone."""
    run_dir = f"memory://states/{damage}"
    saver = make_checkpointer(run_dir)
    for step in (20, 30, 40):
        save(saver, step, milestone=step == 20)
    files = saver._directory._files
    files.rm_file(f"{run_dir}/latest" if damage == "latest" else f"{run_dir}/{states.NEWEST}/{damage}")
    newest = checkpoints.latest_checkpoint(run_dir)
    expected = 40 if damage == "latest" else 20
    assert newest.step == expected
    save(make_checkpointer(run_dir), 44)
    assert checkpoints.latest_checkpoint(run_dir).step == 44
    steps = {name.rsplit("/", 1)[1] for name in files.ls(f"{run_dir}/checkpoints", detail=False)}
    own = damage != "metadata.json"  # without its metadata, the directory may belong to anyone
    assert steps == {"step_00000020", "step_00000044"} | (set() if own else {"step_00000040"})


def test_an_interrupted_save_on_an_object_store(caplog):
    """It is no checkpoint; the next start of the same run deletes it."""
    run_dir = "memory://states/interrupted"
    saver = make_checkpointer(run_dir)
    save(saver, 20)
    files = saver._directory._files
    files.rm_file(f"{run_dir}/checkpoints/step_00000020/metadata.json")
    with pytest.raises(UserError, match="none of its checkpoints can be used"):
        start(run_dir)
    files.pipe_file(f"{run_dir}/checkpoints/step_00000020/writing.json", b'{"run_directory": "%s"}' % run_dir.encode())
    assert start(run_dir) == 0
    make_checkpointer(run_dir)
    assert not checkpoints.has_interrupted_save(run_dir)
