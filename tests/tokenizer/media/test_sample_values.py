"""The stored values of image files are read as their formats define them."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from EasyLM.errors import UserError
from tokenizer.builders import views
from tokenizer.media import images

SIDE = 4
RAMP = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: np.ndarray, bits: int, colour_type: int = 0, *chunks: bytes) -> bytes:
    """A PNG file of gray (colour type 0) or palette (3) samples [height,width] at any bit depth."""
    height, width = values.shape
    samples = (values[..., None] >> np.arange(bits - 1, -1, -1) & 1).reshape(height, -1).astype(np.uint8)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def gray_tiff(values: np.ndarray, bits: int, photometric: int) -> bytes:
    """An uncompressed TIFF file of gray samples [height,width] of 12 or 16 bits; 12-bit samples are packed."""
    height, width = values.shape
    if bits == 16:
        data = values.astype("<u2").tobytes()
    else:
        data = np.packbits((values[..., None] >> np.arange(11, -1, -1) & 1).astype(np.uint8).reshape(height, -1), 1)
        data = data.tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    data += b"\0" * (len(data) % 2)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def read_gray(path, content: bytes) -> np.ndarray:
    path.write_bytes(content)
    return images.read(path, SIDE)[..., 0]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_gray_of_every_depth_spans_black_to_white(tmp_path, bits):
    largest = 2**bits - 1
    values = RAMP * largest // RAMP.max()
    expected = np.round(values * 255 / largest)
    np.testing.assert_array_equal(read_gray(tmp_path / "a.png", png(values, bits)), expected)


@pytest.mark.parametrize(("bits", "photometric"), [(12, 1), (16, 1), (16, 0)])
def test_gray_tiff_is_scaled_by_its_bits_and_its_polarity(tmp_path, bits, photometric):
    """Photometric interpretation 0 means that white is zero."""
    largest = 2**bits - 1
    values = RAMP * largest // RAMP.max()
    expected = np.round((values if photometric else largest - values) * 255 / largest)
    np.testing.assert_array_equal(read_gray(tmp_path / "a.tif", gray_tiff(values, bits, photometric)), expected)


def test_what_pillow_does_not_read_is_named(tmp_path):
    """Pillow has no decoder for 12-bit gray whose white is zero."""
    with pytest.raises(UserError, match=r"a\.tif: not a readable image"):
        read_gray(tmp_path / "a.tif", gray_tiff(RAMP, 12, 0))


def test_the_transparent_value_of_sixteen_bit_gray_is_white(tmp_path):
    values = RAMP * 4000
    content = png(values, 16, 0, chunk(b"tRNS", struct.pack(">H", values[1, 2])))
    expected = np.round(values / 257)
    expected[1, 2] = 255
    np.testing.assert_array_equal(read_gray(tmp_path / "a.png", content), expected)


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_malformed_exif_data_does_not_refuse_intact_pixels(tmp_path, ending):
    image = Image.fromarray(np.full((SIDE, SIDE, 3), 77, np.uint8))
    image.save(tmp_path / f"a.{ending}", lossless=True, exif=b"Exif\0\0rubbish that is no TIFF header")
    assert (images.read(tmp_path / f"a.{ending}", SIDE) == 77).all()


GRAY, PALETTE = 0, 3  # colour types of PNG


@pytest.mark.parametrize(
    ("bits", "colour_type"), [*((bits, GRAY) for bits in (1, 2, 4, 8, 16)), *((bits, PALETTE) for bits in (1, 2, 4, 8))]
)
def test_label_ids_are_exact_at_every_bit_depth(tmp_path, bits, colour_type):
    ids = RAMP % 2**bits
    plte = [chunk(b"PLTE", bytes(range(48)) if bits >= 4 else bytes(3 * 2**bits))] if colour_type == PALETTE else []
    (tmp_path / "a.png").write_bytes(png(ids, bits, colour_type, *plte))
    np.testing.assert_array_equal(views.label_ids(tmp_path / "a.png", SIDE), ids)


def test_label_ids_have_the_orientation_of_their_image(tmp_path):
    """Orientation 6: the image is shown turned by 90 degrees clockwise."""
    exif = Image.Exif()
    exif[274] = 6
    ids = RAMP.astype(np.uint8)
    Image.fromarray(ids).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(views.label_ids(tmp_path / "a.png", SIDE), np.rot90(ids, -1))


def test_ids_outside_the_palette_and_jpeg_labels_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png(RAMP, 4, PALETTE, chunk(b"PLTE", bytes(3 * 10))))
    with pytest.raises(UserError, match=r"a\.png: .*id 15 is outside its palette of 10 colours"):
        views.label_ids(tmp_path / "a.png", SIDE)
    Image.fromarray(RAMP.astype(np.uint8)).save(tmp_path / "b.jpg")
    with pytest.raises(UserError, match=r"b\.jpg: .*JPEG compression changes label ids"):
        views.label_ids(tmp_path / "b.jpg", SIDE)


def swapped_profile() -> bytes:
    """The sRGB profile with its red and green primaries exchanged, under another name."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red + 4 : red + 12], profile[green + 4 : green + 12] = (
        profile[green + 4 : green + 12],
        profile[red + 4 : red + 12],
    )
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif"])
def test_colour_profiles_are_converted_to_srgb(tmp_path, ending):
    """With exchanged primaries, what is stored as red is shown as green."""
    image = Image.new("RGB", (SIDE, SIDE), (255, 0, 0))
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(ending, {})
    image.save(tmp_path / f"a.{ending}", icc_profile=swapped_profile(), **options)
    np.testing.assert_allclose(images.read(tmp_path / f"a.{ending}", SIDE)[0, 0], [0, 255, 0], atol=4)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"no profile"):
        image.save(tmp_path / f"a.{ending}", icc_profile=profile, **options)
        np.testing.assert_allclose(images.read(tmp_path / f"a.{ending}", SIDE)[0, 0], [255, 0, 0], atol=2)


def test_a_profile_of_another_colour_space_is_ignored(tmp_path):
    gray = Image.new("L", (SIDE, SIDE), 90)
    file = io.BytesIO()
    gray.save(file, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes())
    assert (read_gray(tmp_path / "a.png", file.getvalue()) == 90).all()


def cmyk_profile() -> bytes:
    """A profile in which cyan ink is red: a table of the 16 ink combinations, all white but those with cyan."""
    white, red = (255, 128, 128), (130, 200, 180)  # L*a*b* in bytes
    table = b"".join(bytes(red if corner >= 8 else white) for corner in range(16))  # cyan is the slowest axis
    curve = bytes(range(256))
    identity = b"".join(struct.pack(">i", 65536 * (i % 4 == 0)) for i in range(9))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + 4 * curve + table + 3 * curve
    name = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(8) + bytes(3 + 67)
    white_point = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    offset, directory, data = 128 + 4 + 3 * 12, struct.pack(">I", 3), b""
    for signature, content in ((b"desc", name), (b"wtpt", white_point), (b"A2B0", lut)):
        directory += signature + struct.pack(">II", offset + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    header = struct.pack(">I4sI4s4s4s", offset + len(data), b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + directory + data


def test_cmyk_is_converted_by_its_profile(tmp_path):
    cyan = Image.new("CMYK", (SIDE, SIDE), (255, 0, 0, 0))
    cyan.save(tmp_path / "a.tif", icc_profile=cmyk_profile())
    red, green, blue = images.read(tmp_path / "a.tif", SIDE)[0, 0].astype(int)
    assert red > 2 * green and red > 2 * blue
    for options in ({}, {"icc_profile": b"no profile"}):
        cyan.save(tmp_path / "a.tif", **options)
        np.testing.assert_array_equal(images.read(tmp_path / "a.tif", SIDE)[0, 0], [0, 255, 255])
