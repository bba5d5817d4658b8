"""A file stays open between calls, so that it is decoded once; long files need little memory."""

import fractions
import itertools
import subprocess
import sys
from types import SimpleNamespace

import av
import numpy as np
import pytest
from video_kit import number_of, write_shifted, write_video

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


def shown_and_refused(path) -> tuple[dict[int, int], set[int]]:
    """Reads each frame alone. Returns the numbers that they show by position, and the positions that are refused."""
    shown, refused = {}, set()
    for position, time in enumerate(videos.timestamps(path)):
        try:
            shown[position] = number_of(videos.read(path, [time])[0])
        except UserError as error:
            assert str(error).startswith(f"{path}: ")
            refused.add(position)
    return shown, refused


@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
@pytest.mark.parametrize("place", [0, 4])
def test_frames_that_depend_on_a_damaged_one_that_is_not_shown_are_refused(tmp_path, name, place):
    path = tmp_path / name
    write_shifted(path, TIMES[:30], -320, g="20", bf="0", sc_threshold="0")
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.is_discard]
    assert len(packets) == 7 and packets[0].is_keyframe
    data = bytearray(path.read_bytes())
    start, size = packets[place].pos, packets[place].size
    data[start + size // 2 : start + size] = b"\x5a" * (size - size // 2)
    path.write_bytes(data)
    shown, refused = shown_and_refused(path)
    assert refused == set(range(13))  # up to the next key frame
    assert shown == {position: position + 7 for position in range(13, 23)}


@pytest.mark.parametrize(("shift", "bit"), [*itertools.product((0, -320), (50, 57, 64)), (0, 54), (0, 55)])
def test_frames_after_a_slice_without_its_references_are_refused(tmp_path, shift, bit):
    """FFmpeg returns the frame with old pixels or not at all, and predicts the next ones from another frame."""
    path = tmp_path / "a.mp4"
    write_shifted(path, TIMES[:12], shift, g="20", bf="0", sc_threshold="0")
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    hidden = sum(packet.is_discard for packet in packets)
    data = bytearray(path.read_bytes())
    data[packets[5].pos + bit // 8] ^= 1 << bit % 8  # in the header of the slice
    path.write_bytes(data)
    shown, refused = shown_and_refused(path)
    assert set(shown) <= set(range(6 - hidden)) and refused >= set(range(max(6 - hidden, 0), 12 - hidden))


@pytest.mark.parametrize(("packet", "bit"), [(1, 45), (1, 47), (1, 53), (1, 54), (1, 56), (2, 45)])
def test_damage_in_a_file_without_times(tmp_path, packet, bit):
    """The decoder shows which frames are damaged, but neither their places nor their order of decoding is known."""
    path = tmp_path / "a.avi"
    write_video(path, "libx264", TIMES[:60], g="20", bf="2", sc_threshold="0")
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    data[packets[packet].pos + bit // 8] ^= 1 << bit % 8  # in the header of a slice of the first 20 frames
    path.write_bytes(data)
    shown, refused = shown_and_refused(path)
    assert all(position == number for position, number in shown.items())
    assert refused and set(shown) >= set(range(40, 60))


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
    packets = [
        SimpleNamespace(pts=frame.pts, pos=0, is_discard=False, decode=lambda frame=frame: [frame]) for frame in frames
    ]
    container = SimpleNamespace(demux=lambda stream: packets, seek=lambda *_, **__: None)
    stream = SimpleNamespace(codec_context=SimpleNamespace(name="h264"))
    ticks = np.arange(5)
    clock = VideoClock(ticks, ticks[[0, 3]], False, fractions.Fraction(1, 25), ticks, {})
    for seek_point in (None, 0):
        decoded = video_decoder._decode_from(container, stream, clock, seek_point)
        assert [(tick, is_damaged) for tick, _, is_damaged in decoded] == [
            *((1, True), (2, True), (0, True)),
            *((3, False), (4, False)),
        ]


@pytest.mark.parametrize(
    ("packets", "expected"),
    [
        # FFmpeg complains of the hidden key frame, and returns a frame before it.
        (
            [("", []), ("error while decoding MB 0 0", [(0, True)]), ("", [(-1, True)]), ("", [(1, False)])],
            [False, True],
        ),
        # It does not return the first frame after a hidden one.
        ([("", [(-1, True)]), ("", []), ("", [(1, False)])], [True]),
    ],
)
def test_frames_that_are_not_shown_tell_of_damage(packets, expected):
    """Of each packet: the message, and (time, whether it is a key frame) of each frame that FFmpeg returns."""
    hidden = video_decoder._NOT_SHOWN

    def decode(message, returned):
        if message:
            av.logging.log(av.logging.ERROR, "h264", message)
        return [
            SimpleNamespace(pts=pts if pts >= 0 else hidden, key_frame=key, is_corrupt=False) for pts, key in returned
        ]

    container = SimpleNamespace(
        demux=lambda stream: [
            SimpleNamespace(
                pts=hidden if message else 0, is_discard=False, decode=lambda each=(message, returned): decode(*each)
            )
            for message, returned in packets
        ]
    )
    stream = SimpleNamespace(codec_context=SimpleNamespace(name="h264"))
    ticks = np.arange(2)
    clock = VideoClock(ticks, ticks[:1], False, fractions.Fraction(1, 25), ticks, {})
    assert [damaged for _, _, damaged in video_decoder._decode_from(container, stream, clock, None)] == expected


def test_a_damaged_time_does_not_fill_the_memory():
    """By its time, all frames would be decoded before the first one is shown."""
    frames = [SimpleNamespace(pts=pts, key_frame=False, is_corrupt=False) for pts in (10**9, *range(100))]
    decoded = []
    packets = [
        SimpleNamespace(pts=frame.pts, is_discard=False, decode=lambda frame=frame: decoded.append(0) or [frame])
        for frame in frames[1:]
    ]
    container = SimpleNamespace(demux=lambda stream: packets)
    stream = SimpleNamespace(codec_context=SimpleNamespace(name="h264"))
    ticks = np.array([*range(100), 10**9])
    clock = VideoClock(ticks, ticks[:1], False, fractions.Fraction(1, 25), np.full(101, 10**9), {})
    assert next(video_decoder._decode_from(container, stream, clock, None))[0] == 0
    assert len(decoded) < 20
