"""Processes share the parts of a build: each part is built once, those of dead processes are taken over."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizer_kit
from build_kit import Killed, build_records, kill_at_line, report_of
from source_kit import files_of, write_tars
from tokenizer_kit import write_image

from EasyLM.errors import UnavailableError, UserError
from EasyLM.storage import HeartbeatLock, LockedError
from tokenizer import build, mix
from tokenizer.builders import claims, resumable_file


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Four parts, and a function that builds one and notes its number."""
    paths = [str(tmp_path / f"{part}.jsonl") for part in range(4)]
    built = []

    def build_part(part):
        with HeartbeatLock(paths[part], is_output=True):
            built.append(part)
            pathlib.Path(paths[part]).touch()

    def run(first=0, begun_only=False, build_part=build_part):
        return claims.build_parts(paths, first, build_part, begun_only, str(tmp_path / "{i}.jsonl"))

    run.paths, run.built, run.build_part = paths, built, build_part
    return run


def test_a_process_builds_all_parts_from_its_own_on(parts):
    assert parts(first=2) == [] and parts.built == [2, 3, 0, 1]


def test_parts_in_progress_are_left_or_awaited(parts, tmp_path, monkeypatch):
    """The process that waits takes over what another one leaves. A further process does not wait."""
    held = HeartbeatLock(parts.paths[1], is_output=True)
    with HeartbeatLock(str(tmp_path / "{i}.jsonl"), is_output=True):
        assert parts() == [1] and parts.built == [0, 2, 3]
    monkeypatch.setattr(time, "sleep", lambda seconds: held.release())
    assert parts() == [] and parts.built[3:] == [0, 2, 3, 1]
    assert not list(tmp_path.glob(".*"))  # no lock remains


def test_no_lock_remains_of_a_process_that_was_killed_while_it_waited(parts, tmp_path):
    """The processes that finish the parts need not wait, and so do not take over this lock."""
    lock = tmp_path / ".{i}.jsonl.lock"
    with HeartbeatLock(str(tmp_path / "{i}.jsonl"), is_output=True):
        content = json.loads(lock.read_bytes())
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    lock.write_text(json.dumps(content | {"process": killed.pid}))
    assert parts() == [] and not list(tmp_path.glob(".*"))


def test_without_a_number_of_parts_only_begun_ones_are_taken_over(parts, tmp_path):
    """The tasks of the others can still be waiting in a queue, or write into another folder."""
    pathlib.Path(f"{parts.paths[1]}.partial").touch()
    assert parts(first=3, begun_only=True) == [0, 2] and parts.built == [3, 1]


def test_a_part_that_fails_or_is_lost_to_another_process_does_not_stop_the_others(parts):
    tries = []

    def build_part(part):
        tries.append(part)
        if part == 1:
            raise UserError("bad.png: not an image")
        if part == 0 and tries.count(0) == 1:
            raise LockedError("in use")
        parts.build_part(part)

    with pytest.raises(UserError, match=r"1\.jsonl: bad\.png: not an image$"):
        parts(build_part=build_part)
    assert parts.built == [2, 3, 0] and tries.count(1) == 1


def test_a_store_that_is_not_there_ends_the_build(parts):
    """Otherwise each of a thousand parts would fail in turn."""
    tries = []

    def build_part(part):
        tries.append(part)
        raise UnavailableError("s3://bucket/2.tar: not reachable")

    with pytest.raises(UnavailableError, match=r"^s3://bucket/2\.tar: not reachable$"):
        parts(first=2, build_part=build_part)
    assert tries == [2]


SETTINGS = {"kind": "inpainting", "n_shots": 2, "seed": 5, "batch_size": 8, "workers": 1}


def run_parts(tiny, folder, **settings) -> list[pathlib.Path]:
    """Builds parts in this process; returns their files."""
    settings = {"vqgan": tiny, "shard": "auto", "output_file": f"{folder}/part_{{i}}.jsonl", **SETTINGS, **settings}
    tokenizer_kit.run_main(build, **settings)
    return sorted(folder.glob("part_*.jsonl"))


def test_the_parts_are_the_whole_file_without_a_batch_system(tree, tiny, tmp_path, capsys):
    build_records(tree, tiny, tmp_path / "whole.jsonl", **SETTINGS, input_dir="image", n_epochs=3)
    settings = {"input_dir": f"{tree}/image", "n_epochs": 3, "parts": "4"}
    files = run_parts(tiny, tmp_path, **settings)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert len(files) == 4 and whole and b"".join(file.read_bytes() for file in files) == whole
    files[1].unlink()
    before = [file.stat().st_mtime_ns for file in files if file.exists()]
    run_parts(tiny, tmp_path, **settings)
    assert [file.stat().st_mtime_ns for file in files if file != files[1]] == before  # not built again
    assert "4 of 4 parts are finished" in capsys.readouterr().out
    assert b"".join(file.read_bytes() for file in files) == whole


def test_each_tar_is_a_part_of_its_own_images(tree, tiny, tmp_path):
    tars = write_tars(tmp_path / "in", files_of(tree / "image"))
    files = run_parts(tiny, tmp_path, input_dir=f"{tmp_path}/in", parts="files")
    assert len(files) == len(tars) == 2
    for i, tar in enumerate(tars):  # other shuffles: the seed is that of the part
        alone = SETTINGS | {"input_dir": str(tar), "seed": 5 + i, "n_epochs": 1}
        assert build_records("", tiny, tmp_path / "alone.jsonl", **alone, fresh=True)
        assert files[i].read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    tokenizer_kit.run_main(mix, inputs=f"{tmp_path}/part_*.jsonl", output_file=f"{tmp_path}/mixed.jsonl")
    files[1].unlink()
    with pytest.raises(UserError, match="1 are missing: 1"):
        tokenizer_kit.run_main(mix, inputs=f"{tmp_path}/part_*.jsonl", output_file=f"{tmp_path}/mixed.jsonl")
    tars[0].write_bytes(tars[0].read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"part_0\.jsonl: .*000\.tar: not a whole tar file .*max_errors=0"):
        run_parts(tiny, tmp_path, input_dir=f"{tmp_path}/in", parts="files")
    assert files[1].exists()


def test_after_a_change_of_settings_the_message_says_how_to_start_again(tree, tiny, tmp_path, monkeypatch):
    """Not by --fresh, which --parts refuses."""
    settings = {"input_dir": f"{tree}/image", "parts": "2", "n_epochs": 2}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(resumable_file, "SAVE_SECONDS", 0)
        kill_at_line(patch, 1)
        run_parts(tiny, tmp_path, **settings)
    with pytest.raises(UserError, match=r"part_0\.jsonl\.partial was started .* seed=6 .* delete it to start") as e:
        run_parts(tiny, tmp_path, **settings, seed=6)
    assert "fresh" not in str(e.value)
    (tmp_path / "part_0.jsonl.partial").unlink()
    files = run_parts(tiny, tmp_path, **settings, seed=6)
    assert len(files) == 2 and not list(tmp_path.glob("*.progress.json"))


def test_a_tar_without_a_sentence_is_skipped(tree, tiny, tmp_path):
    images = files_of(tree / "image")
    write_tars(tmp_path / "in", {f"{i}.png": data for i, data in enumerate([*images.values()] * 2)}, 4)
    settings = {"input_dir": f"{tmp_path}/in", "parts": "files", "n_shots": 3}
    with pytest.raises(UserError, match=r"002\.tar: --n_shots=3: there are only 2 inputs .*\(2 parts could not"):
        run_parts(tiny, tmp_path, **settings)
    *_, last = run_parts(tiny, tmp_path, **settings, max_errors=1)
    assert last.read_bytes() == b"" and len(report_of(last)["skipped"]) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard": "0/1"}, "--parts=2: needs --shard=auto"),
        ({"output_file": "part.jsonl"}, r"--output_file=part.jsonl must contain \{i\}"),
        ({"fresh": True}, r"--fresh would discard the parts of other processes.* end them and delete .*/\*\.jsonl\*"),
        ({"parts": "0"}, "--parts=0: must be a number of at least 1, or files"),
        ({"parts": "many"}, "--parts=many: must be a number of at least 1, or files"),
        ({"parts": "files"}, "--parts=files: --input_dir=IN: is a folder of files, not of tars or tables: give"),
    ],
)
def test_unsuitable_parts_are_refused(tree, tiny, tmp_path, settings, message):
    settings = {"parts": "2", "shard": "auto", "output_file": f"{tmp_path}/{{i}}.jsonl"} | settings
    with pytest.raises(UserError, match=message.replace("IN", f"{tree}/image")):
        tokenizer_kit.run_main(build, **SETTINGS, vqgan=tiny, input_dir=f"{tree}/image", **settings)
    assert not list(tmp_path.iterdir())


# A process that saves its progress after each sentence, and kills itself at sentence ARGV[1]; 0: it does not.
PROCESS = """
import os, signal, sys
from EasyLM import flags
from tokenizer import build
from tokenizer.builders import claims, resumable_file, writing
left, record_line = int(sys.argv.pop(1)), writing._record_line
def line_or_death(*arguments):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return record_line(*arguments)
resumable_file.SAVE_SECONDS, writing._record_line, claims._POLL_SECONDS = 0, line_or_death, 0.1
flags.run(build.main, build.FLAGS)
"""


@pytest.mark.slow
@pytest.mark.parametrize("store", ["", "file://"])
def test_processes_that_are_killed_leave_the_bytes_of_one_process(tiny, tmp_path, store):
    """Three of four processes are killed, in the middle of any of the parts. fsspec writes the URLs."""
    for i in range(24):
        write_image(tmp_path / "in" / f"{i}.png", i)
    settings = SETTINGS | {"input_dir": f"{tmp_path}/in", "n_epochs": 2}
    build_records("", tiny, tmp_path / "whole.jsonl", **settings)
    settings |= {"vqgan": tiny, "shard": "auto", "parts": "7", "output_file": f"{store}{tmp_path}/p{{i}}.jsonl"}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    sentences = [*np.random.default_rng(0).integers(2, 8, 3).tolist(), 0]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROCESS]
    processes = [
        subprocess.Popen([*command, str(count), *flags], env=environment, stderr=subprocess.PIPE, text=True)
        for count in sentences
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes[3] == 0 and {*codes} <= {0, -signal.SIGKILL}, (codes, errors)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("p*.jsonl.report.json")}
    # If a process was killed after the last one had ended, what it left is finished now.
    tokenizer_kit.run_main(build, **settings)
    files = sorted(tmp_path.glob("p*.jsonl"))
    assert len(files) == 7 and b"".join(file.read_bytes() for file in files) == (tmp_path / "whole.jsonl").read_bytes()
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())  # none was built again
    assert not list(tmp_path.glob(".p*")) and not list(tmp_path.glob("*.partial"))
