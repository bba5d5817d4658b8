"""Results of stopped runs: when they are reused or rejected, and that a resumed run ends with the same metrics."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from runs_kit import read_json, write_clip, write_lines
from tokenizer_kit import run_main, write_image

from EasyLM.errors import UserError
from evaluation import batch_generation, eval_perplexity, eval_video_perplexity, fewshot, generate_videos
from evaluation.runs import Line, Results
from evaluation.runs.results import unfinished_name

SETTINGS = {"checkpoint": "", "vqgan": "", "temperature": 1.0}


def modified(folder: pathlib.Path) -> dict[pathlib.Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*.png"))}


@pytest.mark.slow
def test_a_stopped_run_resumes(model, lines, tmp_path):
    out = tmp_path / "o"
    settings = {**model, **lines, "n_candidates": 1, "batch_size_factor": 1, "mesh_dim": "1,1,-1"}
    settings |= {"output_base_dir": str(out), "output_json": str(tmp_path / "f.json"), "evaluate_mse": True}
    broken = tmp_path / "in" / "4.png"
    content = broken.read_bytes()
    broken.write_bytes(content[:100])
    write_lines(
        tmp_path / "lines.jsonl",
        {"input": ["0.png", "5.png"], "target": ["1.png"], "output": "0.png"},
        {"input": ["0.png", "4.png"], "target": ["1.png"], "output": "1.png"},
    )
    with pytest.raises(UserError, match=r"lines\.jsonl:3: .*4\.png: not a readable"):
        run_main(batch_generation, **settings)
    before = modified(out)
    (unfinished,) = out.glob("unfinished.*.jsonl")
    assert [path.name for path in before] == ["0.png"]
    broken.write_bytes(content)
    with pytest.raises(UserError, match=r"unfinished\..+\.jsonl: left by a stopped run with --temperature=1\.0, now"):
        run_main(batch_generation, **settings | {"temperature": 0.5})
    with open(unfinished, "a") as file:
        file.write('{"example": "cut o')
    run_main(batch_generation, **settings)
    after = modified(out)
    assert len(after) == 2 and before.items() <= after.items()
    assert not unfinished.exists()
    resumed = read_json(tmp_path / "f.json")
    contents = {path.name: path.read_bytes() for path in after}
    # A finished run leaves no results: this run starts from the first example.
    run_main(batch_generation, **settings | {"batch_size_factor": 2})
    assert read_json(tmp_path / "f.json") == resumed
    assert {path.name: path.read_bytes() for path in modified(out)} == contents
    assert not modified(out).items() & after.items()


# Runs the command of the second argument. The process kills itself after the first result.
KILLED = """
import importlib, json, os, signal, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
from tokenizer_kit import run_main
from evaluation.runs import Results
add = Results.add
def add_and_die(*args):
    add(*args)
    os.kill(os.getpid(), signal.SIGKILL)
Results.add = add_and_die
run_main(importlib.import_module(sys.argv[2]), **json.loads(sys.argv[3]))
"""


def program_settings(program, lines, root) -> dict:
    """Settings that give a program several results, one batch each."""
    clip_flags = {"input_files": f"{root}/clips/*", "frame_input": True, "stride": 1, "n_context_frames": 2}
    generation = {"n_candidates": 2, "n_new_frames": 1, "evaluate_mse": True, "batch_size_factor": 1}
    folders = {"input_dirs": f"{root}/in", "target_dirs": f"{root}/out", "clip_dirs": f"{root}/clips"}
    fewshot_flags = {"figures": "palette_iou", "palette": f"{root}/palette.txt", "n_shots": "0,1", "n_queries": 3}
    settings = {
        eval_perplexity: {**lines, "batch_size": 1},
        eval_video_perplexity: {**clip_flags, "batch_size": 1},
        batch_generation: {**lines, **generation, "output_base_dir": f"{root}/o"},
        generate_videos: {**clip_flags, **generation, "output_dir": f"{root}/o"},
        fewshot: {**folders, **fewshot_flags, "depth_range": "1,9", "output_picture": f"{root}/sheet.png"},
    }[program]
    return settings | {"mesh_dim": "1,1,-1"}  # a mesh on which a batch may be one example


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", [eval_perplexity, eval_video_perplexity, batch_generation, generate_videos, fewshot]
)
def test_a_killed_run_resumes_to_the_same_metrics(model, lines, tmp_path, monkeypatch, program):
    for i in range(8):
        write_image(tmp_path / "out" / f"{i}.png", 100 + i)
    for name in "ab":
        write_clip(tmp_path / "clips" / name, 4)
    (tmp_path / "palette.txt").write_text("0 0 0\n255 0 0\n0 0 255\n")
    settings = {**model, **program_settings(program, lines, tmp_path), "output_json": f"{tmp_path}/f.json"}
    command = [sys.executable, "-c", KILLED, os.pathsep.join(sys.path), program.__name__, json.dumps(settings)]
    ended = subprocess.run(command, timeout=240, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (unfinished,) = (path for path in tmp_path.rglob("*unfinished.*") if path.suffix != ".lock")
    assert len(unfinished.read_text().splitlines()) == 2 and not (tmp_path / "f.json").exists()
    added = []
    add = Results.add
    monkeypatch.setattr(Results, "add", lambda *arguments: added.append(arguments[1].name) or add(*arguments))

    def outcome():
        run_main(program, **settings)
        assert not list(tmp_path.rglob("*unfinished.*"))
        paths = [*tmp_path.glob("o/**/*.png"), *tmp_path.glob("sheet.png")]
        return read_json(tmp_path / "f.json"), {path: path.read_bytes() for path in paths}

    resumed, num_missing = outcome(), len(added)
    assert outcome() == resumed
    assert len(added) == 2 * num_missing + 1  # the second run starts from the first example


def test_results_are_valid_while_example_and_files_stay_the_same(tmp_path):
    example = Line("a:1", (str(tmp_path / "x.png"),))
    write_image(tmp_path / "x.png", 1)
    path = str(tmp_path / "r.jsonl")
    Results(path, SETTINGS).add(example, {"written": [str(tmp_path / "x.png")]})
    assert Results(path, SETTINGS).missing([example]) == []
    image_paths = example.inputs * 2
    Results(path, SETTINGS).add(Line("a:2", image_paths[:1], image_paths[:1], "o.png"), {})
    for edited in (
        Line("a:2", image_paths, (), "o.png"),
        Line("a:2", image_paths[:1], image_paths[:1], "p.png"),
    ):
        assert Results(path, SETTINGS).missing([edited]) == [edited]
    os.utime(tmp_path / "x.png", ns=(1, 1))
    assert Results(path, SETTINGS).missing([example]) == [example]
    Results(path, SETTINGS).add(example, {"written": [str(tmp_path / "gone.png")]})
    assert Results(path, SETTINGS).missing([example]) == [example]


def test_each_list_of_examples_has_its_own_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {unfinished_name(path) for path in ("a.jsonl", "b.jsonl", f"{tmp_path}/a.jsonl")}
    assert len(names) == 2 and all(name.startswith("unfinished.") and name.endswith(".jsonl") for name in names)


def test_finish_accepts_a_missing_file(tmp_path):
    path, example = tmp_path / "r.jsonl", Line("a:1", ())
    results = Results(str(path), SETTINGS)
    results.add(example, {"mse": 1.0})
    path.unlink()
    results.finish([example], ["mse"], "")


def test_a_file_without_a_result_accepts_other_settings(tmp_path):
    path, example = tmp_path / "r.jsonl", Line("a:1", ())
    Results(str(path), SETTINGS).add(example, {})
    path.write_text(path.read_text().splitlines(keepends=True)[0] + '{"example": "cut o')
    changed = SETTINGS | {"temperature": 0.5}
    Results(str(path), changed).add(example, {})
    assert Results(str(path), changed).missing([example]) == []


@pytest.mark.parametrize(
    ("line", "message"), [("{", "not JSON"), ("[]", "must be an object"), ("{}", "lacks the key 'example'")]
)
def test_a_damaged_line_of_a_stopped_run_is_named(tmp_path, line, message):
    path = tmp_path / "unfinished.jsonl"
    path.write_text(f"{json.dumps(SETTINGS)}\n{line}\n")
    with pytest.raises(UserError, match=rf"{path}:2: {message}.*; delete the file to start again"):
        Results(str(path), SETTINGS)
