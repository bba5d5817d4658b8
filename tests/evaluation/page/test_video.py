"""Frames of a video that a visitor uploads."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

from EasyLM.errors import UserError
from evaluation.page import video, video_frames
from evaluation.page.pictures import original

SIZE = 64  # as wide as the frames of `video_kit`, so that their numbers can be read


def numbers_of(paths: list[str]) -> list[int]:
    from video_kit import number_of

    return [number_of(original(pathlib.Path(path).read_bytes(), SIZE) / 255) for path in paths]


@pytest.fixture
def clip(tmp_path):
    pytest.importorskip("av")
    from video_kit import write_video

    write_video(tmp_path / "clip.mp4", "libx264", range(0, 3100, 100))
    return str(tmp_path / "clip.mp4")


def test_frames_are_spread_evenly_from_the_first_to_the_last(tmp_path, clip):
    assert numbers_of(video_frames.save_frames(clip, 7, SIZE, tmp_path)) == [0, 5, 10, 15, 20, 25, 30]
    assert numbers_of(video_frames.save_frames(clip, 1, SIZE, tmp_path)) == [0]
    assert numbers_of(video_frames.save_frames(clip, 100, SIZE, tmp_path)) == list(range(31))


def test_the_missing_package_is_named_with_its_extra(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else find_spec(name))
    with pytest.raises(UserError, match=r"the package av: pip install -e '.\[video\]'"):
        video.evenly_spaced_frames("clip.mp4", 7, SIZE, tmp_path)


@pytest.mark.slow  # starts processes
def test_a_process_reads_the_video_and_names_what_is_wrong(tmp_path, clip, monkeypatch):
    assert numbers_of(video.evenly_spaced_frames(clip, 3, SIZE, tmp_path)) == [0, 15, 30]
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"^text\.mp4: not a readable video"):
        video.evenly_spaced_frames(str(tmp_path / "text.mp4"), 3, SIZE, tmp_path)
    with monkeypatch.context() as patched, pytest.raises(UserError, match="decoder crashed or needs too much memory"):
        patched.setattr(video, "_PROGRAM", "evaluation.page.missing")
        video.evenly_spaced_frames(clip, 3, SIZE, tmp_path)
    monkeypatch.setattr(video, "_SECONDS", 0.01)
    with pytest.raises(UserError, match="takes longer than"):
        video.evenly_spaced_frames(clip, 3, SIZE, tmp_path)


@pytest.mark.slow  # starts a process
def test_the_process_that_reads_videos_has_little_memory_and_no_jax():
    """JAX would start slowly, and not within the limit."""
    pytest.importorskip("av")
    program = (
        "import resource, sys; from evaluation.page import video_frames\n"
        "assert video_frames.main('missing.mp4', '1', '8', '.') == 2\n"
        "sys.exit('jax' in sys.modules or not 0 < resource.getrlimit(resource.RLIMIT_AS)[0] < 5e9)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
