"""Shards, speed settings and interruptions do not change the bytes of a build."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizer_kit
from build_kit import SETTINGS, Killed, build_records, kill_at_line, report_of, skipped_names
from tokenizer_kit import write_image

from EasyLM.errors import UserError
from tokenizer import build, mix
from tokenizer.builders import resumable_file


@pytest.mark.parametrize("kind", ["paired", "video", "inpainting"])
def test_concatenated_shards_are_the_whole_file(tree, tiny, tmp_path, kind):
    build_records(tree, tiny, tmp_path / "whole.jsonl", kind)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for count in (2, 3, 9):
        parts = [tmp_path / f"{i}.jsonl" for i in range(count)]
        for i, part in enumerate(parts):
            build_records(tree, tiny, part, kind, shard=f"{i}/{count}")
        assert b"".join(part.read_bytes() for part in parts) == whole


def test_the_tasks_of_an_array_build_their_own_parts(tree, tiny, tmp_path, monkeypatch):
    build_records(tree, tiny, tmp_path / "whole.jsonl", "images")
    for name, value in {"COUNT": 3, "MIN": 0, "MAX": 2}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    for task in range(3):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        settings = {"input_dir": str(tree / "image"), "vqgan": tiny, "batch_size": 8, "workers": 1, "shard": "auto"}
        tokenizer_kit.run_main(build, output_file=f"{tmp_path}/part_{{i}}_of_{{n}}.jsonl", **settings)
    parts = [tmp_path / f"part_{task}_of_3.jsonl" for task in range(3)]
    assert b"".join(part.read_bytes() for part in parts) == (tmp_path / "whole.jsonl").read_bytes()
    assert [report_of(part)["identity"]["shard"] for part in parts] == [f"{task}/3" for task in range(3)]
    tokenizer_kit.run_main(mix, inputs=f"{tmp_path}/part_*.jsonl", output_file=str(tmp_path / "mixed.jsonl"))
    parts[1].unlink()
    with pytest.raises(UserError, match="1 are missing: 1"):
        tokenizer_kit.run_main(mix, inputs=f"{tmp_path}/part_*.jsonl", output_file=str(tmp_path / "mixed.jsonl"))
    tokenizer_kit.run_main(build, output_file=f"{tmp_path}/{{i}}.jsonl", **{**settings, "shard": "3/11"})
    assert (tmp_path / "03.jsonl").exists()  # the order of the names is that of the parts


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["video", "category"])
def test_shards_workers_and_resumed_builds_skip_the_same_broken_input(tree, tiny, tmp_path, monkeypatch, kind):
    folder = SETTINGS[kind]["input_dir"]
    shutil.copytree(tree / folder, tmp_path / folder)
    broken = tmp_path / folder / {"video": "one.mp4", "category": "bee/1.jpg"}[kind]
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 3])
    files = {}
    for workers in (1, 2):
        settings = {"workers": workers, "max_errors": 1}
        whole = tmp_path / f"whole{workers}.jsonl"
        build_records(tmp_path, tiny, whole, kind, **settings)
        assert skipped_names(whole).keys() == {broken.name}
        parts = [tmp_path / f"{workers}_{i}.jsonl" for i in range(3)]
        for i, part in enumerate(parts):
            build_records(tmp_path, tiny, part, kind, **settings, shard=f"{i}/3")
        files[workers] = whole.read_bytes()
        assert files[workers] and b"".join(part.read_bytes() for part in parts) == files[workers]
        with monkeypatch.context() as patch:
            patch.setattr(resumable_file, "SAVE_SECONDS", 0)
            kill_at_line(patch, 1)
            again = tmp_path / f"again{workers}.jsonl"
            with pytest.raises(Killed):
                build_records(tmp_path, tiny, again, kind, **settings)
        build_records(tmp_path, tiny, again, kind, **settings)
        assert again.read_bytes() == files[workers] and skipped_names(again) == skipped_names(whole)
    assert files[1] == files[2]


def test_a_file_depends_on_the_seed_but_not_on_speed_settings(tree, tiny, tmp_path):
    settings = {"kind": "inpainting", "n_epochs": 2}
    build_records(tree, tiny, tmp_path / "a.jsonl", **settings)
    first = (tmp_path / "a.jsonl").read_bytes()
    for name, changes in {"b": {"batch_size": 16, "workers": 2}, "c": {"batch_size": 1, "cache_pictures": 1}}.items():
        build_records(tree, tiny, tmp_path / f"{name}.jsonl", **settings, **changes)
        assert (tmp_path / f"{name}.jsonl").read_bytes() == first
    build_records(tree, tiny, tmp_path / "d.jsonl", **settings, seed=6)
    assert (tmp_path / "d.jsonl").read_bytes() != first


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["paired", "multi_sequence", "video"])
def test_a_killed_build_resumes_to_the_same_bytes(tree, tiny, tmp_path, monkeypatch, kind):
    build_records(tree, tiny, tmp_path / "whole.jsonl", kind)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = whole.count(b"\n")
    monkeypatch.setattr(resumable_file, "SAVE_SECONDS", 0)
    write_line = resumable_file.ResumableFile.write
    for last in range(lines):
        written = kill_at_line(monkeypatch, last)
        output = tmp_path / f"{last}.jsonl"
        with pytest.raises(Killed):
            build_records(tree, tiny, output, kind)
        assert not output.exists()
        assert pathlib.Path(f"{output}.partial").stat().st_size > len(b"".join(written))
        again = []
        monkeypatch.setattr(
            resumable_file.ResumableFile,
            "write",
            lambda f, data, again=again: (again.append(data), write_line(f, data)),
        )
        build_records(tree, tiny, output, kind)
        assert output.read_bytes() == whole
        assert len([data for data in again if data]) == lines - last  # no line was built twice
        for name in ("sentences", "pictures"):
            assert report_of(output)[name] == report_of(tmp_path / "whole.jsonl")[name]
        assert {path.name for path in tmp_path.glob(f"{last}.*")} == {output.name, f"{output.name}.report.json"}


def test_a_stopped_build_does_not_resume_with_other_settings_or_inputs(tree, tiny, tmp_path, monkeypatch):
    for i in range(5):
        write_image(tmp_path / "in" / f"{i}.png", i)
    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(resumable_file, "SAVE_SECONDS", 0)
    (tmp_path / "in" / "3.png").write_bytes(b"broken")
    settings = {"kind": "images", "input_dir": str(tmp_path / "in")}
    with pytest.raises(UserError, match=r"3\.png: not a readable image.*max_errors=0"):
        build_records(tree, tiny, output, **settings)
    with pytest.raises(UserError, match=r"out\.jsonl\.partial was started with .* seed=6 \(then: 5\)"):
        build_records(tree, tiny, output, **settings, seed=6)
    # max_errors does not affect the sentences, so the build resumes.
    assert len(build_records(tree, tiny, output, **settings, max_errors=1)) == 4
    write_image(tmp_path / "in" / "3.png", 3)
    (tmp_path / "in" / "4.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"4\.png: not"):
        build_records(tree, tiny, output, **settings)
    write_image(tmp_path / "in" / "4.png", 4)
    with pytest.raises(UserError, match=r"other settings or inputs: inputs=\w+ \(then: \w+\)"):
        build_records(tree, tiny, output, **settings)
    assert len(build_records(tree, tiny, output, **settings, fresh=True)) == 5


def test_the_log_of_a_resumed_build_begins_where_it_resumes(tree, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resumable_file, "SAVE_SECONDS", 0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_line(patch, 3)
        build_records(tree, tiny, tmp_path / "out.jsonl", "images")
    capsys.readouterr()
    build_records(tree, tiny, tmp_path / "out.jsonl", "images")
    first, last = (line for line in capsys.readouterr().err.splitlines() if line.startswith("out.jsonl:"))
    assert " 2/5 " in first and " 5/5 " in last


def test_a_finished_file_is_kept_unless_something_changed(tree, tiny, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.jsonl"
    first = build_records(tree, tiny, output, "images")
    with monkeypatch.context() as patch:
        patch.setattr(build, "write_sentences", lambda *_: pytest.fail("built again"))
        build_records(tree, tiny, output, "images", batch_size=4)
        assert "is already complete: 5 sentences" in capsys.readouterr().out
    output.write_bytes(output.read_bytes()[:-40])
    assert len(build_records(tree, tiny, output, "images")) == len(first)
    assert report_of(output)["files_passed_over"] == {}
    assert len(build_records(tree, tiny, output, "colorization")) == 4


# A build that saves its progress after each sentence and waits for SIGKILL after ARGV[1] saves; 0: it finishes.
BUILD = """
import sys, time
from EasyLM import flags
from tokenizer import build
from tokenizer.builders import resumable_file
left, save = int(sys.argv.pop(1)), resumable_file.ResumableFile.save
def save_and_wait(*arguments):
    global left
    save(*arguments)
    left -= 1
    if left == 0:
        time.sleep(3600)
resumable_file.SAVE_SECONDS, resumable_file.ResumableFile.save = 0, save_and_wait
flags.run(build.main, build.FLAGS)
"""


@pytest.mark.slow
def test_sigkill_at_any_time(tree, tiny, tmp_path):
    """Builds that are killed at random times resume to the same bytes. Their workers exit with them."""
    for i in range(150):
        write_image(tmp_path / "in" / f"{i}.png", i)

    def command(sentences, name):
        flags = ["--kind=colorization", f"--input_dir={tmp_path / 'in'}", "--n_shots=2", "--n_epochs=2", "--workers=2",
                 "--batch_size=4", f"--vqgan={tiny}", f"--output_file={tmp_path / name}"]  # fmt: skip
        return [sys.executable, "-c", BUILD, f"{sentences}", *flags]

    def done():
        progress = tmp_path / "out.jsonl.progress.json"
        return json.loads(progress.read_text())["state"]["sentences"] if progress.exists() else 0

    ended = subprocess.run(command(0, "whole.jsonl"), check=True, capture_output=True)
    assert b"150 sentences" in ended.stdout
    workers, rng = [], np.random.default_rng(0)
    for _ in range(3):
        goal = done() + rng.integers(1, 9)
        process = subprocess.Popen(command(40, "out.jsonl"), stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 240
            while done() < goal:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.001)
            workers += pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
    assert len(workers) >= 3 * 2
    subprocess.run(command(0, "out.jsonl"), check=True, capture_output=True)
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{worker}") for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [worker for worker in workers if os.path.exists(f"/proc/{worker}")]
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
