"""Images whose files state other colours than sRGB: gamma and primaries of PNG files, numbers of H.273."""

import io
import struct

import numpy as np
import pytest
from image_kit import GRAY, RGB, chunk, png, swapped_profile
from PIL import Image

from EasyLM.errors import UserError
from tokenizer.media import colours, images

COLOUR = np.array([200, 90, 40])
SIDE = 4
SRGB = ((0.3127, 0.3290), (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))  # white, red, green, blue
ADOBE = ((0.3127, 0.3290), (0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
P3 = ((0.3127, 0.3290), (0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
BT2020 = ((0.3127, 0.3290), (0.708, 0.292), (0.170, 0.797), (0.131, 0.046))
D50 = (0.3457, 0.3585)


def to_xyz(white, red, green, blue) -> np.ndarray:
    """SMPTE RP 177."""
    xyz = np.array([(x / y, 1, (1 - x - y) / y) for x, y in (red, green, blue)]).T
    return xyz * np.linalg.solve(xyz, np.array([white[0] / white[1], 1, (1 - sum(white)) / white[1]]))


def signal(light) -> np.ndarray:
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def srgb_light(values) -> np.ndarray:
    values = np.asarray(values) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def converted(light, primaries) -> np.ndarray:
    return signal(np.linalg.solve(to_xyz(*SRGB), to_xyz(*primaries) @ light))


def gamma(value: float) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", round(value * 100_000)))


def primaries(values) -> bytes:
    return chunk(b"cHRM", struct.pack(">8I", *(round(x * 100_000) for pair in values for x in pair)))


def cicp(primary: int, transfer: int) -> bytes:
    return chunk(b"cICP", bytes([primary, transfer, 0, 1]))


def profile_of_green() -> bytes:
    """The chunk of an ICC profile that exchanges red and green."""
    image = io.BytesIO()
    Image.new("RGB", (1, 1)).save(image, "PNG", icc_profile=swapped_profile())
    content = image.getvalue()
    start = content.index(b"iCCP") - 4
    return content[start : start + 12 + int.from_bytes(content[start : start + 4])]


SWAPPED = COLOUR[[1, 0, 2]]  # by that profile
CASES = {
    "nothing": ([], COLOUR),
    "gamma of sRGB": ([gamma(0.45455)], COLOUR),
    "gamma like that of sRGB": ([gamma(0.45)], COLOUR),
    "gamma 0": ([gamma(0)], COLOUR),
    "light": ([gamma(1)], signal(COLOUR / 255)),
    "gamma of a Macintosh": ([gamma(1 / 1.8)], signal((COLOUR / 255) ** 1.8)),
    "gamma of sRGB, primaries of sRGB": ([gamma(0.45455), primaries(SRGB)], COLOUR),
    "gamma of sRGB, wide primaries": ([gamma(0.45455), primaries(ADOBE)], converted(srgb_light(COLOUR), ADOBE)),
    "light of wide primaries": ([gamma(1), primaries(P3)], converted(COLOUR / 255, P3)),
    "primaries without gamma": ([primaries(P3)], COLOUR),
    "primaries without a plane": ([gamma(0.45455), primaries([(0.3, 0.3)] * 4)], COLOUR),
    "primaries of zeros": ([gamma(0.45455), primaries([(0, 0)] * 4)], COLOUR),
    "sRGB counts more than gamma": ([chunk(b"sRGB", b"\0"), gamma(1), primaries(P3)], COLOUR),
    "a profile counts more than gamma": ([profile_of_green(), gamma(1), primaries(P3)], SWAPPED),
    "a malformed profile counts less": ([chunk(b"iCCP", b"x\0\0rubbish"), gamma(1)], signal(COLOUR / 255)),
    "P3": ([cicp(12, 13)], converted(srgb_light(COLOUR), P3)),
    "BT.2020": ([cicp(9, 1)], converted(srgb_light(COLOUR), BT2020)),
    "numbers of sRGB": ([cicp(1, 13)], COLOUR),
    "numbers count more than a profile": ([cicp(12, 13), profile_of_green()], converted(srgb_light(COLOUR), P3)),
    "unknown numbers count less": ([cicp(2, 2), gamma(1)], signal(COLOUR / 255)),
}


@pytest.mark.parametrize("name", CASES)
def test_png_files_are_converted_to_srgb(tmp_path, name):
    chunks, expected = CASES[name]
    samples = np.broadcast_to(COLOUR, (SIDE, SIDE, 3))
    (tmp_path / "a.png").write_bytes(png(samples, 8, RGB, *chunks))
    shown = images.read(tmp_path / "a.png", SIDE).astype(int)
    np.testing.assert_allclose(shown, np.broadcast_to(expected, shown.shape), atol=4 if "profile" in name else 1.01)


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_gray_is_converted_and_stays_gray(tmp_path, bits):
    samples = np.full((SIDE, SIDE), (2**bits - 1) // 3)
    (tmp_path / "a.png").write_bytes(png(samples, bits, GRAY, gamma(1), primaries(P3)))
    np.testing.assert_allclose(images.read(tmp_path / "a.png", SIDE), signal(1 / 3), atol=1.01)


def test_white_becomes_white_whatever_it_is(tmp_path):
    """By the adaptation of Bradford, as in ICC profiles: D50 becomes D65."""
    warm = (D50, *P3[1:])
    for sample in (255, 128):
        samples = np.full((SIDE, SIDE, 3), sample)
        (tmp_path / "a.png").write_bytes(png(samples, 8, RGB, gamma(1), primaries(warm)))
        np.testing.assert_allclose(images.read(tmp_path / "a.png", SIDE), signal(sample / 255), atol=1.01)
    # The matrix of Bradford from D50 to D65, from brucelindbloom.com.
    bradford = (
        (0.9555766, -0.0230393, 0.0631636),
        (-0.0282895, 1.0099416, 0.0210077),
        (0.0122982, -0.0204830, 1.3299098),
    )
    expected = np.linalg.solve(to_xyz(*SRGB), bradford @ to_xyz(*warm))
    np.testing.assert_allclose(colours.primaries_to_srgb(*warm[1:], warm[0]), expected, atol=2e-3)


def test_the_white_of_cinemas_becomes_white(tmp_path):
    """Number 11 of H.273 has the primaries of P3 and another white: as a PNG file that states their chromaticities."""
    for colour in ((255, 255, 255), COLOUR):
        samples, shown = np.broadcast_to(colour, (SIDE, SIDE, 3)), []
        for chunks in ([cicp(11, 13)], [gamma(0.45455), primaries(((0.314, 0.351), *P3[1:]))]):
            (tmp_path / "a.png").write_bytes(png(samples, 8, RGB, *chunks))
            shown.append(images.read(tmp_path / "a.png", SIDE).astype(int))
        np.testing.assert_allclose(shown[0], shown[1], atol=1)
        assert (shown[0] == 255).all() == (colour[0] == 255)
    assert np.abs(shown[0] - COLOUR).max() > 5


@pytest.mark.parametrize(("primary", "expected"), [(12, P3), (9, BT2020), (1, SRGB), (2, SRGB)])
def test_avif_files_are_converted_to_srgb(tmp_path, primary, expected):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), tuple(COLOUR.tolist())).save(file, "AVIF", quality=100, subsampling="4:4:4")
    head, box, rest = file.getvalue().partition(b"colrnclx")
    assert box
    (tmp_path / "a.avif").write_bytes(head + box + struct.pack(">HH", primary, 13) + rest[4:])
    shown = images.read(tmp_path / "a.avif", SIDE).astype(int)
    np.testing.assert_allclose(shown, np.broadcast_to(converted(srgb_light(COLOUR), expected), shown.shape), atol=8)


def test_an_unknown_transfer_function_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(png(np.broadcast_to(COLOUR, (SIDE, SIDE, 3)), 8, RGB, cicp(1, 8)))
    with pytest.raises(UserError, match=r"a\.png: .*transfer function .number 8 of H.273. is not supported"):
        images.read(tmp_path / "a.png", SIDE)
