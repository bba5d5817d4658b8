"""Interlaced frames and frames whose pixels are not square look as they are shown."""

import numpy as np
import pytest
from video_kit import number_of, numbered_frame, write_interlaced, write_planes, write_video

from EasyLM.errors import UserError
from tokenizer.media import video_frames, videos

INTERLACED = {
    "a.mkv": ("libx264", {"crf": "1"}),
    "a.mp4": ("libx264", {"crf": "1"}),
    "a.mpg": ("mpeg2video", {"flags": "+ildct+ilme", "b": "4M", "g": "4", "bf": "2"}),
    "a.ts": ("mpeg2video", {"flags": "+ildct+ilme", "b": "4M", "g": "4"}),
}


@pytest.mark.parametrize("is_top_first", [True, False])
@pytest.mark.parametrize("name", INTERLACED)
def test_an_interlaced_frame_is_its_first_field(tmp_path, name, is_top_first):
    """The fields show different numbers. A frame with lines of both would show a comb."""
    codec, options = INTERLACED[name]
    if codec == "libx264":
        options = {**options, "x264-params": f"interlaced=1:{'tff' if is_top_first else 'bff'}=1"}
    write_interlaced(tmp_path / name, codec, 8, is_top_first, **options)
    times = videos.timestamps(tmp_path / name)
    frames = videos.read(tmp_path / name, times)
    assert [number_of(frame) for frame in frames] == list(range(0, 16, 2))
    for number, frame in zip(range(0, 16, 2), frames):
        assert np.abs(255 * frame - numbered_frame(number)).mean() < 14  # chroma subsampling blurs the borders
    np.testing.assert_array_equal(videos.read(tmp_path / name, times[[5]]), frames[[5]])  # whatever is decoded before


@pytest.mark.parametrize("is_top_first", [True, False])
def test_the_lines_of_the_first_field_keep_their_places(tmp_path, is_top_first):
    """A ramp from top to bottom stays one: the missing lines are between their neighbours."""
    ramp = np.linspace(20, 200, 24)[:, None].repeat(64, 1)
    write_interlaced(tmp_path / "a.mkv", "ffv1", 2, is_top_first, pixels=ramp)
    (shown, _) = 255 * videos.read(tmp_path / "a.mkv", videos.timestamps(tmp_path / "a.mkv")).mean(axis=(2, 3))
    np.testing.assert_allclose(shown[1:-1], ramp[1:-1, 0], atol=2.5)


@pytest.mark.parametrize("tags", [{"colorspace": 1}, {"colorspace": 9, "color_primaries": 9, "color_trc": 18}])
def test_interlaced_frames_keep_their_colour_tags(tmp_path, tags):
    planes = [500, 600, 400]
    write_planes(tmp_path / "progressive.mkv", "ffv1", "yuv420p10le", planes, **tags)
    write_planes(tmp_path / "interlaced.mkv", "ffv1", "yuv420p10le", planes, is_interlaced=True, **tags)
    expected = videos.read(tmp_path / "progressive.mkv", [0.0], 8)
    np.testing.assert_allclose(videos.read(tmp_path / "interlaced.mkv", [0.0], 8), expected, atol=5e-3)
    assert np.ptp(expected.mean((0, 1, 2))) > 0.1


SHOWN = {"": (24, 64), "2": (24, 128), "4/3": (24, 85), "1/2": (48, 64)}


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.ts"])
@pytest.mark.parametrize("pixel_aspect", SHOWN)
def test_pixels_that_are_not_square_are_enlarged(tmp_path, name, pixel_aspect):
    write_video(tmp_path / name, "libx264", range(0, 200, 50), pixel_aspect=pixel_aspect, crf="1")
    time = videos.timestamps(tmp_path / name)[1]
    (frame,) = videos.read(tmp_path / name, [time])
    assert frame.shape == (*SHOWN[pixel_aspect], 3)
    rows, columns = (np.arange(n) * stored // n for n, stored in zip(frame.shape, (24, 64)))
    assert np.abs(255 * frame - numbered_frame(1)[rows[:, None], columns]).mean() < 20  # blurred borders


@pytest.mark.parametrize(("rotation", "pixel_aspect", "shape"), [(90, "2", (128, 24)), (180, "1/2", (48, 64))])
def test_pixels_are_enlarged_before_they_are_turned(tmp_path, rotation, pixel_aspect, shape):
    """The pixel aspect is that of the stored pixels: ISO/IEC 14496-12, 12.1.4."""
    write_video(tmp_path / "a.mp4", "libx264", range(0, 200, 50), rotation, pixel_aspect=pixel_aspect)
    (frame,) = videos.read(tmp_path / "a.mp4", [0.05])
    assert frame.shape == (*shape, 3)


def test_an_absurd_shape_is_refused_only_if_it_is_asked_for(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mkv", "libx264", range(0, 200, 50), pixel_aspect="2")
    monkeypatch.setattr(video_frames, "MAX_PIXELS", 64 * 24)
    assert videos.read(tmp_path / "a.mkv", [0.0], 8).shape == (1, 8, 8, 3)
    with pytest.raises(UserError, match=r"a\.mkv: .*is shown at 128x24 pixels, more than 1536"):
        videos.read(tmp_path / "a.mkv", [0.0])
