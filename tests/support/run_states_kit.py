"""The states in which a run directory can be found: each function makes one from a run that saved 20, 30 and 40.

Step 20 is a milestone. Steps 30 and 40 are ordinary; the save of step 40 has deleted step 30.
"""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess

from checkpoint_kit import make_checkpointer, save
from tiny_run import GOLDEN

NEWEST, MILESTONE = "checkpoints/step_00000040", "checkpoints/step_00000020"
STATE = "streaming_train_state"


def digests(directory: pathlib.Path) -> set[str]:
    """The contents of all files in a directory, without those behind links."""
    files = [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def whole(run: pathlib.Path) -> None:
    saver = make_checkpointer(run)
    for step in (20, 30, 40):
        save(saver, step, milestone=step == 20)


def latest_is_missing(run):
    whole(run)
    (run / "latest").unlink()


def newest_is_gone(run):
    whole(run)
    shutil.rmtree(run / NEWEST)


def newest_is_truncated(run):
    whole(run)
    path = run / NEWEST / STATE
    os.truncate(path, path.stat().st_size - 7)


def newest_lacks_its_last_array(run):
    """Cut between two arrays, so that the rest is a valid file."""
    whole(run)
    data = (run / NEWEST / STATE).read_bytes()
    (run / NEWEST / STATE).write_bytes(data[: data.rindex(b"\x92", 0, data.rindex(b"ln_f"))])


def newest_is_joined_to_itself(run):
    whole(run)
    path = run / NEWEST / STATE
    path.write_bytes(path.read_bytes() * 2)


def newest_is_joined_to_itself_without_checksums(run):
    newest_is_joined_to_itself(run)
    (run / NEWEST / "checksums.json").unlink()


def newest_has_a_flipped_bit(run):
    whole(run)
    data = bytearray((run / NEWEST / STATE).read_bytes())
    data[-3] ^= 4
    (run / NEWEST / STATE).write_bytes(data)


def newest_has_damaged_metadata(run):
    whole(run)
    (run / NEWEST / "metadata.json").write_text('{"step": 4')


def newest_has_a_changed_data_position(run):
    """A digit has changed. The file is valid without its digest."""
    whole(run)
    path = run / NEWEST / "dataset.json"
    path.write_text(path.read_text().replace('"step": 40', '"step": 41'))


def newest_has_a_changed_step(run):
    whole(run)
    path = run / NEWEST / "metadata.json"
    path.write_text(path.read_text().replace('"step": 40', '"step": 41'))


def newest_records_no_flags(run):
    whole(run)
    _record_flags(run)


def newest_records_flags_of_another_type(run):
    whole(run)
    _record_flags(run, flags=[])


def newest_records_an_optimizer_of_another_type(run):
    whole(run)
    _record_flags(run, flags={"optimizer": "adamw"})


def _record_flags(run, **flags):
    path = run / NEWEST / "metadata.json"
    metadata = json.loads(path.read_text())
    del metadata["flags"], metadata["digest"]
    path.write_text(json.dumps(metadata | flags))


def newest_has_no_data_position(run):
    whole(run)
    (run / NEWEST / "dataset.json").unlink()


def newest_is_empty(run):
    whole(run)
    for path in (run / NEWEST).iterdir():
        path.unlink()


def newest_has_damaged_checksums(run):
    whole(run)
    (run / NEWEST / "checksums.json").write_text("[]")


def copied_into_files(run):
    whole(run.with_name("original"))
    subprocess.run(["cp", "-rL", run.with_name("original"), run], check=True)


def copied_into_files_without_step_directories(run):
    copied_into_files(run)
    shutil.rmtree(run / "checkpoints")


def copied_into_files_at_the_top_only(run):
    copied_into_files_without_step_directories(run)
    shutil.rmtree(run / "latest")


def copied_into_files_and_latest_moved_away(run):
    copied_into_files(run)
    (run / "latest").rename(run.with_name("away"))


def copied_into_files_by_an_older_version(run):
    whole(run.with_name("original"))
    _age(run.with_name("original"))
    subprocess.run(["cp", "-rL", run.with_name("original"), run], check=True)


def saved_by_an_older_version(run):
    whole(run)
    _age(run)


def _age(run):
    """Removes what older versions did not write."""
    for directory in (run / "checkpoints").iterdir():
        (directory / "checksums.json").unlink()
        metadata = json.loads((directory / "metadata.json").read_text())
        del metadata["save"], metadata["digest"]
        (directory / "metadata.json").write_text(json.dumps(metadata))
    for path in run.glob("checksums*"):
        path.unlink()


def only_dangling_links(run):
    """As `cp -r` of the links, or a clean-up of large files leaves it."""
    newest_is_gone(run)
    shutil.rmtree(run / "checkpoints")
    for path in (run / "latest", *run.glob("*_20*")):
        path.unlink()


def only_the_milestone(run):
    newest_is_gone(run)
    for name in ("latest", STATE, "checksums.json", "dataset.json", "metadata.json"):
        (run / name).unlink()


def only_the_milestone_as_files(run):
    whole(run.with_name("original"))
    run.mkdir()
    for path in run.with_name("original").glob("*_20*"):
        shutil.copy(path, run)


def files_of_the_release(run):
    shutil.copytree(GOLDEN / "step15", run)


def milestone_of_the_release(run):
    run.mkdir()
    for path in (GOLDEN / "step15").iterdir():
        shutil.copy(path, run / f"{path.stem}_15{path.suffix}")


def state_of_the_release_alone(run):
    run.mkdir()
    shutil.copy(GOLDEN / "step15" / STATE, run)


def truncated_state_of_the_release(run):
    files_of_the_release(run)
    os.truncate(run / STATE, 100_000)


def interrupted_save_beside_whole_ones(run):
    whole(run)
    _interrupted_save(run, 44)


def interrupted_save_alone(run):
    _interrupted_save(run, 20)


def _interrupted_save(run, step):
    directory = run / "checkpoints" / f".tmp-{step}-0123abcd"
    directory.mkdir(parents=True)
    (directory / STATE).write_bytes(b"half")


def all_are_damaged(run):
    newest_is_truncated(run)
    os.truncate(run / MILESTONE / STATE, 10)


def milestone_is_gone(run):
    whole(run)
    shutil.rmtree(run / MILESTONE)


def milestone_has_no_data_position(run):
    whole(run)
    (run / MILESTONE / "dataset.json").unlink()


def milestone_has_no_metadata(run):
    whole(run)
    (run / MILESTONE / "metadata.json").unlink()


def foreign_file_in_the_place_of_a_link(run):
    run.mkdir()
    (run / "dataset.json").write_text('{"images": 7}')


def state_replaced_by_a_foreign_file(run):
    whole(run)
    (run / STATE).unlink()
    (run / STATE).write_bytes(b"something else")


def empty(run):
    run.mkdir()
