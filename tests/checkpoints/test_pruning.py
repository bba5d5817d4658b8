"""Which checkpoints a run keeps, and errors while it deletes the others. Local and remote."""

import errno
import os
import shutil

import fsspec
import pytest
from checkpoint_kit import contents, make_checkpointer, save

from EasyLM import checkpoints
from EasyLM.checkpoints import run_directory


@pytest.fixture(params=["local", "remote"])
def run_dir(request, tmp_path, monkeypatch) -> str:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # takes most of the time
    return str(tmp_path / "run") if request.param == "local" else f"memory://bucket/{tmp_path.name}"


def steps(run_dir: str) -> list[int]:
    names = [os.path.basename(saved.name) for saved in checkpoints.list_checkpoints(run_dir)]
    return sorted({int(name.split("_")[1]) for name in names if name.startswith("step_")})


def delete_step(run_dir: str, step: int) -> None:
    directory = f"{run_dir}/checkpoints/step_{step:08d}"
    if "://" in run_dir:
        fsspec.filesystem("memory").rm(directory, recursive=True)
    else:
        shutil.rmtree(directory)


@pytest.mark.parametrize("keep_latest", [1, 3])
def test_the_kept_set_of_a_mixed_series(run_dir, keep_latest):
    """Milestones of both kinds count among the latest checkpoints, and are kept when they are older."""
    saver = make_checkpointer(run_dir, keep_latest=keep_latest, keep_every=20)
    series, milestones = range(4, 64, 4), {20, 24, 40, 48, 60}  # every 20, and those that are saved as milestones
    for step in series:
        save(saver, step, milestone=step % 24 == 0)
        saved = [other for other in series if other <= step]
        assert steps(run_dir) == sorted({*saved[-keep_latest:], *(milestones & {*saved})})
    assert steps(run_dir) == ([20, 24, 40, 48, 60] if keep_latest == 1 else [20, 24, 40, 48, 52, 56, 60])


@pytest.mark.parametrize("on_another_disk", [False, True])
def test_a_step_that_a_link_of_the_user_names_is_kept(tmp_path, on_another_disk):
    run = tmp_path / "run"
    run.mkdir()
    if on_another_disk:
        (tmp_path / "disk").mkdir()
        (run / "checkpoints").symlink_to(tmp_path / "disk")
    saver = make_checkpointer(run)
    save(saver, 1)
    (run / "best").symlink_to("checkpoints/step_00000001")
    for step in (2, 3):
        save(saver, step)
    assert steps(str(run)) == [1, 3]


def test_a_step_that_is_gone_does_not_end_the_pruning(run_dir, caplog):
    saver = make_checkpointer(run_dir, keep_latest=2)
    for step in (1, 2, 3):
        save(saver, step)
    delete_step(run_dir, 2)
    for step in (4, 5, 6):
        save(saver, step)
        assert steps(run_dir) == [step - 1, step]
    assert not caplog.text


def test_a_step_that_cannot_be_deleted_is_named_and_tried_again(tmp_path, monkeypatch, caplog):
    saver, rename = make_checkpointer(tmp_path, keep_latest=2), os.rename
    for step in (1, 2, 3):
        save(saver, step)

    def fail(source, target):
        if source.endswith("step_00000002"):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        for step in (4, 5):
            save(saver, step)
    assert steps(str(tmp_path)) == [2, 4, 5]
    assert f"{tmp_path}/checkpoints/step_00000002: cannot be deleted (Operation not permitted)" in caplog.text
    save(saver, 6)
    assert steps(str(tmp_path)) == [5, 6]


def test_the_names_of_one_step_show_their_order(run_dir):
    """Although a directory with a lower number is gone."""
    saver = make_checkpointer(run_dir)
    save(saver, 7, milestone=True)
    save(saver, 7)
    delete_step(run_dir, 7)
    save(saver, 7)
    names = [saved.name for saved in checkpoints.list_checkpoints(run_dir) if saved.save]
    assert "checkpoints/step_00000007_2" in names and contents(run_dir) == (7, 7, 7)


def test_files_of_orbax_are_on_disk_before_older_steps_are_deleted(tmp_path, monkeypatch):
    directory, state = run_directory.open_run_directory(str(tmp_path)), "orbax_train_state"
    directory.prepare()
    flushed, fsync, remove = [], os.fsync, run_directory._remove

    def record(descriptor):
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    for step in (1, 2):
        temporary = directory.begin(step)
        os.makedirs(f"{temporary}/{state}/d")
        for name in ("_METADATA", "d/0a"):
            with open(f"{temporary}/{state}/{name}", "wb") as file:
                file.write(b"x")
        wanted = {temporary, *(f"{temporary}/{name}" for name in (state, f"{state}/_METADATA", f"{state}/d"))}
        wanted |= {f"{temporary}/{state}/d/0a", f"{temporary}/metadata.json", f"{tmp_path}/checkpoints"}
        deleted = []

        def delete(path, wanted=wanted, deleted=deleted):
            assert wanted <= set(flushed)
            deleted.append(path)
            remove(path)

        monkeypatch.setattr(os, "fsync", record)
        monkeypatch.setattr(run_directory, "_remove", delete)
        directory.commit(temporary, step, {}, {"step": step}, False)
        assert len(deleted) == step - 1
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000002"]
