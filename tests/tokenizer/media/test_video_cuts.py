"""Hard cuts are found; fades, dissolves, flashes and moving cameras are none."""

import av
import numpy as np
import pytest
from PIL import Image
from video_kit import write_frames

from tokenizer.media import video_cuts, videos

HEIGHT, WIDTH = 48, 64
WHITE, BLACK = (np.full((HEIGHT, WIDTH, 3), value, np.float32) for value in (255, 0))


def scene(seed: int, count: int, pan: int = 1) -> list[np.ndarray]:
    """Frames of a smooth random image, seen by a camera that moves `pan` pixels a frame, with noise."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (4, 6, 3)).astype(np.uint8)
    wide = np.asarray(Image.fromarray(colours).resize((WIDTH + pan * count, HEIGHT), Image.Resampling.BICUBIC))
    noise = rng.normal(0, 4, (count, HEIGHT, WIDTH, 3))
    return [wide[:, pan * i : pan * i + WIDTH].astype(np.float32) + noise[i] for i in range(count)]


def blend(first: list[np.ndarray] | np.ndarray, last: list[np.ndarray] | np.ndarray, count: int) -> list[np.ndarray]:
    shares = np.linspace(0, 1, count + 2)[1:-1]
    at = [frames if isinstance(frames, list) else [frames] * count for frames in (first, last)]
    return [(1 - share) * at[0][i] + share * at[1][i] for i, share in enumerate(shares)]


def cuts(frames: list[np.ndarray]) -> list[int]:
    pixels = [np.clip(np.round(frame), 0, 255).astype(np.uint8) for frame in frames]
    return video_cuts.find_cuts(enumerate(av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in pixels))


@pytest.mark.parametrize("seed", range(6))
def test_hard_cuts_are_found_at_their_frame(seed):
    lengths = [12, 4, 30, 9]
    frames = [frame for i, length in enumerate(lengths) for frame in scene(10 * seed + i, length)]
    assert cuts(frames) == [12, 16, 46]


@pytest.mark.parametrize("pan", [0, 2, 6])
def test_a_moving_camera_is_no_cut(pan):
    for seed in range(4):
        assert cuts(scene(seed, 30, pan)) == []


@pytest.mark.parametrize("count", [4, 8, 12, 25, 50])
def test_fades_and_dissolves_are_no_cuts(count):
    for seed in range(4):
        first, last = scene(seed, 10 + count), scene(seed + 50, 10 + count)
        assert cuts(first[:10] + blend(first[10:], last[:count], count) + last[count:]) == []
        for colour in (BLACK, WHITE):
            fade_out, fade_in = blend(first[10:], colour, count), blend(colour, last[:count], count)
            assert cuts(first[:10] + fade_out + [colour] * 5 + fade_in + last[count:]) == []
            assert cuts([colour] * 5 + blend(colour, 255 - colour, count) + [255 - colour] * 5) == []


@pytest.mark.parametrize("length", [1, 2, 3])
def test_flashes_are_no_cuts(length):
    for seed in range(4):
        frames = scene(seed, 30)
        for i in range(length):
            frames[12 + i] = 0.2 * frames[12 + i] + 0.8 * WHITE
        assert cuts(frames) == []


def test_a_change_of_light_is_no_cut():
    flicker = [frame * (1 + 0.08 * (i % 2)) for i, frame in enumerate(scene(3, 30))]
    assert cuts(flicker) == []
    assert cuts([np.full((HEIGHT, WIDTH, 3), 40.0 + 3 * i) for i in range(60)]) == []  # of one colour


def test_few_frames_have_no_cut():
    assert cuts([]) == cuts([BLACK]) == []
    assert cuts([BLACK, WHITE]) == [1]


@pytest.mark.parametrize("name", ["a.mp4", "a.ts"])
def test_the_scenes_of_a_file(tmp_path, name):
    frames = [frame for seed, length in ((1, 10), (2, 15), (3, 5)) for frame in scene(seed, length)]
    write_frames(tmp_path / name, frames, g="30", bf="2")
    times = videos.timestamps(tmp_path / name)
    scenes = videos.scenes(tmp_path / name)
    assert [len(scene) for scene in scenes] == [10, 15, 5]
    np.testing.assert_array_equal(np.concatenate(scenes), times)
