"""The four evaluation commands with a tiny tokenizer and model: output files, metrics, and errors at the start."""

import json
import os
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from prompting_kit import tiny_logits
from runs_kit import LENGTHS, read_json, write_clip, write_lines
from tokenizer_kit import run_main, write_image

from EasyLM.errors import UserError
from evaluation import batch_generation, eval_perplexity, eval_video_perplexity, generate_videos
from tokenizer.media import images
from tokenizer.vqgan import Codec


@pytest.mark.slow
def test_perplexity_follows_its_definition(model, lines, tmp_path):
    run_main(eval_perplexity, **model, **lines, batch_size=2, output_json=str(tmp_path / "out" / "f.json"))
    codec = Codec(model["vqgan"])
    expected = []
    for line in map(json.loads, (tmp_path / "lines.jsonl").read_text().split()):
        pixels = [images.load(f"{lines['input_base_dir']}/{name}", 16) for name in line["input"] + line["target"]]
        row_T = codec.encode(np.stack(pixels)).reshape(-1)
        log_p_TV = jax.nn.log_softmax(tiny_logits(row_T))
        expected.append(float(np.exp(-log_p_TV[np.arange(len(row_T) - 1), row_T[1:]][-64:].mean())))
    result = read_json(tmp_path / "out" / "f.json")
    per_example = [row["perplexity"] for row in result["per_example"]]
    np.testing.assert_allclose(per_example, expected, rtol=1e-4)
    assert result["perplexity"] == pytest.approx(np.mean(per_example))
    assert result["perplexity_standard_error"] == pytest.approx(np.std(per_example, ddof=1) / 2)
    assert [row["example"] for row in result["per_example"]] == [f"{lines['input_file']}:{n}" for n in (1, 3, 5, 7)]
    assert os.listdir(tmp_path / "out") == ["f.json"]


@pytest.mark.slow
def test_answers_have_the_requested_names_and_sizes(model, lines, tmp_path):
    run_main(
        batch_generation,
        **model,
        **lines,
        output_base_dir=str(tmp_path / "o"),
        output_json=str(tmp_path / "f.json"),
        n_candidates=2,
        resize_output="original",
        include_input=True,
        evaluate_mse=True,
    )
    assert sorted(p.name for p in (tmp_path / "o").rglob("*") if p.is_file()) == sorted(
        f"{i}{number}.png" for i in range(4) for number in ("", "_0", "_1")
    )
    for i, count in enumerate(LENGTHS):
        width, height = (50, 30) if i == 3 else (20, 20)
        sheet, *parts = (np.asarray(Image.open(tmp_path / "o" / "d" / f"{i}{n}.png")) for n in ("", "_0", "_1"))
        assert sheet.shape == (2 * height, (count + 1) * width, 3)
        np.testing.assert_array_equal(sheet, np.concatenate(parts))
    result = read_json(tmp_path / "f.json")
    errors = np.array([row["mse"] for row in result["per_example"]])
    assert result["mse"] == pytest.approx(errors.mean()) and result["best_mse"] == pytest.approx(errors.min(1).mean())
    assert 0 < result["best_mse"] < result["mse"]


@pytest.mark.slow
def test_clips_are_measured_and_continued(model, tmp_path):
    for name in ("a", "b"):
        write_clip(tmp_path / "clips" / name, 6)
    settings = {**model, "input_files": f"{tmp_path}/clips/*", "frame_input": True, "stride": 1, "n_context_frames": 2}
    settings |= {"output_json": str(tmp_path / "f.json")}
    run_main(eval_video_perplexity, **settings, n_target_frames=2)
    result = read_json(tmp_path / "f.json")
    assert [row["example"] for row in result["per_example"]] == ["a", "b"]
    assert all(row["perplexity"] > 1 and row["tokens"] == 2 * 64 for row in result["per_example"])
    out = tmp_path / "o"
    run_main(generate_videos, **settings, n_new_frames=1, n_candidates=2, output_dir=str(out), evaluate_mse=True)
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.*")) == sorted(
        name for clip in "ab" for name in (f"{clip}.png", f"{clip}/0/000.png", f"{clip}/1/000.png")
    )
    sheet = np.asarray(Image.open(out / "a.png"))
    assert sheet.shape == (2 * 16, 3 * 16, 3)
    for candidate in range(2):
        np.testing.assert_array_equal(
            sheet[16 * candidate :][:16, 32:], np.asarray(Image.open(out / "a" / str(candidate) / "000.png"))
        )
    assert read_json(tmp_path / "f.json")["mse"] > 0


@pytest.mark.parametrize(
    "output, message",
    [
        ("2.png", r"in/2\.png would overwrite an image of .*lines\.jsonl:1:"),  # its own target
        ("3.png", r"in/3\.png would overwrite an image of .*lines\.jsonl:3:"),
        ("../link/1.png", r"link/1\.png would overwrite an image of .*lines\.jsonl:1:"),
        ("a.png", r"in/a_1\.png would overwrite an image of .*lines\.jsonl:3:"),  # the file of a candidate
    ],
)
@pytest.mark.parametrize("evaluate_mse", [False, True])
def test_outputs_never_overwrite_an_input_or_a_target(lines, tmp_path, output, message, evaluate_mse):
    write_image(tmp_path / "in" / "a_1.png", 1)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    write_lines(
        tmp_path / "lines.jsonl",
        {"input": ["1.png"], "target": ["2.png"], "output": output},
        {"input": ["a_1.png"], "target": ["3.png"], "output": "b.png"},
    )
    settings = {"output_base_dir": lines["input_base_dir"], "checkpoint": "none", "evaluate_mse": evaluate_mse}
    with pytest.raises(UserError, match=rf"lines\.jsonl:1: .*{message}"):
        run_main(batch_generation, **lines, **settings)


def test_outputs_never_overwrite_an_image_of_a_line_beyond_max_examples(lines, tmp_path):
    write_lines(
        tmp_path / "lines.jsonl",
        {"input": ["1.png"], "output": "3.png"},
        {"input": ["3.png"], "output": "b.png"},
    )
    settings = {"output_base_dir": lines["input_base_dir"], "checkpoint": "none", "max_examples": 1}
    with pytest.raises(UserError, match=r"lines\.jsonl:1: .*in/3\.png would overwrite an image of .*lines\.jsonl:3:"):
        run_main(batch_generation, **lines, **settings)


def test_a_failed_start_leaves_nothing_behind(lines, tmp_path):
    settings = {**lines, "output_base_dir": str(tmp_path / "o"), "load_llama_config": "vqlm_debug"}
    with pytest.raises(UserError, match="there is no none"):
        run_main(batch_generation, **settings, checkpoint="params::none")
    assert list((tmp_path / "o").iterdir()) == []


@pytest.mark.parametrize(
    "program, settings, message",
    [
        (batch_generation, {"resize_output": "big"}, "--resize_output=big: choose original or a size"),
        (batch_generation, {"output_base_dir": ""}, "--output_base_dir is missing"),
        (batch_generation, {"n_candidates": 0}, "--n_candidates=0: must be at least 1"),
        (batch_generation, {"top_p": 0.0}, "top_p=0.0"),
        (batch_generation, {"context_frames": 1}, "--context_frames=1: must be at least 2"),
        (generate_videos, {"input_files": "x", "context_frames": 0}, "--context_frames=0: must be at least 2"),
        (generate_videos, {"input_files": "x", "fps": 2000.0}, r"--fps=2000\.0: must be 0\.\.1000"),
        (generate_videos, {"input_files": "x", "fps": -1.0}, r"--fps=-1\.0: must be 0\.\.1000"),
        (batch_generation, {"input_file": ""}, "--input_file is missing"),
        (generate_videos, {}, "--input_files .required unless --read_file_list is given. is missing"),
        (generate_videos, {"input_files": "x", "seed": -1}, "seed=-1: must be 0..2147483647"),
        (generate_videos, {"input_files": "x", "seed": 2**63}, "seed=9223372036854775808: must be"),
        (eval_video_perplexity, {"input_files": "x", "seed": -1}, "seed=-1: must be"),
        (generate_videos, {"input_files": "none/*"}, r"--input_files=none/\*: matches no video file"),
        (generate_videos, {"input_files": "none/*", "frame_input": True}, "matches no folder"),
        (generate_videos, {"input_files": "x", "stride": 0}, "--stride=0"),
        (generate_videos, {"input_files": "x", "center_crop": 1.5}, "--center_crop=1.5"),
    ],
)
def test_wrong_flags_are_named(tmp_path, program, settings, message):
    required = {
        batch_generation: {"checkpoint": "none", "input_file": "none", "output_base_dir": str(tmp_path)},
        generate_videos: {"checkpoint": "none", "output_dir": str(tmp_path)},
        eval_video_perplexity: {"checkpoint": "none"},
    }[program]
    with pytest.raises(UserError, match=message):
        run_main(program, **required | settings)


def test_all_missing_flags_are_named_at_once():
    with pytest.raises(UserError, match="--checkpoint, --input_file, --output_base_dir are missing"):
        run_main(batch_generation)


def test_a_missing_video_package_is_named_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="--fps needs the package av"):
        run_main(generate_videos, checkpoint="none", input_files="none", output_dir=str(tmp_path), fps=4.0)


@pytest.mark.parametrize(
    "program, flag",
    [(eval_perplexity, "output_json"), (batch_generation, "output_json"), (batch_generation, "output_base_dir")],
)
def test_unwritable_outputs_are_named_before_a_model_is_loaded(lines, tmp_path, program, flag):
    (tmp_path / "file").write_text("in the way")
    settings = {"output_base_dir": f"{tmp_path}/o"} if program is batch_generation else {}
    settings |= {flag: f"{tmp_path}/file/x", "checkpoint": "none"}
    with pytest.raises(UserError, match=r"/file/x.*: cannot be written"):
        run_main(program, **lines, **settings)


@pytest.mark.parametrize("program", [eval_perplexity, batch_generation])
def test_metrics_do_not_replace_the_list_of_examples(lines, tmp_path, program):
    settings = {"output_base_dir": f"{tmp_path}/o"} if program is batch_generation else {}
    with pytest.raises(UserError, match=r"--output_json=.*: is an input of this command"):
        run_main(program, **lines, **settings, output_json=lines["input_file"], checkpoint="none")
