"""MP4 and QuickTime: edit lists, cover pictures, fragments."""

import re
import struct

import av
import numpy as np
import pytest
from video_kit import number_of, write_shifted, write_video

from EasyLM.errors import UserError
from tokenizer.media import videos

TIMES = np.arange(0, 4000, 50)


def numbers(pixels):
    return [number_of(frame) for frame in pixels]


def boxes(data: bytes) -> list[bytes]:
    """Splits data into boxes."""
    parts = []
    while data:
        size = int.from_bytes(data[:4])
        parts.append(data[:size])
        data = data[size:]
    return parts


@pytest.mark.parametrize("shift", [-700, -75, 130])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
def test_edit_lists_and_negative_times(tmp_path, name, shift):
    """In MP4, an edit list cuts off frames before time 0. They are decoded, as others need them, but not shown."""
    write_shifted(tmp_path / name, TIMES, shift, g="30", bf="3")
    with av.open(str(tmp_path / name)) as container:  # sequential decoding, independent of the tested code
        expected = [number_of(frame.to_ndarray(format="rgb24") / 255) for frame in container.decode(video=0)]
    times = videos.timestamps(tmp_path / name)
    assert numbers(videos.read(tmp_path / name, times)) == expected
    assert len(expected) > 60
    np.testing.assert_allclose(np.diff(times), 0.05, atol=2e-3)
    for chosen in ([len(times) - 1], [0], [31, 2], [len(times) // 2, len(times) - 2]):
        assert numbers(videos.read(tmp_path / name, times[chosen])) == [expected[i] for i in chosen]


def with_edits(movie: bytes, edits: list[tuple[int, int]]) -> bytes:
    """Returns an MP4 movie with an edit list: of each edit the duration in milliseconds, and the tick of its start."""
    start = movie.index(b"elst") - 4
    old = int.from_bytes(movie[start : start + 4])
    entries = b"".join(struct.pack(">IiI", duration, tick, 1 << 16) for duration, tick in edits)
    box = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits)) + entries
    data = bytearray(movie[:start] + box + movie[start + old :])
    for name in (b"edts", b"trak", b"moov"):
        place = data.index(name) - 4
        data[place : place + 4] = struct.pack(">I", int.from_bytes(data[place : place + 4]) + len(box) - old)
    return bytes(data)


@pytest.mark.parametrize(
    ("edits", "count"),
    [
        ([(900, 500)], 18),  # the beginning and the end are cut off
        ([(700, 300), (800, 1650)], 30),
        ([(700, 1300), (800, 350)], 30),  # in another order
        ([(700, 250), (700, 250)], 28),  # twice
    ],
)
@pytest.mark.parametrize("options", [{"g": "10", "bf": "0"}, {"g": "10", "bf": "2"}, {"g": "100", "bf": "3"}])
def test_movies_that_were_cut(tmp_path, options, edits, count):
    """Cameras and editors cut a movie by its edit list alone."""
    write_video(tmp_path / "a.mp4", "libx264", TIMES[:60], **options)
    with av.open(str(tmp_path / "a.mp4")) as container:
        ticks = [(duration, round(start / 1000 / container.streams.video[0].time_base)) for duration, start in edits]
    movie = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(with_edits(movie, ticks))
    with av.open(str(tmp_path / "a.mp4")) as container:  # sequential decoding, independent of the tested code
        expected = [number_of(frame.to_ndarray(format="rgb24") / 255) for frame in container.decode(video=0)]
    times = videos.timestamps(tmp_path / "a.mp4")
    assert len(times) == count and numbers(videos.read(tmp_path / "a.mp4", times)) == expected
    assert [numbers(videos.read(tmp_path / "a.mp4", [time]))[0] for time in times] == expected


def test_damage_in_a_movie_that_was_cut(tmp_path):
    """B-frames are refused that are shown before the damaged frame. Their order of decoding is not known."""
    path = tmp_path / "a.mp4"
    write_video(path, "libx264", TIMES[:60], g="10", bf="2", sc_threshold="0")
    path.write_bytes(with_edits(path.read_bytes(), [(700, 300 * 16), (800, 1650 * 16)]))
    expected = numbers(videos.read(path, videos.timestamps(path)))
    assert len(expected) == 30
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    (packet,) = [packet for packet in packets if packet.pts == 11 * 50 * 16 and not packet.is_discard]
    data = bytearray(path.read_bytes())
    half = packet.size // 2
    data[packet.pos + half : packet.pos + packet.size] = b"\x5a" * (packet.size - half)
    path.write_bytes(data)
    refused = set()
    for position, time in enumerate(videos.timestamps(path)):
        try:
            assert numbers(videos.read(path, [time])) == [expected[position]]
        except UserError:
            refused.add(position)
    assert {10, 11} <= refused < set(range(30))


@pytest.mark.parametrize("has_video", [True, False])
def test_a_cover_picture_is_not_the_video(tmp_path, has_video):
    """In MP4 it is an item of the user data, which can come before the tracks; FFmpeg lists it as a video stream."""
    write_video(tmp_path / "source.mp4", "libx264", TIMES[:8])
    write_video(tmp_path / "cover.avi", "mjpeg", TIMES[:2])
    with (
        av.open(str(tmp_path / "source.mp4")) as source,
        av.open(str(tmp_path / "cover.avi")) as cover,
        av.open(str(tmp_path / "a.mp4"), "w") as target,
    ):
        streams = {"cover": target.add_stream_from_template(cover.streams.video[0])}
        streams["cover"].disposition = av.stream.Disposition.attached_pic
        if has_video:
            streams["video"] = target.add_stream_from_template(source.streams.video[0])
        for name, container in (("cover", cover), ("video", source)):
            packets = [packet for packet in container.demux(video=0) if packet.dts is not None]
            for packet in packets[: 1 if name == "cover" else None if has_video else 0]:
                packet.stream = streams[name]
                target.mux(packet)
    *others, movie = boxes((tmp_path / "a.mp4").read_bytes())
    items = sorted(boxes(movie[8:]), key=lambda item: item[4:8] != b"udta")
    (tmp_path / "a.mp4").write_bytes(b"".join(others) + movie[:8] + b"".join(items))
    if has_video:
        times = videos.timestamps(tmp_path / "a.mp4")
        assert numbers(videos.read(tmp_path / "a.mp4", times)) == list(range(8))
    else:
        with pytest.raises(UserError, match=r"a\.mp4: has no video stream"):
            videos.timestamps(tmp_path / "a.mp4")


def write_fragments(folder, flags, bf):
    write_video(folder / "source.mp4", "libx264", TIMES[:30], g="10", bf=bf)
    path = folder / "a.mp4"
    with av.open(str(folder / "source.mp4")) as source:
        with av.open(str(path), "w", container_options={"movflags": flags}) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
    return path


@pytest.mark.parametrize(
    ("flags", "bf"),
    [("frag_keyframe+empty_moov", "2"), ("cmaf+frag_keyframe", "2"), ("frag_every_frame+empty_moov", "0")],
)
def test_fragments_that_are_cut_are_refused(tmp_path, flags, bf):
    """A recording that was interrupted, or a download that ended early. No header tells the number of frames."""
    path = write_fragments(tmp_path, flags, bf)
    times, whole = videos.timestamps(path), path.read_bytes()
    assert numbers(videos.read(path, times)) == list(range(30))
    kinds = [box[4:8] for box in boxes(whole)]
    ends = np.cumsum([len(box) for box in boxes(whole)]).tolist()
    first = ends[kinds.index(b"moof") - 1]
    mdat_ends = [end for end, kind in zip(ends, kinds) if kind == b"mdat"]
    for cut in sorted({*range(first + 1, mdat_ends[-1], 61), *(end for end in ends if end > first)}):
        path.write_bytes(whole[:cut])
        if cut >= mdat_ends[-1] or any(0 <= cut - end < 8 for end in mdat_ends):  # less than a header is not a box
            shown = videos.timestamps(path)
            assert 0 < len(shown) <= 30 and numbers(videos.read(path, shown)) == list(range(len(shown)))
        else:
            with pytest.raises(UserError, match=r"a\.mp4: "):
                videos.timestamps(path)


def test_times_that_floating_point_cannot_tell_apart_are_refused(tmp_path):
    path = write_fragments(tmp_path, "frag_keyframe+empty_moov", "0")
    data = path.read_bytes()
    for match in re.finditer(b"tfdt", data):  # the time of the fragment's first frame, after version and flags
        start = match.end() + 4
        data = data[:start] + b"\x5d" + data[start + 1 :]
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.mp4: its times are too large to tell its frames apart: \d\.\d+e\+14 s$"):
        videos.timestamps(path)
