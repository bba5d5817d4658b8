"""A file stays open between calls, so that it is decoded once; long files need little memory."""

import fractions
import subprocess
import sys
from types import SimpleNamespace

import av
import numpy as np
import pytest
from video_kit import number_of, write_video

from EasyLM.errors import UserError
from tokenizer.media import video_decoder, videos
from tokenizer.media.video_clock import VideoClock

TIMES = np.arange(0, 4000, 50)
ONE_KEY_FRAME = {"g": "100", "bf": "2"}


def numbers(pixels):
    return [number_of(frame) for frame in pixels]


@pytest.fixture
def decoded(monkeypatch):
    """Collects the frames that are decoded."""
    collected = []
    decode_from = video_decoder._decode_from

    def counting(*arguments):
        for frame in decode_from(*arguments):
            collected.append(frame[0])
            yield frame

    monkeypatch.setattr(video_decoder, "_decode_from", counting)
    return collected


@pytest.mark.parametrize(
    ("name", "options"), [("a.ts", {"g": "8"}), ("a.mp4", ONE_KEY_FRAME), ("a.mkv", ONE_KEY_FRAME)]
)
def test_windows_one_after_another_decode_each_frame_once(tmp_path, decoded, name, options):
    write_video(tmp_path / name, "libx264", TIMES, **options)
    times = videos.timestamps(tmp_path / name)
    for start in range(0, 80, 10):
        assert numbers(videos.read(tmp_path / name, times[start : start + 9])) == list(range(start, start + 9))
    assert len(decoded) <= 80
    assert numbers(videos.read(tmp_path / name, times[[3, 5]])) == [3, 5]  # back
    assert numbers(videos.read(tmp_path / name, times[[5]])) == [5]  # the last one again


def test_frames_are_yielded_one_by_one_with_their_positions(tmp_path, decoded):
    """A worker copies each one before the next one is decoded, so that it holds one frame."""
    write_video(tmp_path / "a.mp4", "libx264", TIMES, **ONE_KEY_FRAME)
    stream = videos.frames(tmp_path / "a.mp4", videos.timestamps(tmp_path / "a.mp4")[[9, 2, 9, 70]], None)
    position, pixels = next(stream)
    assert (position, number_of(pixels / 255)) == (1, 2) and len(decoded) < 9
    assert [(position, number_of(pixels / 255)) for position, pixels in stream] == [(0, 9), (2, 9), (3, 70)]


def test_another_file_under_the_same_name_is_read_anew(tmp_path):
    for first in (0, 100):
        write_video(tmp_path / "a.mp4", "libx264", TIMES[: 20 + first // 10], first=first, **ONE_KEY_FRAME)
        times = videos.timestamps(tmp_path / "a.mp4")
        assert len(times) == 20 + first // 10
        first_read = 2 + first // 10  # after what is read of the first file, whose decoder is open
        for number in (first_read, first_read + 2):
            assert numbers(videos.read(tmp_path / "a.mp4", times[[number]])) == [first + number]


def test_few_files_stay_open_and_none_after_an_error(tmp_path, monkeypatch):
    for name in "abcd":
        write_video(tmp_path / f"{name}.mp4", "libx264", TIMES[:10])
        videos.read(tmp_path / f"{name}.mp4", [0.1])
    assert [video.name for video in video_decoder._idle] == [f"{tmp_path}/c.mp4", f"{tmp_path}/d.mp4"]

    def fail(*arguments):
        raise ValueError("of the test")

    with monkeypatch.context() as patch:
        patch.setattr(videos.video_frames, "to_bytes", fail)
        with pytest.raises(UserError, match=r"d\.mp4: not a readable video \(of the test\)"):
            videos.read(tmp_path / "d.mp4", [0.1])
    assert [video.name for video in video_decoder._idle] == [f"{tmp_path}/c.mp4"]
    assert numbers(videos.read(tmp_path / "d.mp4", [0.1])) == [2]


@pytest.mark.parametrize("shift", [-700, -75, 130])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
def test_edit_lists_and_negative_times(tmp_path, name, shift):
    """In MP4, an edit list cuts off frames before time 0. They are decoded, as others need them, but not shown."""
    write_video(tmp_path / "source.mp4", "libx264", TIMES, g="30", bf="3")
    with av.open(str(tmp_path / "source.mp4")) as source:
        with av.open(str(tmp_path / name), "w", container_options={"avoid_negative_ts": "disabled"}) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    ticks = round(shift / 1000 / packet.time_base)
                    packet.pts, packet.dts, packet.stream = packet.pts + ticks, packet.dts + ticks, stream
                    target.mux(packet)
    with av.open(str(tmp_path / name)) as container:  # sequential decoding, independent of the tested code
        expected = [number_of(frame.to_ndarray(format="rgb24") / 255) for frame in container.decode(video=0)]
    times = videos.timestamps(tmp_path / name)
    assert numbers(videos.read(tmp_path / name, times)) == expected
    assert len(expected) > 60
    np.testing.assert_allclose(np.diff(times), 0.05, atol=2e-3)
    for chosen in ([len(times) - 1], [0], [31, 2], [len(times) // 2, len(times) - 2]):
        assert numbers(videos.read(tmp_path / name, times[chosen])) == [expected[i] for i in chosen]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["long.mp4", "long.ts"])
def test_memory_does_not_grow_with_the_length(tmp_path, name):
    """Of 3,000 frames with two key frames. All of them would take 700 MB, more than four times the limit."""
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 480, 320, "yuv420p"
        stream.options = {"preset": "ultrafast", "g": "1500", "sc_threshold": "0"}
        for number in range(3000):
            frame = av.VideoFrame(480, 320, "yuv420p")
            for plane, value in zip(frame.planes, (number % 200 + 20, 128, 128)):
                plane.update(bytes([value]) * plane.buffer_size)
            frame.pts, frame.time_base = number, fractions.Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    program = f"""
import resource, numpy as np
from tokenizer.media import videos
path = {str(tmp_path / name)!r}
times = videos.timestamps(path)
videos.read(path, times[:2], 16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for start in range(0, 3000, 500):
    numbers = start + 100 + np.arange(16)
    levels = 255 * videos.read(path, times[numbers], 16).mean((1, 2, 3))
    np.testing.assert_allclose(levels, (numbers % 200 + 4) * 255 / 219, atol=4)
assert len(times) == 3000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150_000  # KiB


def test_frames_without_the_first_one_are_damaged():
    """A damaged key frame can come after the frames that were predicted from it, which the decoder does not mark."""
    frames = [(1, False, False), (2, False, False), (0, True, True), (3, True, False), (4, False, False)]
    frames = [SimpleNamespace(pts=pts, key_frame=key, is_corrupt=corrupt) for pts, key, corrupt in frames]
    packets = [SimpleNamespace(pts=frame.pts, decode=lambda frame=frame: [frame]) for frame in frames]
    container = SimpleNamespace(demux=lambda stream: packets, seek=lambda *_, **__: None)
    stream = SimpleNamespace(codec_context=SimpleNamespace(name="h264"))
    ticks = np.arange(5)
    clock = VideoClock(ticks, ticks[[0, 3]], False, fractions.Fraction(1, 25), ticks)
    for seek_point in (None, 0):
        decoded = video_decoder._decode_from(container, stream, clock, seek_point)
        assert [(tick, is_damaged) for tick, _, is_damaged in decoded] == [
            *((1, True), (2, True), (0, True)),
            *((3, False), (4, False)),
        ]
