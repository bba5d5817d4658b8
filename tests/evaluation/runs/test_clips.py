"""Clips: selection and loading of frames, and rejected outputs."""

import numpy as np
import pytest
from PIL import Image
from runs_kit import clip_settings, frame_numbers, write_clip
from tokenizer_kit import run_main

from EasyLM.errors import UserError
from evaluation import generate_videos
from evaluation.runs import clips
from tokenizer.media import video_writer


def test_frames_follow_the_stride_from_a_start_that_depends_on_the_seed(tmp_path, capsys):
    for name, count in (("a", 12), ("b", 12), ("c", 5)):
        write_clip(tmp_path / name, count)
    settings = {"input_files": f"{tmp_path}/*", "frame_input": True, "stride": 3}
    first = clips.find_clips(clip_settings(**settings, random_start=False), 4)
    assert [clip.name for clip in first] == ["a", "b", "c"]
    assert [frame_numbers(clip) for clip in first] == [[0, 3, 6, 9], [0, 3, 6, 9], [0, 1, 2, 3]]
    starts = {frame_numbers(clips.find_clips(clip_settings(**settings, seed=seed), 4)[0])[0] for seed in range(20)}
    assert starts == {0, 1, 2}
    again = [clips.find_clips(clip_settings(**settings, seed=3), 4) for _ in range(2)]
    assert again[0] == again[1]
    with pytest.raises(UserError, match=r"c: 5 frames, 6 are needed"):
        clips.find_clips(clip_settings(**settings), 6)
    settings["skip_short_clips"] = True
    assert [clip.name for clip in clips.find_clips(clip_settings(**settings), 6)] == ["a", "b"]
    assert capsys.readouterr().out == "1 of 3 clips have fewer than 6 frames and are skipped\n"
    with pytest.raises(UserError, match="no clip has 13 frames"):
        clips.find_clips(clip_settings(**settings), 13)


def test_bad_lines_of_a_file_list_are_named(tmp_path):
    write_clip(tmp_path / "x" / "a", 3)
    write_clip(tmp_path / "y" / "a", 3)
    file_list = tmp_path / "list.txt"
    file_list.write_text(f"{tmp_path}/x/a\n\n{tmp_path}/y/a\n")
    settings = clip_settings(read_file_list=str(file_list), frame_input=True)
    assert [clip.name for clip in clips.find_clips(settings, 2)] == ["x/a", "y/a"]
    file_list.write_text(f"{tmp_path}/x/a\n{tmp_path}/no\n")
    with pytest.raises(UserError, match=r"list\.txt:2: .*no is not a folder"):
        clips.find_clips(settings, 2)


@pytest.mark.parametrize(("first", "second", "output"), [("a/b", "a_b", "a_b"), ("a", "a.png", "a.png")])
def test_clips_with_the_same_outputs_are_refused(tmp_path, first, second, output):
    """A sheet has the name of its clip with `.png`, so a clip of that name cannot have a folder."""
    for name in (first, second):
        write_clip(tmp_path / name, 2)
    (tmp_path / "list.txt").write_text(f"{tmp_path}/{first}\n{tmp_path}/{second}\n")
    settings = {"read_file_list": f"{tmp_path}/list.txt", "frame_input": True, "n_context_frames": 2}
    with pytest.raises(UserError, match=f"/{first} and .*/{second} would both be written to {output}: rename one"):
        run_main(generate_videos, **settings, output_dir=f"{tmp_path}/o", checkpoint="none")


@pytest.mark.parametrize("output_dir", ["clip", "clip/0", "clip/0/answers"])
def test_outputs_inside_a_clip_are_refused(tmp_path, output_dir):
    for number in range(2):
        write_clip(tmp_path / "clip" / str(number), 2)
    settings = {"input_files": f"{tmp_path}/clip/*", "frame_input": True, "n_context_frames": 2}
    with pytest.raises(UserError, match=r"would be written into the clip .*/clip/0: choose another output folder"):
        run_main(generate_videos, **settings, output_dir=f"{tmp_path}/{output_dir}", checkpoint="none")


def test_the_centre_is_cropped(tmp_path):
    image = np.zeros((32, 64, 3), np.uint8)
    image[8:24, 16:48] = 255  # the middle half of each side
    (tmp_path / "a").mkdir()
    Image.fromarray(image).save(tmp_path / "a" / "0.png")
    (clip,) = clips.find_clips(clip_settings(input_files=f"{tmp_path}/a", frame_input=True), 1)
    assert clips.load(clip, 16, 1.0).mean() == pytest.approx(0.25, abs=0.02)
    assert clips.load(clip, 16, 0.5)[0, 2:-2, 2:-2].min() > 0.95


def test_frames_of_a_video_are_read(tmp_path):
    pytest.importorskip("av")
    frames = np.stack([np.full((16, 16, 3), 20 * i, np.uint8) for i in range(10)])
    video_writer.write(tmp_path / "v.mp4", frames, fps=5)
    (clip,) = clips.find_clips(clip_settings(input_files=f"{tmp_path}/*.mp4", stride=4, random_start=False), 3)
    assert clip.name == "v.mp4"
    np.testing.assert_allclose(clips.load(clip, 16, 1.0).mean((1, 2, 3)) * 255, [0, 80, 160], atol=3)
