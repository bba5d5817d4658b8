"""Video frames have the colours and the orientation that their tags and their display matrix define."""

import itertools
import struct

import numpy as np
import pytest
from video_kit import number_of, numbered_frame, write_planes, write_video

from EasyLM.errors import UserError
from tokenizer.media import video_file, videos

BT709, UNKNOWN, BT601, BT2020 = 1, 2, 6, 9  # colour matrices of H.273; BT709 and BT2020 are also primaries
LIMITED, FULL = 1, 2  # FFmpeg's colour ranges
PQ, HLG = 16, 18  # transfer functions
WEIGHTS = {BT709: (0.2126, 0.0722), BT601: (0.299, 0.114), BT2020: (0.2627, 0.0593)}  # of red and blue in luma
COLOUR = (0.8, 0.4, 0.2)


def yuv(rgb, matrix: int, bits: int = 8, full: bool = False) -> list[int]:
    """The definition in ITU-T H.273, equations 38 to 43."""
    red_weight, blue_weight = WEIGHTS[matrix]
    luma = red_weight * rgb[0] + (1 - red_weight - blue_weight) * rgb[1] + blue_weight * rgb[2]
    chroma = (rgb[2] - luma) / (2 - 2 * blue_weight), (rgb[0] - luma) / (2 - 2 * red_weight)
    scale, largest = 2 ** (bits - 8), 2**bits - 1
    if full:
        return [round(largest * luma), *(round(largest * c + 2 ** (bits - 1)) for c in chroma)]
    return [round(scale * (16 + 219 * luma)), *(round(scale * (128 + 224 * c)) for c in chroma)]


def shown_colour(path) -> np.ndarray:
    pixels = videos.read(path, [0.0], 8)[0]
    assert np.ptp(pixels, axis=(0, 1)).max() < 0.01
    return 255 * pixels.mean((0, 1))


HD, SD = (1280, 720), (720, 576)


@pytest.mark.parametrize(
    ("size", "tag", "matrix"),
    [
        *(
            (SD, UNKNOWN, BT601),
            (HD, UNKNOWN, BT709),
            ((720, 1280), UNKNOWN, BT709),
            ((768, 578), UNKNOWN, BT709),
            ((64, 48), UNKNOWN, BT601),
        ),
        *((SD, BT709, BT709), (HD, BT601, BT601), (SD, BT601, BT601), ((63, 35), BT709, BT709)),
    ],
)
@pytest.mark.parametrize("full", [False, True])
def test_the_colour_matrix_is_tagged_or_follows_from_the_size(tmp_path, size, tag, matrix, full):
    planes = yuv(COLOUR, matrix, full=full)
    write_planes(
        tmp_path / "a.mkv", "ffv1", "yuv420p", planes, size, colorspace=tag, color_range=FULL if full else LIMITED
    )
    np.testing.assert_allclose(shown_colour(tmp_path / "a.mkv"), np.multiply(255, COLOUR), atol=3)


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"),
    [("a.mp4", "libx264", "yuv420p"), ("a.mp4", "libx264", "yuv444p"), ("a.avi", "mjpeg", "yuvj422p")],
)
def test_subsampled_and_full_range_codecs(tmp_path, name, codec, pixel_format):
    planes = yuv(COLOUR, BT601, full=codec == "mjpeg")
    write_planes(tmp_path / name, codec, pixel_format, planes)
    np.testing.assert_allclose(shown_colour(tmp_path / name), np.multiply(255, COLOUR), atol=3)


@pytest.mark.parametrize("pixel_format", ["gray", "gray10le"])
@pytest.mark.parametrize("full", [False, True])
def test_the_range_of_gray_is_tagged(tmp_path, pixel_format, full):
    """As HEVC and AV1 videos without colours have it."""
    bits = 10 if "10" in pixel_format else 8
    for gray in (0.0, 0.4, 1.0):
        planes = yuv((gray, gray, gray), BT601, bits, full)[:1]
        write_planes(tmp_path / "a.mkv", "ffv1", pixel_format, planes, color_range=FULL if full else LIMITED)
        np.testing.assert_allclose(shown_colour(tmp_path / "a.mkv"), 3 * [255 * gray], atol=1)


def test_frames_with_alpha_are_composited_over_white(tmp_path):
    write_planes(tmp_path / "a.mkv", "ffv1", "yuva420p", [*yuv((0, 0, 0), BT601), 51])  # a fifth opaque
    np.testing.assert_allclose(shown_colour(tmp_path / "a.mkv"), 3 * [204], atol=2)


def primaries_to_xyz(red, green, blue) -> np.ndarray:
    """The matrix of linear RGB to XYZ from chromaticities (x, y), with the white of D65 (SMPTE RP 177)."""
    xyz = np.array([(x / y, 1, (1 - x - y) / y) for x, y in (red, green, blue)]).T
    white = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
    return xyz * np.linalg.solve(xyz, white)


SRGB_TO_XYZ = primaries_to_xyz((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
WIDE_TO_XYZ = {
    BT2020: primaries_to_xyz((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    12: primaries_to_xyz((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),  # P3, D65
}


def pq(light) -> np.ndarray:
    """The inverse EOTF of SMPTE ST 2084 for light in units of 203 cd/m2."""
    power = (np.asarray(light) * 203 / 10_000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg(light) -> np.ndarray:
    """The inverse OOTF and the OETF of ITU-R BT.2100, on a display of 1000 cd/m2, for light in units of 203 cd/m2."""
    light = np.asarray(light) * 203 / 1000
    luminance = light @ [0.2627, 0.6780, 0.0593]
    scene = light * luminance ** (1 / 1.2 - 1)
    bright = 0.17883277 * np.log(np.maximum(12 * scene, 1) - 0.28466892) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), bright)


def srgb_light(signal) -> np.ndarray:
    signal = np.asarray(signal)
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize(("transfer", "encode"), [(PQ, pq), (HLG, hlg)])
@pytest.mark.parametrize("colour", [(0.8, 0.4, 0.2), (0.1, 0.5, 0.9), (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)])
def test_hdr_is_converted_to_srgb(tmp_path, transfer, encode, colour):
    """HDR white (203 cd/m2 in ITU-R BT.2408) becomes white."""
    light = np.linalg.solve(WIDE_TO_XYZ[BT2020], SRGB_TO_XYZ @ srgb_light(colour))
    planes = yuv(encode(light), BT2020, bits=10)
    tags = {"colorspace": BT2020, "color_range": LIMITED, "color_trc": transfer, "color_primaries": BT2020}
    write_planes(tmp_path / "a.mkv", "ffv1", "yuv420p10le", planes, **tags)
    np.testing.assert_allclose(shown_colour(tmp_path / "a.mkv"), np.multiply(255, colour), atol=3)
    write_planes(tmp_path / "b.mkv", "ffv1", "yuv420p10le", planes, color_trc=transfer)  # HDR is in BT.2020
    np.testing.assert_allclose(shown_colour(tmp_path / "b.mkv"), shown_colour(tmp_path / "a.mkv"), atol=0.5)


def test_light_above_hdr_white_is_clipped(tmp_path):
    planes = yuv(pq([4.0, 4.0, 4.0]), BT2020, bits=10)
    tags = {"colorspace": BT2020, "color_range": LIMITED, "color_trc": PQ, "color_primaries": BT2020}
    write_planes(tmp_path / "a.mkv", "ffv1", "yuv420p10le", planes, **tags)
    np.testing.assert_allclose(shown_colour(tmp_path / "a.mkv"), 3 * [255], atol=0.5)


@pytest.mark.parametrize(("matrix", "primaries"), [(BT2020, BT2020), (BT709, 12)])
def test_wide_primaries_are_converted_to_srgb(tmp_path, matrix, primaries):
    light = np.linalg.solve(WIDE_TO_XYZ[primaries], SRGB_TO_XYZ @ srgb_light(COLOUR))
    signal = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    tags = {"colorspace": matrix, "color_range": LIMITED, "color_trc": BT709, "color_primaries": primaries}
    write_planes(tmp_path / "a.mkv", "ffv1", "yuv420p10le", yuv(signal, matrix, bits=10), **tags)
    np.testing.assert_allclose(shown_colour(tmp_path / "a.mkv"), np.multiply(255, COLOUR), atol=3)


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ({"colorspace": 14}, "colour matrix .number 14 of H.273. is not supported"),
        ({"color_trc": 8}, "transfer function"),
    ],
)
def test_other_colour_tags_are_refused_by_name(tmp_path, tag, message):
    write_planes(tmp_path / "a.mkv", "ffv1", "yuv420p10le", [500, 500, 500], **tag)
    with pytest.raises(UserError, match=rf"a\.mkv: .*{message}"):
        videos.read(tmp_path / "a.mkv", [0.0], 8)


MATRICES = [
    *((a, 0, 0, d) for a, d in itertools.product((1, -1), repeat=2)),
    *((0, b, c, 0) for b, c in itertools.product((1, -1), repeat=2)),
]


@pytest.mark.parametrize("matrix", MATRICES)
def test_mirrored_and_turned_videos_are_upright(tmp_path, matrix):
    """A pixel (x, y) is shown at (ax + cy, bx + dy), shifted into view: ISO/IEC 14496-12, 8.3.2."""
    a, b, c, d = matrix
    write_video(tmp_path / "a.mp4", "libx264", range(0, 300, 100), crf="1")
    content = (tmp_path / "a.mp4").read_bytes()
    track = content.index(b"tkhd")
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    place = content.index(identity, track)
    changed = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(content[:place] + changed + content[place + len(identity) :])
    stored = numbered_frame(1)
    y, x = np.mgrid[: stored.shape[0], : stored.shape[1]]
    shown_x, shown_y = a * x + c * y, b * x + d * y
    expected = np.zeros((int(np.ptp(shown_y)) + 1, int(np.ptp(shown_x)) + 1, 3))
    expected[shown_y - shown_y.min(), shown_x - shown_x.min()] = stored
    (shown,) = videos.read(tmp_path / "a.mp4", [0.15])
    assert shown.shape == expected.shape
    assert np.abs(shown * 255 - expected).mean() < 12  # chroma subsampling blurs the borders of colours


class TestClocksThatRestart:
    @pytest.mark.parametrize(
        ("name", "shift"), [*itertools.product(("a.ts", "a.mpg"), (0, 400, 4000)), ("a.ts", 420), ("a.ts", 10**6)]
    )
    def test_joined_segments_keep_all_their_frames(self, tmp_path, name, shift):
        """The second segment begins at the time of the first, within it, or after it."""
        codec = {"a.ts": "libx264", "a.mpg": "mpeg2video"}[name]
        parts = []
        for first, start in ((0, 0), (40, shift)):
            times = start + np.arange(40) * 40
            write_video(tmp_path / name, codec, times, first=first, g="12", bf="2")
            parts.append((tmp_path / name).read_bytes())
        (tmp_path / name).write_bytes(b"".join(parts))
        times = videos.timestamps(tmp_path / name)
        assert len(times) == 80 and np.diff(times).min() > 0.03
        numbers = [number_of(frame) for frame in videos.read(tmp_path / name, times)]
        assert numbers == list(range(80))
        assert [number_of(frame) for frame in videos.read(tmp_path / name, times[[70, 3]])] == [70, 3]

    @pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4")])
    def test_joined_files_keep_all_their_frames_or_are_refused(self, tmp_path, name, codec):
        for file in (name, "a.mp4"):
            parts = []
            for first in (0, 10):
                write_video(tmp_path / file, codec, np.arange(10) * 40, first=first)
                parts.append((tmp_path / file).read_bytes())
            (tmp_path / file).write_bytes(b"".join(parts))
        times = videos.timestamps(tmp_path / name)
        assert [number_of(frame) for frame in videos.read(tmp_path / name, times)] == list(range(20))
        with pytest.raises(UserError, match=r"a\.mp4: consists of 2 joined files"):
            videos.timestamps(tmp_path / "a.mp4")

    @pytest.mark.parametrize(
        ("name", "codec"),
        [("a.flv", "libx264"), ("b.flv", "flv"), ("a.wmv", "wmv2"), ("a.asf", "msmpeg4"), ("a.3gp", "mpeg4")],
    )
    @pytest.mark.parametrize("shift", [0, 100, 400])
    def test_joined_files_of_which_ffmpeg_reads_the_first_are_refused(self, tmp_path, name, codec, shift):
        parts = []
        for first, start in ((0, 0), (10, shift)):
            write_video(tmp_path / name, codec, start + np.arange(10) * 40, first=first)
            assert number_of(videos.read(tmp_path / name, videos.timestamps(tmp_path / name)[:1])[0]) == first
            parts.append((tmp_path / name).read_bytes())
        (tmp_path / name).write_bytes(b"".join(parts))
        with pytest.raises(UserError, match=rf"{name}: consists of (2 )?joined files: give them as separate files"):
            videos.timestamps(tmp_path / name)

    def test_a_stream_without_time_stamps(self, tmp_path):
        write_video(tmp_path / "a.m2v", "mpeg2video", np.arange(30) * 40, g="12", bf="2")
        times = videos.timestamps(tmp_path / "a.m2v")
        np.testing.assert_allclose(np.diff(times), 0.04, atol=1e-3)
        assert [number_of(frame) for frame in videos.read(tmp_path / "a.m2v", times)] == list(range(30))

    def test_frames_of_different_sizes_are_refused_unless_they_are_resized(self, tmp_path):
        write_planes(tmp_path / "a.ts", "libx264", "yuv420p", [80, 128, 128], (64, 48))
        small = (tmp_path / "a.ts").read_bytes()
        write_planes(tmp_path / "a.ts", "libx264", "yuv420p", [80, 128, 128], (96, 48))
        (tmp_path / "a.ts").write_bytes(small + (tmp_path / "a.ts").read_bytes())
        times = videos.timestamps(tmp_path / "a.ts")
        assert videos.read(tmp_path / "a.ts", times, 8).shape == (4, 8, 8, 3)
        with pytest.raises(UserError, match=r"a\.ts: its frames have different sizes: 64x48, 96x48"):
            videos.read(tmp_path / "a.ts", times)


def test_frames_of_absurd_size_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    write_planes(tmp_path / "a.mkv", "ffv1", "yuv420p", [80, 128, 128])
    monkeypatch.setattr(video_file, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(UserError, match=r"a\.mkv: frames of 64x48 pixels, more than 3071"):
        videos.timestamps(tmp_path / "a.mkv")
