"""The four evaluation programs on a tiny tokenizer and model: files, figures, stopped runs, bad input."""

import gzip
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from prompting_kit import tiny_checkpoint, tiny_logits
from tokenizer_kit import run_main, write_image

from EasyLM import flags
from EasyLM.errors import UserError
from evaluation import batch_generation, eval_perplexity, eval_video_perplexity, fewshot, generate_videos
from evaluation.runs import clips, loops
from evaluation.runs.lines import EXAMPLE_FLAGS, Line, Results, read_lines
from evaluation.tasks import metrics
from tokenizer.media import images, video_writer
from tokenizer.vqgan import Codec

LENGTHS = (2, 3, 2, 2)  # pictures before the target, of each line


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def lines(tmp_path):
    """A file of examples; returns the flags that name it."""
    for i in range(8):
        write_image(tmp_path / "in" / f"{i}.png", i)
    Image.fromarray(np.zeros((30, 50, 3), np.uint8)).save(tmp_path / "in" / "wide.png")
    inputs = [[f"{(i + j) % 8}.png" for j in range(count)] for i, count in enumerate(LENGTHS)]
    inputs[3][-1] = "wide.png"
    write_lines(
        tmp_path / "lines.jsonl",
        *({"input": given, "target": [f"{i + 4}.png"], "output": f"d/{i}.png"} for i, given in enumerate(inputs)),
    )
    return {"input_file": str(tmp_path / "lines.jsonl"), "input_base_dir": str(tmp_path / "in")}


def write_lines(path, *values):
    path.write_text("".join(json.dumps(value, separators=(",", ":")) + "\n\n" for value in values))


def figures(path):
    with open(path) as file:
        return json.load(file)


def modified(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*.png"))}


@pytest.mark.slow
def test_perplexity_is_what_its_definition_says(model, lines, tmp_path):
    run_main(eval_perplexity, **model, **lines, batch_size=2, output_json=str(tmp_path / "out" / "f.json"))
    codec = Codec(model["vqgan"])
    expected = []
    for line in map(json.loads, (tmp_path / "lines.jsonl").read_text().split()):
        pictures = [images.load(f"{lines['input_base_dir']}/{name}", 16) for name in line["input"] + line["target"]]
        row_T = codec.encode(np.stack(pictures)).reshape(-1)
        log_p_TV = jax.nn.log_softmax(tiny_logits(row_T))
        expected.append(float(np.exp(-log_p_TV[np.arange(len(row_T) - 1), row_T[1:]][-64:].mean())))
    result = figures(tmp_path / "out" / "f.json")
    per_example = [row["perplexity"] for row in result["per_example"]]
    np.testing.assert_allclose(per_example, expected, rtol=1e-4)
    assert result["perplexity"] == pytest.approx(np.mean(per_example))
    assert result["perplexity_standard_error"] == pytest.approx(np.std(per_example, ddof=1) / 2)
    assert [row["example"] for row in result["per_example"]] == [f"{lines['input_file']}:{n}" for n in (1, 3, 5, 7)]
    assert os.listdir(tmp_path / "out") == ["f.json"]


@pytest.mark.slow
def test_answers_have_the_names_and_sizes_that_were_asked_for(model, lines, tmp_path):
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
    result = figures(tmp_path / "f.json")
    errors = np.array([row["mse"] for row in result["per_example"]])
    assert result["mse"] == pytest.approx(errors.mean()) and result["best_mse"] == pytest.approx(errors.min(1).mean())
    assert 0 < result["best_mse"] < result["mse"]


@pytest.mark.slow
def test_a_stopped_run_goes_on(model, lines, tmp_path):
    out = tmp_path / "o"
    settings = {**model, **lines, "n_candidates": 1, "batch_size_factor": 1, "mesh_dim": "1,1,-1"}
    settings |= {"output_base_dir": str(out), "output_json": str(tmp_path / "f.json"), "evaluate_mse": True}
    broken = tmp_path / "in" / "4.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    write_lines(
        tmp_path / "lines.jsonl",
        {"input": ["0.png", "5.png"], "target": ["1.png"], "output": "0.png"},
        {"input": ["0.png", "4.png"], "target": ["1.png"], "output": "1.png"},
    )
    with pytest.raises(UserError, match=r"lines\.jsonl:3: .*4\.png: not a readable image"):
        run_main(batch_generation, **settings)
    before = modified(out)
    (unfinished,) = out.glob("unfinished.*.jsonl")
    assert [path.name for path in before] == ["0.png"]
    broken.write_bytes(whole)
    with pytest.raises(UserError, match=r"unfinished\..+\.jsonl: left by a stopped run with --temperature=1\.0, now"):
        run_main(batch_generation, **settings | {"temperature": 0.5})
    with open(unfinished, "a") as file:
        file.write('{"example": "cut o')
    run_main(batch_generation, **settings)
    after = modified(out)
    assert len(after) == 2 and before.items() <= after.items()
    assert not unfinished.exists()
    continued = figures(tmp_path / "f.json")
    pictures = {path.name: path.read_bytes() for path in after}
    run_main(batch_generation, **settings | {"batch_size_factor": 2})  # anew, and the same
    assert figures(tmp_path / "f.json") == continued
    assert {path.name: path.read_bytes() for path in modified(out)} == pictures and not modified(
        out
    ).items() & after.items()


# The program of the second argument, killed as soon as it has kept one result.
KILLED = """
import importlib, json, os, signal, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
from tokenizer_kit import run_main
from evaluation.runs import lines as examples
add = examples.Results.add
def add_and_die(*args):
    add(*args)
    os.kill(os.getpid(), signal.SIGKILL)
examples.Results.add = add_and_die
run_main(importlib.import_module(sys.argv[2]), **json.loads(sys.argv[3]))
"""


def of_program(program, lines, root) -> dict:
    """Settings under which a program has several results to keep, one after the other."""
    clips_of = {"input_files": f"{root}/clips/*", "frame_input": True, "stride": 1, "n_context_frames": 2}
    drawn = {"n_candidates": 2, "n_new_frames": 1, "evaluate_mse": True, "batch_size_factor": 1}
    folders = {"input_dirs": f"{root}/in", "target_dirs": f"{root}/out", "clip_dirs": f"{root}/clips"}
    judged = {"figures": "palette_iou", "palette": f"{root}/palette.txt", "n_shots": "0,1", "n_queries": 3}
    settings = {
        eval_perplexity: {**lines, "batch_size": 1},
        eval_video_perplexity: {**clips_of, "batch_size": 1},
        batch_generation: {**lines, **drawn, "output_base_dir": f"{root}/o"},
        generate_videos: {**clips_of, **drawn, "output_dir": f"{root}/o"},
        fewshot: {**folders, **judged, "depth_range": "1,9", "output_picture": f"{root}/sheet.png"},
    }[program]
    return settings | {"mesh_dim": "1,1,-1"}  # where a batch may be of one example


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", [eval_perplexity, eval_video_perplexity, batch_generation, generate_videos, fewshot]
)
def test_a_killed_run_goes_on_to_the_same_figures(model, lines, tmp_path, monkeypatch, program):
    for i in range(8):
        write_image(tmp_path / "out" / f"{i}.png", 100 + i)
    for name in "ab":
        write_clip(tmp_path / "clips" / name, 4)
    (tmp_path / "palette.txt").write_text("0 0 0\n255 0 0\n0 0 255\n")
    settings = {**model, **of_program(program, lines, tmp_path), "output_json": f"{tmp_path}/f.json"}
    command = [sys.executable, "-c", KILLED, os.pathsep.join(sys.path), program.__name__, json.dumps(settings)]
    ended = subprocess.run(command, timeout=240, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (kept,) = tmp_path.rglob("*unfinished.*")
    assert len(kept.read_text().splitlines()) == 2 and not (tmp_path / "f.json").exists()
    added = []
    add = Results.add
    monkeypatch.setattr(Results, "add", lambda *given: added.append(given[1].name) or add(*given))

    def outcome():
        run_main(program, **settings)
        assert not list(tmp_path.rglob("*unfinished.*"))
        pictures = [*tmp_path.glob("o/**/*.png"), *tmp_path.glob("sheet.png")]
        return figures(tmp_path / "f.json"), {path: path.read_bytes() for path in pictures}

    continued, missing = outcome(), len(added)
    assert outcome() == continued
    assert len(added) == 2 * missing + 1  # anew, and so one more


def test_results_count_while_nothing_changed(tmp_path):
    config = clip_settings(checkpoint="", vqgan="", temperature=1.0)
    case = Line("a:1", (str(tmp_path / "x.png"),))
    write_image(tmp_path / "x.png", 1)
    path = str(tmp_path / "r.jsonl")
    Results(path, config).add(case, {"written": [str(tmp_path / "x.png")]})
    assert Results(path, config).missing([case]) == []
    pictures = case.inputs * 2
    Results(path, config).add(Line("a:2", pictures[:1], pictures[:1], "o.png"), {})
    for edited in (
        Line("a:2", pictures, (), "o.png"),
        Line("a:2", pictures[:1], pictures[:1], "p.png"),
    ):
        assert Results(path, config).missing([edited]) == [edited]
    os.utime(tmp_path / "x.png", ns=(1, 1))
    assert Results(path, config).missing([case]) == [case]
    Results(path, config).add(case, {"written": [str(tmp_path / "gone.png")]})
    assert Results(path, config).missing([case]) == [case]


def test_each_list_has_a_file_of_its_own_which_may_be_gone_at_the_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {loops.unfinished_name({"input_file": path}) for path in ("a.jsonl", "b.jsonl", f"{tmp_path}/a.jsonl")}
    assert len(names) == 2 and all(name.startswith("unfinished.") and name.endswith(".jsonl") for name in names)
    path, case = tmp_path / names.pop(), Line("a:1", ())
    results = Results(str(path), clip_settings(checkpoint="", vqgan=""))
    results.add(case, {"mse": 1.0})
    path.unlink()
    results.finish([case], ["mse"], "")


@pytest.mark.parametrize(
    "output, said",
    [
        ("2.png", r"in/2\.png would replace a picture that .*lines\.jsonl:1 names"),  # its own truth
        ("3.png", r"in/3\.png would replace a picture that .*lines\.jsonl:3 names"),
        ("../link/1.png", r"link/1\.png would replace a picture that .*lines\.jsonl:1 names"),
        ("a.png", r"in/a_1\.png would replace a picture that .*lines\.jsonl:3 names"),  # of a candidate
    ],
)
@pytest.mark.parametrize("measured", [False, True])
def test_no_answer_replaces_a_picture_that_a_line_names(lines, tmp_path, output, said, measured):
    write_image(tmp_path / "in" / "a_1.png", 1)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    write_lines(
        tmp_path / "lines.jsonl",
        {"input": ["1.png"], "target": ["2.png"], "output": output},
        {"input": ["a_1.png"], "target": ["3.png"], "output": "b.png"},
    )
    given = {"output_base_dir": lines["input_base_dir"], "checkpoint": "none", "evaluate_mse": measured}
    with pytest.raises(UserError, match=rf"lines\.jsonl:1: .*{said}"):
        run_main(batch_generation, **lines, **given)


def test_a_start_that_fails_leaves_nothing_behind(lines, tmp_path):
    settings = {**lines, "output_base_dir": str(tmp_path / "o"), "load_llama_config": "vqlm_debug"}
    with pytest.raises(UserError, match="there is no none"):
        run_main(batch_generation, **settings, checkpoint="params::none")
    assert list((tmp_path / "o").iterdir()) == []


def test_settings_without_a_result_bind_nobody(tmp_path):
    path, case = tmp_path / "r.jsonl", Line("a:1", ())
    config = clip_settings(checkpoint="", vqgan="", temperature=1.0)
    Results(str(path), config).add(case, {})
    path.write_text(path.read_text().splitlines(keepends=True)[0] + '{"example": "cut o')
    config.temperature = 0.5
    Results(str(path), config).add(case, {})
    assert Results(str(path), config).missing([case]) == []


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", r"lines\.jsonl:1: not JSON"),
        ("[1]", r"lines\.jsonl:1: a list, not an object"),
        ('{"output": "a.png"}', "lines.jsonl:1: 'input' must be a list of paths"),
        ('{"input": [], "output": "a.png"}', "'input' must be a list"),
        ('{"input": "0.png", "output": "a.png"}', "'input' must be a list"),
        ('{"input": ["0.png", "no.png"], "output": "a.png"}', r"lines\.jsonl:1: input: no such file: .*no\.png"),
        ('{"input": ["0.png"]}', "'output' must be the path"),
        ('{"input": ["0.png"], "output": "a.txt"}', r"a\.txt: must end with one of"),
        ('{"input": ["0.png"], "output": "a.png", "target": ["1.png", "2.png"]}', "2 pictures in 'target', --n_new"),
        ('{"input": ["0.png"], "output": "a.png"}', "--evaluate_mse: no line of"),
        ('{"input": ["0.png"], "output": "a.png"}\n' * 2, r"lines\.jsonl:2: .*a\.png is a file of .*:1 already"),
        (
            '{"input": ["0.png"], "output": "a.png"}\n{"input": ["0.png"], "output": "a_1.png"}',
            r"lines\.jsonl:2: .*a_1\.png is a file of .*:1 already",
        ),
        ("\n", "no example there"),
    ],
)
def test_bad_lines_are_named_before_a_model_is_loaded(lines, tmp_path, line, said):
    (tmp_path / "lines.jsonl").write_text(line)
    with pytest.raises(UserError, match=said):
        run_main(batch_generation, **lines, checkpoint="none", output_base_dir=str(tmp_path / "o"), evaluate_mse=True)


@pytest.mark.parametrize(
    "program, given, said",
    [
        (batch_generation, {"resize_output": "big"}, "--resize_output=big: choose original, or a size"),
        (batch_generation, {"output_base_dir": ""}, "--output_base_dir is missing"),
        (batch_generation, {"n_candidates": 0}, "--n_candidates=0: must be at least 1"),
        (batch_generation, {"top_p": 0.0}, "top_p=0.0"),
        (batch_generation, {"context_frames": 1}, "--context_frames=1: must be at least 2"),
        (generate_videos, {"context_frames": 0}, "--context_frames=0: must be at least 2"),
        (generate_videos, {"fps": 2000.0}, r"--fps=2000\.0: must be 0 \(no videos\) to 1000"),
        (generate_videos, {"fps": -1.0}, r"--fps=-1\.0: must be 0"),
        (batch_generation, {"input_file": ""}, "--input_file is missing"),
        (generate_videos, {}, "--input_files is missing"),
        (generate_videos, {"seed": -1}, "seed=-1: must be 0..2147483647"),
        (generate_videos, {"seed": 2**63}, "seed=9223372036854775808: must be"),
        (eval_video_perplexity, {"seed": -1}, "seed=-1: must be"),
        (generate_videos, {"input_files": "none/*"}, r"--input_files=none/\*: matches no video file"),
        (generate_videos, {"input_files": "none/*", "frame_input": True}, "matches no folder"),
        (generate_videos, {"input_files": "x", "stride": 0}, "--stride=0"),
        (generate_videos, {"input_files": "x", "center_crop": 1.5}, "--center_crop=1.5"),
    ],
)
def test_wrong_flags_are_named(tmp_path, program, given, said):
    places = {batch_generation: {"output_base_dir": str(tmp_path)}, generate_videos: {"output_dir": str(tmp_path)}}
    with pytest.raises(UserError, match=said):
        run_main(program, **places.get(program, {}) | given)


def test_videos_want_their_package_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="--fps needs the package av"):
        run_main(generate_videos, output_dir=str(tmp_path), fps=4.0)


@pytest.mark.parametrize("program, place", [(eval_perplexity, "output_json"), (batch_generation, "output_json"),
                                            (batch_generation, "output_base_dir")])  # fmt: skip
def test_outputs_that_cannot_be_written_are_named_before_a_model_is_loaded(lines, tmp_path, program, place):
    (tmp_path / "file").write_text("in the way")
    given = {"output_base_dir": f"{tmp_path}/o"} if program is batch_generation else {}
    with pytest.raises(UserError, match=r"/file/x.*: cannot be written"):
        run_main(program, **lines, **given | {place: f"{tmp_path}/file/x", "checkpoint": "none"})


# ---- Clips


def clip_settings(**values):
    config = flags.defaults({**clips.CLIP_FLAGS, **EXAMPLE_FLAGS})
    config.update(values)
    return config


def write_clip(folder, count):
    """Frames whose colour tells their number, named so that their order is not the alphabet's."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((24, 40, 3), 10 * i, np.uint8)).save(folder / f"f{i}.png")


def numbers(clip):
    return [int(os.path.basename(path)[1:-4]) for path in clip.frames]


def test_frames_are_in_order_at_the_stride_from_a_start_that_the_seed_decides(tmp_path, capsys):
    for name, count in (("a", 12), ("b", 12), ("c", 5)):
        write_clip(tmp_path / name, count)
    settings = {"input_files": f"{tmp_path}/*", "frame_input": True, "stride": 3}
    first = clips.find_clips(clip_settings(**settings, random_start=False), 4)
    assert [clip.name for clip in first] == ["a", "b", "c"]
    assert [numbers(clip) for clip in first] == [[0, 3, 6, 9], [0, 3, 6, 9], [0, 1, 2, 3]]
    starts = {numbers(clips.find_clips(clip_settings(**settings, seed=seed), 4)[0])[0] for seed in range(20)}
    assert starts == {0, 1, 2}
    again = [clips.find_clips(clip_settings(**settings, seed=3), 4) for _ in range(2)]
    assert again[0] == again[1]
    with pytest.raises(UserError, match=r"c: 5 frames, 6 are needed"):
        clips.find_clips(clip_settings(**settings), 6)
    settings["skip_short_clips"] = True
    assert [clip.name for clip in clips.find_clips(clip_settings(**settings), 6)] == ["a", "b"]
    assert capsys.readouterr().out == "1 of 3 clips have fewer than 6 frames and are left out\n"
    with pytest.raises(UserError, match="no clip has 13 frames"):
        clips.find_clips(clip_settings(**settings), 13)


def test_a_file_list_names_its_bad_lines(tmp_path):
    write_clip(tmp_path / "x" / "a", 3)
    write_clip(tmp_path / "y" / "a", 3)
    listed = tmp_path / "list.txt"
    listed.write_text(f"{tmp_path}/x/a\n\n{tmp_path}/y/a\n")
    settings = clip_settings(read_file_list=str(listed), frame_input=True)
    assert [clip.name for clip in clips.find_clips(settings, 2)] == ["x/a", "y/a"]
    listed.write_text(f"{tmp_path}/x/a\n{tmp_path}/no\n")
    with pytest.raises(UserError, match=r"list\.txt:2: .*no is no folder"):
        clips.find_clips(settings, 2)


def test_clips_of_one_output_name_are_refused_before_a_model_is_loaded(tmp_path):
    for name in ("a/b", "a_b"):
        write_clip(tmp_path / name, 2)
    (tmp_path / "list.txt").write_text(f"{tmp_path}/a/b\n{tmp_path}/a_b\n")
    given = {"read_file_list": f"{tmp_path}/list.txt", "frame_input": True, "n_context_frames": 2}
    with pytest.raises(UserError, match=r"/a/b and .*/a_b would both be written to a_b: rename one"):
        run_main(generate_videos, **given, output_dir=f"{tmp_path}/o", checkpoint="none")


@pytest.mark.parametrize("output_dir", ["clip", "clip/0", "clip/0/answers"])
def test_answers_are_not_written_into_the_clips(tmp_path, output_dir):
    for number in range(2):
        write_clip(tmp_path / "clip" / str(number), 2)
    given = {"input_files": f"{tmp_path}/clip/*", "frame_input": True, "n_context_frames": 2}
    with pytest.raises(UserError, match=r"would be written into the clip .*/clip/0: choose another --output_dir"):
        run_main(generate_videos, **given, output_dir=f"{tmp_path}/{output_dir}", checkpoint="none")


def test_the_middle_is_cut_out(tmp_path):
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[8:24, 16:48] = 255  # the middle half of each side
    (tmp_path / "a").mkdir()
    Image.fromarray(picture).save(tmp_path / "a" / "0.png")
    (clip,) = clips.find_clips(clip_settings(input_files=f"{tmp_path}/a", frame_input=True), 1)
    assert clips.load(clip, 16, 1.0).mean() == pytest.approx(0.25, abs=0.02)
    assert clips.load(clip, 16, 0.5)[0, 2:-2, 2:-2].min() > 0.95


def test_a_video_gives_its_frames(tmp_path):
    pytest.importorskip("av")
    frames = np.stack([np.full((16, 16, 3), 20 * i, np.uint8) for i in range(10)])
    video_writer.write(tmp_path / "v.mp4", frames, fps=5)
    (clip,) = clips.find_clips(clip_settings(input_files=f"{tmp_path}/*.mp4", stride=4, random_start=False), 3)
    assert clip.name == "v.mp4"
    np.testing.assert_allclose(clips.load(clip, 16, 1.0).mean((1, 2, 3)) * 255, [0, 80, 160], atol=3)


@pytest.mark.slow
def test_clips_are_measured_and_continued(model, tmp_path):
    for name in ("a", "b"):
        write_clip(tmp_path / "clips" / name, 6)
    settings = {**model, "input_files": f"{tmp_path}/clips/*", "frame_input": True, "stride": 1, "n_context_frames": 2}
    settings |= {"output_json": str(tmp_path / "f.json")}
    run_main(eval_video_perplexity, **settings, n_target_frames=2)
    result = figures(tmp_path / "f.json")
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
    assert figures(tmp_path / "f.json")["mse"] > 0


@pytest.mark.parametrize(
    "read",
    [
        read_lines,
        lambda config: clips.find_clips(config, 2),
        lambda config: metrics.read_palette(config.input_file),
    ],
)
def test_a_file_that_is_no_text_is_named_by_its_line(tmp_path, read):
    path = tmp_path / "lines.txt"
    path.write_bytes(b"\n\xff\xfe\n")
    config = flags.defaults(eval_perplexity.FLAGS | clips.CLIP_FLAGS)
    config.input_file = config.read_file_list = str(path)
    with pytest.raises(UserError, match=rf"^{path}:2: not UTF-8 text \(invalid start byte at byte 0\)"):
        read(config)


def test_a_packed_file_of_lines_is_read(lines):
    path = lines["input_file"]
    with open(path, "rb") as plain, gzip.open(f"{path}.gz", "wb") as packed:
        packed.write(plain.read())
    config = flags.defaults(eval_perplexity.FLAGS)
    read = []
    for name in (path, f"{path}.gz"):
        config.update(lines | {"input_file": name})
        read.append([line.files for line in read_lines(config, target="needed")])
    assert read[0] == read[1]
