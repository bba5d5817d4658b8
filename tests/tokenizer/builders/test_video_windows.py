"""Windows of videos: steps in seconds at any frame rate, and scenes between cuts."""

import numpy as np
import pytest
from build_kit import build_records, skipped_names
from video_kit import number_of, write_frames, write_video

from EasyLM.errors import UserError
from tokenizer.builders import arrangements, image_ref
from tokenizer.builders.image_ref import ImageRef
from tokenizer.builders.settings import SentenceSettings

VARIABLE = np.cumsum(np.random.default_rng(0).choice([0.04, 0.08, 0.3, 1.7], 400))
CLIPS = {
    "25 a second": np.arange(500) / 25,
    "30 a second in milliseconds": np.round(np.arange(600) / 30, 3) + 1.4,
    "23.976 a second in milliseconds": np.round(np.arange(500) * 1001 / 24000, 3),
    "at any time": VARIABLE,
    "a long still": np.array([0.0, 0.04, 0.08, 60.0, 60.04]),
}


def windows(times, seed=0, **settings) -> list[list[float]]:
    """The times of the frames of each sentence."""
    rows = [(ImageRef("a.mp4", second),) for second in times]
    values = {"seed": 0, "n_shots": 1, "images_per_shot": 1, "n_frames": 4, "max_stride": 1, "strides": (1,)}
    chosen = SentenceSettings(**{**values, "hole_mask_ratio": 0.5, **settings})
    return [[ref.seconds for ref in s] for s in arrangements.video(rows, np.random.default_rng(seed), chosen)]


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("step", [0.5, 0.2, 1.37])
def test_frames_are_those_shown_at_times_a_step_apart(name, step):
    times = CLIPS[name]
    following = dict(zip(times, [*times[1:], np.inf]))
    for seed in range(20):
        sentences = windows(times, seed, frame_seconds=(step,))
        assert len(sentences) == (int((times[-1] - times[0]) / step) + 1) // 4
        flat = np.concatenate(sentences)
        # Each frame is shown at a time: the first one and a multiple of the step. These are the limits of the first.
        latest = min(following[time] - i * step for i, time in enumerate(flat))
        earliest = max(time - i * step for i, time in enumerate(flat))
        assert earliest - 2e-3 <= latest


@pytest.mark.parametrize("rate", [24000 / 1001, 25, 30000 / 1001, 30, 50, 60])
@pytest.mark.parametrize("ticks", [1000, 90_000, None])
def test_a_step_of_whole_frames_never_repeats_or_skips_one(rate, ticks):
    """Containers round times, so that frames are 33 or 34 ms apart."""
    exact = np.arange(900) / rate
    times = exact if ticks is None else np.round(exact * ticks) / ticks
    for step in (1, 2, 5):
        sentences = windows(times, frame_seconds=(step / rate,))
        numbers = np.searchsorted(times, np.concatenate(sentences) - 1e-9)
        assert set(np.diff(numbers)) == {step}


def test_the_first_frame_is_random_and_each_step_makes_its_own_sentences():
    times = np.arange(90) / 10
    starts = {windows(times, seed, frame_seconds=(1.0,))[0][0] for seed in range(200)}
    assert starts == set(times[:20])  # nine frames are 1 s apart, eight are in a window
    sentences = windows(times, frame_seconds=(1.0, 0.2, 3.0))
    assert sorted({round(b - a, 3) for a, b, *_ in sentences}) == [0.2, 1.0]  # of 3 s there are no four


def test_a_step_below_the_distance_of_the_frames_leaves_the_other_steps():
    times = np.arange(100) / 10
    for steps in ((0.05, 0.5), (0.5, 0.05)):
        assert windows(times, frame_seconds=steps) == windows(times, frame_seconds=(0.5,)) != []


def test_unsuitable_clips_are_named():
    with pytest.raises(arrangements.UnsuitableClipError, match=r"too short: 3 frames, 0\.5 s apart, 4 needed"):
        windows(np.arange(0, 1.4, 0.1), frame_seconds=(0.5, 0.7))
    with pytest.raises(arrangements.UnsuitableClipError, match=r"0\.1 s apart, more than frame_seconds=0\.05"):
        windows(np.arange(100) / 10, frame_seconds=(0.05, 0.02))
    with pytest.raises(arrangements.UnsuitableClipError, match=r"too short: 2 frames, 5 s apart, 4 needed"):
        windows(np.arange(100) / 10, frame_seconds=(0.05, 9, 5))
    assert windows(np.arange(100) / 10, frame_seconds=(0.0995,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frame_seconds": "0.5"}, "--strides=1,2 and --frame_seconds=0.5: give one of the two"),
        ({"strides": "1", "frame_seconds": "0.5,"}, "--frame_seconds=0.5,: must be numbers separated by ','"),
        ({"strides": "1", "frame_seconds": "0.5,0"}, "--frame_seconds=0.5,0: each must be at least 0.001"),
        ({"strides": "1", "frame_seconds": "nan"}, "--frame_seconds=nan: each must be"),
        ({"strides": "1", "frame_seconds": "inf"}, "--frame_seconds=inf: each must be"),
        ({"strides": "1.5"}, "--strides=1.5: must be integers"),
        ({"kind": "frames", "input_dir": "clips1", "frame_seconds": "1"}, "--frame_seconds=1: is for --kind=video"),
        ({"kind": "frames", "input_dir": "clips1", "split_at_cuts": True}, "--split_at_cuts=True: is for --kind=video"),
    ],
)
def test_invalid_steps_are_named(tree, tiny, tmp_path, settings, message):
    kind = settings.pop("kind", "video")
    with pytest.raises(UserError, match=message):
        build_records(tree, tiny, tmp_path / "out.jsonl", kind, **settings)


def test_videos_of_different_rates_are_sampled_alike(tiny, tmp_path):
    for name, milliseconds in (("slow.mkv", np.arange(30) * 100), ("fast.mkv", np.arange(75) * 40)):
        (tmp_path / "in").mkdir(exist_ok=True)
        write_video(tmp_path / "in" / name, "libx264", milliseconds, crf="1")
    settings = {"input_dir": "in", "strides": "1", "frame_seconds": "0.4", "n_frames": 3}
    sentences = build_records(tmp_path, tiny, tmp_path / "out.jsonl", "video", **settings)
    assert len(sentences) == 4
    for _, record in sentences:
        np.testing.assert_allclose(np.diff(record["seconds"]), 0.4, atol=2e-3)
        pixels = np.stack([row for ref in image_ref.from_record(record) for _, row in image_ref.read([ref], 24)])
        rate = 10 if record["sources"][0].endswith("slow.mkv") else 25
        wide = pixels.repeat(8, 2)[:, :, ::3] / 255  # 64 columns
        assert [number_of(frame) for frame in wide] == [round(second * rate) for second in record["seconds"]]


def test_sentences_do_not_cross_cuts(tiny, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for name, lengths in (("cuts.mp4", (7, 12, 4, 9)), ("short.mp4", (4, 4)), ("whole.mp4", (11,))):
        frames = [np.full((48, 64, 3), rng.integers(0, 256, 3)) for length in lengths]
        frames = [frame for frame, length in zip(frames, lengths) for _ in range(length)]
        write_frames(tmp_path / "in" / name, frames)
    settings = {"input_dir": "in", "strides": "1", "n_frames": 5, "max_errors": 1}
    sentences = build_records(tmp_path, tiny, tmp_path / "out.jsonl", "video", split_at_cuts=True, **settings)
    starts = [(record["sources"][0][-9:], round(25 * record["seconds"][0])) for _, record in sentences]
    of_cuts = [start for name, start in starts if name == "/cuts.mp4"]
    assert len(of_cuts) == 4 and len(starts) == 6
    for start in of_cuts:
        assert not any(start < cut < start + 5 for cut in (7, 19, 23))
    reasons = skipped_names(tmp_path / "out.jsonl")
    assert list(reasons) == ["short.mp4"] and "too short: 4 frames, 5 needed" in reasons["short.mp4"]
    everything = build_records(tmp_path, tiny, tmp_path / "all.jsonl", "video", **settings)
    assert len(everything) == 6 + 1 + 2
