"""Every image format is read as the correct RGB pixels. Errors name the path."""

import io
import struct

import numpy as np
import pytest
from image_table import TURNS
from PIL import Image
from tokenizer_kit import smooth_image

from EasyLM.errors import UserError
from evaluation.serving import Limits, uploads
from tokenizer.media import folders, images

SIDE = 8
COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8).repeat(4, 0).repeat(4, 1)


def rgb() -> Image.Image:
    return Image.fromarray(COLOURS)


def palette(mode: str = "P") -> Image.Image:
    return rgb().convert("P", palette=Image.Palette.ADAPTIVE, colors=8)


def with_alpha(mode: str) -> Image.Image:
    """Returns an image that is opaque on the left and fully transparent on the right."""
    image = rgb().convert(mode)
    alpha = Image.new("L", (SIDE, SIDE), 255)
    alpha.paste(0, (4, 0, SIDE, SIDE))
    image.putalpha(alpha)
    return image


def gray_of(colours: np.ndarray) -> np.ndarray:
    """Returns Pillow's gray values in three channels."""
    return np.asarray(Image.fromarray(colours).convert("L").convert("RGB"))


HALF_WHITE = COLOURS.copy()
HALF_WHITE[:, 4:] = 255
RAMP = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * 1000
RAMP_RGB = np.round(RAMP / 257).astype(np.uint8)[..., None].repeat(3, -1)
# name -> (image, save options, expected pixels, tolerance of lossy formats and colour spaces)
FILES = {
    "plain.png": (rgb(), {}, COLOURS, 0),
    "UPPER.PNG": (rgb(), {}, COLOURS, 0),
    "plain.jpg": (rgb(), {"quality": 100, "subsampling": 0}, COLOURS, 6),
    "Photo.JPeG": (rgb(), {"quality": 100, "subsampling": 0}, COLOURS, 6),
    "progressive.jpg": (rgb(), {"quality": 100, "subsampling": 0, "progressive": True}, COLOURS, 6),
    "gray.jpg": (rgb().convert("L"), {"quality": 100}, gray_of(COLOURS), 6),
    "plain.webp": (rgb(), {"lossless": True}, COLOURS, 0),
    "alpha.webp": (with_alpha("RGB"), {"lossless": True}, HALF_WHITE, 0),
    "plain.bmp": (rgb(), {}, COLOURS, 0),
    "plain.tiff": (rgb(), {}, COLOURS, 0),
    "palette.png": (palette(), {}, COLOURS, 0),
    "palette_transparent.png": (palette(), {"transparency": palette().getpixel((7, 7))}, None, 0),
    "bits.png": (rgb().convert("1"), {}, np.asarray(rgb().convert("1").convert("RGB")), 0),
    "gray.png": (rgb().convert("L"), {}, gray_of(COLOURS), 0),
    "gray_alpha.png": (with_alpha("L"), {}, np.where(np.arange(SIDE)[:, None] < 4, gray_of(COLOURS), 255), 0),
    "alpha.png": (with_alpha("RGB"), {}, HALF_WHITE, 0),
    "sixteen_bit.png": (Image.fromarray(RAMP), {}, RAMP_RGB, 0),
    "sixteen_bit.tif": (Image.fromarray(RAMP), {}, RAMP_RGB, 0),
    "still.gif": (palette(), {}, COLOURS, 0),
    "plain.jfif": (rgb(), {"format": "JPEG", "quality": 100, "subsampling": 0}, COLOURS, 6),
    "plain.tga": (rgb(), {}, COLOURS, 0),
    "plain.qoi": (rgb(), {}, COLOURS, 0),
    "moving.gif": (
        palette(),
        {"save_all": True, "append_images": [Image.new("RGB", (SIDE, SIDE), "gray")], "duration": 9},
        COLOURS,
        0,
    ),
    "cmyk.jpg": (rgb().convert("CMYK"), {"quality": 100}, COLOURS, 16),
    "cmyk.tif": (rgb().convert("CMYK"), {}, COLOURS, 0),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_is_read_as_rgb(tmp_path, name):
    image, options, expected, tolerance = FILES[name]
    if expected is None:  # the transparent colour becomes white
        expected = np.where((COLOURS[7, 7] == COLOURS).all(-1, keepdims=True), 255, COLOURS)
    image.save(tmp_path / name, **options)
    pixels = images.read(tmp_path / name, SIDE)
    assert pixels.dtype == np.uint8 and pixels.shape == (SIDE, SIDE, 3)
    # Bicubic resizing to the same size is the identity.
    np.testing.assert_allclose(pixels.astype(int), expected.astype(int), atol=tolerance)
    np.testing.assert_array_equal(images.load(tmp_path / name, SIDE), pixels.astype(np.float32) / 255)
    assert [path.name for path in folders.list_images(str(tmp_path), "input_dir")] == [name]


def test_exif_orientation_is_applied_despite_a_malformed_entry(tmp_path):
    tags = [(274, 3, struct.pack("<HH", 6, 0)), (256, 9, struct.pack("<i", -6))]  # orientation 6; a negative width
    entries = b"".join(struct.pack("<HHI", tag, kind, 1) + value for tag, kind, value in tags)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    rgb().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    assert np.abs(images.read(tmp_path / "a.jpg", SIDE).astype(int) - COLOURS).max() <= 6


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.ascontiguousarray(TURNS[orientation](COLOURS))
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    np.testing.assert_allclose(images.read(tmp_path / "a.jpg", SIDE).astype(int), COLOURS.astype(int), atol=6)


def test_resize_is_bicubic_and_ignores_the_aspect_ratio(tmp_path):
    wide = smooth_image(0, 40)[:24]
    Image.fromarray(wide).save(tmp_path / "a.png")
    expected = Image.fromarray(wide).resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(images.read(tmp_path / "a.png", 16), np.asarray(expected))


@pytest.mark.parametrize("name", [name for name in FILES if name != "bits.png"])
def test_broken_files_are_named(tmp_path, name):
    """An invalid file raises a UserError with its path. A mutated file raises that, or is read."""
    image, options, *_ = FILES[name]
    path = tmp_path / name
    image.resize((64, 64)).save(path, **options)
    whole = path.read_bytes()
    for bad in (b"", whole[:7], whole[: len(whole) // 2], b"\0" * 400, b"no image" * 9):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=f"{name}: not a readable image") as caught:
            images.read(path, SIDE)
        assert "\n" not in str(caught.value)
    rng = np.random.default_rng(0)
    for _ in range(20):
        mutated = bytearray(whole)
        for position in rng.integers(0, len(whole), 4):
            mutated[position] = rng.integers(256)
        path.write_bytes(mutated)
        try:
            assert images.read(path, SIDE).shape == (SIDE, SIDE, 3)
        except UserError as error:
            assert name in str(error)


@pytest.mark.parametrize("mode", ["RGB", "P", "L"])
def test_damaged_pixels_of_a_png_are_named(tmp_path, mode):
    """The data is stored without compression, so that Pillow decodes every flipped bit."""
    path = tmp_path / "damaged.png"
    rgb().convert(mode).save(path, compress_level=0)
    whole = path.read_bytes()
    expected = images.read(path, SIDE)
    begin = whole.index(b"IDAT") + 4 + 2 + 5  # after the headers of zlib and of the stored block
    for position in (begin + 1, begin + SIDE + 3):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"^{path}: .*pixels are damaged"):
            images.read(path, SIDE)
        with pytest.raises(UserError, match=r"^pictures\[0\]: .*pixels are damaged"):
            uploads.decode_images([bytes(damaged)], SIDE, Limits())
    path.write_bytes(whole)
    np.testing.assert_array_equal(images.read(path, SIDE), expected)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    (tmp_path / "a.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    with pytest.raises(UserError, match=rf"^{tmp_path}/a\.png: is a pointer of Git LFS.*: run `git lfs pull`"):
        images.read(tmp_path / "a.png", SIDE)


def test_formats_that_start_other_programs_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    with pytest.raises(UserError, match=r"a\.png: not a readable image \(cannot identify"):
        images.read(tmp_path / "a.png", SIDE)


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1])
def test_gray_of_more_than_sixteen_bits_is_named(tmp_path, value):
    gray = RAMP.astype(np.int32)
    Image.fromarray(gray).save(tmp_path / "gray.tif")
    np.testing.assert_array_equal(images.read(tmp_path / "gray.tif", SIDE), RAMP_RGB)
    gray[3, 4] = value
    Image.fromarray(gray).save(tmp_path / "gray.tif")
    with pytest.raises(UserError, match=rf"gray\.tif: .*{value}.*more than 16 bits"):
        images.read(tmp_path / "gray.tif", SIDE)


def test_floating_point_and_missing_files_are_named(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match=r"float\.tif: .*floating point"):
        images.read(tmp_path / "float.tif", SIDE)
    with pytest.raises(UserError, match=r"gone\.png: no such file"):
        images.read(tmp_path / "gone.png", SIDE)


def test_pixels_survive_float32_and_png(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    np.testing.assert_array_equal(images.to_uint8(images.to_float32(pixels)), pixels)
    np.testing.assert_array_equal(images.read(io.BytesIO(images.png_bytes(pixels)), 16), pixels)
    assert images.to_uint8(np.array([-1.0, 2.0])).tolist() == [0, 255]
