"""Every container gives the correct frame for a time, decoded from the beginning or after a seek."""

import itertools
import os

import av
import numpy as np
import pytest
from PIL import Image
from video_kit import number_of, numbered_frame, write_video

from EasyLM.errors import UserError
from tokenizer.media import video_decoder, video_writer, videos

STEADY = np.arange(0, 4000, 50)  # 80 frames, 20 a second
UNEVEN = np.cumsum(np.random.default_rng(0).integers(10, 300, 80))
FAST = {"preset": "ultrafast"}
FILES = {
    "b_frames.mp4": ("libx264", STEADY, {"g": "12", "bf": "3"}),
    "open_gop.mkv": ("libx264", STEADY, {"g": "12", "bf": "3", "x264-params": "open-gop=1"}),
    "hevc.mov": ("libx265", STEADY, {"x265-params": "keyint=12:log-level=none", **FAST}),
    "uneven.mp4": ("libx264", UNEVEN, {"g": "20", "bf": "2"}),
    "uneven.webm": ("libvpx-vp9", UNEVEN, {"g": "20", "deadline": "realtime", "cpu-used": "8"}),
    "vp8.webm": ("libvpx", STEADY, {"g": "30", "deadline": "realtime", "cpu-used": "8"}),
    "steady.avi": ("mpeg4", STEADY, {"g": "12"}),
    "motion.avi": ("mjpeg", STEADY, {}),
    "reordered.avi": ("libx264", STEADY, {"g": "12", "bf": "3"}),
    "program.mpg": ("mpeg2video", np.arange(80) * 40, {"g": "12", "bf": "2", "b": "2M"}),
    "transport.ts": ("libx264", STEADY, {"g": "12", "bf": "2"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of FILES."""
    directory = tmp_path_factory.mktemp("videos")
    for name, (codec, milliseconds, options) in FILES.items():
        write_video(directory / name, codec, milliseconds, **options)
    return directory


def numbers(pixels):
    return [number_of(frame) for frame in pixels]


@pytest.mark.parametrize("name", FILES)
def test_timestamps_and_frames_of_every_container(folder, name):
    milliseconds = FILES[name][1]
    times = videos.timestamps(folder / name)
    assert times.dtype == np.float64 and len(times) == 80
    # A container's clock can begin at another time and have coarse ticks.
    np.testing.assert_allclose(times - times[0], (milliseconds - milliseconds[0]) / 1000, atol=2e-3)
    assert numbers(videos.read(folder / name, times)) == list(range(80))


def test_a_title_in_another_encoding_is_accepted(folder, tmp_path):
    path = tmp_path / "titled.mkv"
    with av.open(str(folder / "steady.avi")) as source, av.open(str(path), "w") as target:
        target.metadata["title"] = "TITLE!"
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    content = path.read_bytes()
    assert content.count(b"TITLE!") == 1
    path.write_bytes(content.replace(b"TITLE!", "Übung".encode("latin-1") + b"!"))
    assert numbers(videos.read(path, videos.timestamps(path)[:3])) == [0, 1, 2]


@pytest.mark.parametrize("name", ["a:b.mp4", "http:z.mp4", "%d.mp4", "a\nb.mp4", "a b'\".mp4"])
def test_a_name_is_neither_a_protocol_nor_a_pattern(folder, tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes((folder / "b_frames.mp4").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert numbers(videos.read(name, videos.timestamps(name)[:2])) == [0, 1]
    video_writer.write(name, np.stack([numbered_frame(5), numbered_frame(6)]), 10)
    assert numbers(videos.read(name, [0.0, 0.1])) == [5, 6]


@pytest.mark.parametrize("name", FILES)
def test_times_in_any_order(folder, name):
    """Single and repeated frames are bit-equal to those of a complete read."""
    times = videos.timestamps(folder / name)
    whole = videos.read(folder / name, times)
    rng = np.random.default_rng(1)
    for chosen in ([79], [0, 79], [40, 3, 41, 40], rng.integers(0, 80, 9)):
        gap = np.diff(times, append=times[-1] + 0.01)[chosen]
        within = times[chosen] + rng.uniform(0, 0.9, len(chosen)) * gap
        np.testing.assert_array_equal(videos.read(folder / name, within), whole[chosen])


@pytest.mark.parametrize("name", ["b_frames.mp4", "open_gop.mkv", "uneven.webm", "steady.avi"])
def test_sparse_frames_use_seeks(folder, name, monkeypatch):
    decoded = []
    decode_from = video_decoder._decode_from

    def counting(*arguments):
        for frame in decode_from(*arguments):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(video_decoder, "_decode_from", counting)
    times = videos.timestamps(folder / name)
    assert numbers(videos.read(folder / name, times[[2, 78]])) == [2, 78]
    assert len(decoded) < 40  # of 80


def test_decoding_restarts_from_the_beginning_after_a_seek_past_the_frame(folder, monkeypatch):
    decode_from = video_decoder._decode_from

    def seek_too_far(container, stream, clock, seek_point):
        is_start = seek_point in (None, clock.ticks[0])
        return decode_from(container, stream, clock, seek_point if is_start else clock.seek_points[-1])

    monkeypatch.setattr(video_decoder, "_decode_from", seek_too_far)
    times = videos.timestamps(folder / "b_frames.mp4")
    assert numbers(videos.read(folder / "b_frames.mp4", times[[30, 31, 50, 79]])) == [30, 31, 50, 79]


def test_hidden_packets_are_not_frames(folder, tmp_path):
    """Two-pass VP8 encoders write frames for prediction only, which are never shown."""
    with av.open(str(folder / "vp8.webm")) as source, av.open(str(tmp_path / "hidden.webm"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            data, pts, base = bytes(packet), packet.pts, packet.time_base
            packet.stream = stream
            target.mux(packet)
            if number == 0:  # once more, with its show bit cleared
                hidden = av.Packet(bytes([data[0] & ~(1 << 4)]) + data[1:])
                hidden.stream, hidden.time_base, hidden.pts, hidden.dts = stream, base, pts + 20, pts + 20
                target.mux(hidden)
    times = videos.timestamps(tmp_path / "hidden.webm")
    np.testing.assert_array_equal(times, videos.timestamps(folder / "vp8.webm"))
    assert numbers(videos.read(tmp_path / "hidden.webm", times)) == list(range(80))


@pytest.mark.parametrize("rotation, turns", [(90, 1), (180, 2), (-90, 3)])
def test_rotation_metadata_is_applied(tmp_path, rotation, turns):
    write_video(tmp_path / "phone.mp4", "libx264", STEADY[:3], rotation=rotation, crf="1")
    (frame,) = videos.read(tmp_path / "phone.mp4", [0.05])
    expected = np.rot90(numbered_frame(1), turns)
    assert frame.shape == expected.shape
    assert np.abs(frame * 255 - expected).mean() < 12  # chroma subsampling blurs the borders of colours


def test_pixels_are_float32_resized_by_pillow(folder):
    native = videos.read(folder / "b_frames.mp4", [0.5, 1.0])
    assert native.dtype == np.float32 and native.shape == (2, 24, 64, 3) and native.min() >= 0 and native.max() <= 1
    assert np.abs(native[0] * 255 - numbered_frame(10)).mean() < 12
    small = videos.read(folder / "b_frames.mp4", [0.5, 1.0], 16)
    for large, resized in zip(native, small):
        image = Image.fromarray(np.round(large * 255).astype(np.uint8)).resize((16, 16), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(resized, np.asarray(image, np.float32) / 255)


class TestErrors:
    @pytest.mark.parametrize("name", ["b_frames.mp4", "uneven.mp4", "uneven.webm", "open_gop.mkv", "steady.avi"])
    def test_truncated_files(self, folder, tmp_path, name):
        data = (folder / name).read_bytes()
        for share in (0.0, 0.01, 0.3, 0.8):
            cut = tmp_path / name
            cut.write_bytes(data[: int(len(data) * share)])
            with pytest.raises(UserError, match=f"{cut}: "):
                videos.timestamps(cut)

    def test_truncated_after_the_index(self, folder, tmp_path):
        with av.open(str(folder / "b_frames.mp4")) as source:  # faststart: the index precedes the frames
            with av.open(str(tmp_path / "web.mp4"), "w", options={"movflags": "faststart"}) as target:
                stream = target.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.dts is not None:
                        packet.stream = stream
                        target.mux(packet)
        data = (tmp_path / "web.mp4").read_bytes()
        (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 3 // 4])
        assert len(videos.timestamps(tmp_path / "web.mp4")) == 80
        with pytest.raises(UserError, match=r"cut.mp4: is truncated: it has \d+ of 80 frames"):
            videos.timestamps(tmp_path / "cut.mp4")

    def test_not_videos(self, tmp_path):
        (tmp_path / "text.mp4").write_text("no video at all" * 100)
        with av.open(str(tmp_path / "sound.mp4"), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp")
            silence.sample_rate = 8000
            container.mux(stream.encode(silence))
            container.mux(stream.encode())
        for name, message in (
            ("none.mp4", "no such file"),
            ("text.mp4", "not a readable video"),
            ("sound.mp4", "no video stream"),
            (".", "no such file"),
        ):
            for function in (videos.timestamps, lambda path: videos.read(path, [0.0])):
                with pytest.raises(UserError, match=f"^{tmp_path / name}: .*{message}"):
                    function(tmp_path / name)

    def test_playlists(self, tmp_path):
        """A playlist could name a pipe, which would wait for ever, or another file."""
        os.mkfifo(tmp_path / "pipe.ts")
        (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile pipe.ts\n")
        with pytest.raises(UserError, match=r"list\.mp4: not a readable video"):
            videos.timestamps(tmp_path / "list.mp4")

    @pytest.mark.parametrize("second", [-0.1, 4.2, float("nan"), float("inf")])
    def test_times_outside(self, folder, second):
        with pytest.raises(UserError, match=r"b_frames.mp4: no frame is shown at .* s \(its frames: 0 to 3.95 s\)"):
            videos.read(folder / "b_frames.mp4", [1.0, second])

    def test_corrupt_bytes_are_read_or_reported(self, folder, tmp_path):
        """A corrupt file is read, or raises a UserError with its path."""
        rng = np.random.default_rng(0)
        outcomes = set()
        for name in ("b_frames.mp4", "uneven.webm", "steady.avi"):
            data = np.frombuffer((folder / name).read_bytes(), np.uint8)
            for number in range(20):
                mutated = data.copy()
                positions = rng.integers(0, len(data), 1 + number * 3)
                mutated[positions] = rng.integers(0, 256, len(positions))
                path = tmp_path / f"{number}_{name}"
                path.write_bytes(mutated.tobytes())
                try:
                    times = videos.timestamps(path)
                    assert len(videos.read(path, times[[0, len(times) // 2, -1]], 8)) == 3
                    outcomes.add("read")
                except UserError as error:
                    assert str(error).startswith(f"{path}: ")
                    outcomes.add("reported")
        assert outcomes == {"read", "reported"}

    @pytest.mark.parametrize("name", ["motion.avi", "steady.avi"])
    def test_a_damaged_index_does_not_lead_to_other_frames(self, folder, tmp_path, name):
        data = bytearray((folder / name).read_bytes())
        first = data.index(b"idx1") + 8  # of entries of 16 bytes: kind, flags, position, size
        data[first + 40 * 16 : first + 40 * 16 + 4] = b"09dc"  # of another stream
        (tmp_path / name).write_bytes(data)
        times = videos.timestamps(tmp_path / name)
        for number in (50, 60, 10):
            assert numbers(videos.read(tmp_path / name, times[[number]])) == [number]

    def test_a_seek_that_finds_another_packet_does_not_lead_to_other_frames(self, tmp_path):
        """With a damaged segment header and a damaged time, FFmpeg gives the first packet the time of the last."""
        path = tmp_path / "intra.mkv"
        write_video(path, "mpeg4", range(0, 320, 40), g="1")
        data = bytearray(path.read_bytes())
        data[data.index(b"\x18\x53\x80\x67") + 2] ^= 0xD8
        data[data.index(b"\x81\0\0\x80") + 1] = 0xC6  # track 1, time 0, key frame
        path.write_bytes(data)
        times = videos.timestamps(path)
        assert numbers(videos.read(path, times[[7]])) == [7]
        assert numbers(videos.read(path, times)) == list(range(8))

    @pytest.mark.parametrize(("name", "damaged"), [("b_frames.mp4", range(12, 24)), ("motion.avi", [12])])
    def test_damaged_frames_and_those_that_depend_on_them_are_refused(self, folder, tmp_path, name, damaged):
        """A decoder marks the damaged frame alone, and MJPEG's none. Predicted frames after it look whole."""
        with av.open(str(folder / name)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.pts is not None]
            key = sorted(packets, key=lambda packet: packet.pts)[12]
            assert key.is_keyframe
        path, data = tmp_path / name, bytearray((folder / name).read_bytes())
        if name == "motion.avi":  # an end of the image before its end, where it would not raise an error
            start, damage = key.pos + 8 + int(0.9 * key.size), b"\xff\xd9"
        else:
            start, damage = key.pos + key.size // 3, np.random.default_rng(0).bytes(key.size // 3)
        data[start : start + len(damage)] = damage
        path.write_bytes(data)
        times = videos.timestamps(path)
        for number in (*range(8, 28), 79):
            if number in damaged:
                with pytest.raises(UserError, match=f"^{path}: "):
                    videos.read(path, times[[number]])
            elif name == "motion.avi" or number < 10 or number > 24:  # B-frames before a key frame depend on it
                assert numbers(videos.read(path, times[[number]])) == [number]

    @pytest.mark.parametrize("marker", [b"\xff\xd8", b"\xff\xdb", b"\xff\xc0", b"\xff\xda"])
    @pytest.mark.parametrize("damage", [b"\x00\x00", b"\xff\xfe"])  # no marker; the marker of a comment
    def test_a_jpeg_frame_with_a_damaged_header_is_refused(self, folder, tmp_path, marker, damage):
        """FFmpeg reports no error. It decodes the frame with tables of the frame before it, or returns that again."""
        with av.open(str(folder / "motion.avi")) as container:
            packet = [packet for packet in container.demux(video=0) if packet.size][12]
        path, data = tmp_path / "video.avi", bytearray((folder / "motion.avi").read_bytes())
        start = data.index(marker, packet.pos)
        data[start : start + 2] = damage
        path.write_bytes(data)
        times = videos.timestamps(path)
        with pytest.raises(UserError, match=f"^{path}: "):
            videos.read(path, times[[12]])
        assert numbers(videos.read(path, times[[11, 13]])) == [11, 13]

    def test_the_reason_does_not_depend_on_other_files(self, folder, tmp_path):
        path, reasons = tmp_path / "video.mp4", []
        path.write_bytes((folder / "b_frames.mp4").read_bytes()[:2000])
        for _ in range(2):
            with pytest.raises(UserError, match=f"^{path}: not a readable video") as error:
                videos.timestamps(path)
            reasons.append(str(error.value))
            videos.read(folder / "b_frames.mp4", [0])  # from here on, FFmpeg's messages are captured
        assert reasons[0] == reasons[1]

    def test_a_frame_whose_references_cannot_be_found_is_refused(self, tmp_path):
        """FFmpeg returns it with old pixels, and reports no error. Which ones they are depends on where it began."""
        write_video(tmp_path / "whole.mp4", "libx264", STEADY[:8], g="4", bf="0")
        whole, path, outcomes = (tmp_path / "whole.mp4").read_bytes(), tmp_path / "video.mp4", set()
        with av.open(str(tmp_path / "whole.mp4")) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        times = videos.timestamps(tmp_path / "whole.mp4")
        for number, bit in itertools.product((5, 6, 7), range(8 * 5, 8 * 10)):  # after the length and kind of the slice
            data = bytearray(whole)
            data[packets[number].pos + bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            try:
                pixels = videos.read(path, times[[number]])[0]
            except UserError as error:
                assert str(error).startswith(f"{path}: ")
                outcomes.add("refused")
                continue
            with av.open(str(path)) as container:  # from the beginning
                expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][number]
            np.testing.assert_allclose(pixels, expected / 255, atol=0.02)
            outcomes.add("read")
        assert outcomes == {"read", "refused"}

    def test_frames_before_a_damaged_one_that_depend_on_it_are_refused(self, folder, tmp_path):
        """B-frames are decoded after the frame that they precede. Their decoder marks none of them."""
        with av.open(str(folder / "b_frames.mp4")) as container:
            packets = [packet for packet in container.demux(video=0) if packet.pts is not None]
        shown = sorted(packet.pts for packet in packets)
        place, reference = next(
            (place, packet)
            for place, packet in enumerate(packets[20:], 20)
            if not packet.is_keyframe and packet.pts > packets[place + 1].pts
        )
        earlier = [shown.index(packet.pts) for packet in packets[place + 1 :] if packet.pts < reference.pts]
        path, data = tmp_path / "video.mp4", bytearray((folder / "b_frames.mp4").read_bytes())
        start, count = reference.pos + reference.size * 3 // 4, reference.size // 5  # elsewhere FFmpeg reports an error
        data[start : start + count] = np.random.default_rng(0).bytes(count)
        path.write_bytes(data)
        times = videos.timestamps(path)
        for number in (*earlier, shown.index(reference.pts)):
            with pytest.raises(UserError, match=f"^{path}: "):
                videos.read(path, times[[number]])
        assert earlier and numbers(videos.read(path, times[[min(earlier) - 1]])) == [min(earlier) - 1]


class TestWrite:
    def test_mp4_round_trip(self, tmp_path):
        frames = np.stack([numbered_frame(number)[:23, :63] for number in range(12)])  # odd sizes
        video_writer.write(tmp_path / "deep" / "out.mp4", frames, 12.5)
        np.testing.assert_allclose(videos.timestamps(tmp_path / "deep" / "out.mp4"), np.arange(12) / 12.5, atol=1e-3)
        back = videos.read(tmp_path / "deep" / "out.mp4", np.arange(12) / 12.5)
        assert back.shape == (12, 24, 64, 3)
        assert numbers(back) == list(range(12))
        assert np.abs(back[:, :23, :63] * 255 - frames).mean() < 12
        assert os.listdir(tmp_path / "deep") == ["out.mp4"]

    def test_gif(self, tmp_path):
        frames = np.stack([numbered_frame(number) for number in range(12)])
        video_writer.write(tmp_path / "out.gif", frames, 10)
        with Image.open(tmp_path / "out.gif") as animation:
            assert animation.n_frames == 12 and animation.info["duration"] == 100
            for number in range(12):
                animation.seek(number)
                np.testing.assert_array_equal(np.asarray(animation.convert("RGB")), frames[number])

    @pytest.mark.parametrize("name, fps, message", [("a.avi", 5, "'.avi' cannot be written"), ("a.mp4", 0, "above 0")])
    def test_invalid_arguments(self, tmp_path, name, fps, message):
        with pytest.raises(UserError, match=f"{tmp_path / name}: .*{message}"):
            video_writer.write(tmp_path / name, np.zeros((1, 8, 8, 3), np.uint8), fps)
        assert not os.listdir(tmp_path)
