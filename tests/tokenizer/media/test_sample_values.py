"""The stored values of image files are read as their formats define them."""

import fractions
import io
import struct

import numpy as np
import pytest
from image_kit import GRAY, PALETTE, chunk, cmyk_profile, png, swapped_profile, tiff
from PIL import Image, ImageCms

from EasyLM.errors import UserError
from tokenizer.builders import views
from tokenizer.media import images

SIDE = 4
RAMP = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)


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
    np.testing.assert_array_equal(read_gray(tmp_path / "a.tif", tiff(values, bits, photometric)), expected)


def test_what_pillow_does_not_read_is_named(tmp_path):
    """Pillow has no decoder for 12-bit gray whose white is zero."""
    with pytest.raises(UserError, match=r"a\.tif: .*signed integers of 8 bits"):
        read_gray(tmp_path / "a.tif", tiff(RAMP, 8, 1, {339: (2,)}))
    with pytest.raises(UserError, match=r"a\.tif: not a readable image"):
        read_gray(tmp_path / "a.tif", tiff(RAMP, 12, 0))


def test_the_transparent_value_of_sixteen_bit_gray_is_white(tmp_path):
    values = RAMP * 4000
    content = png(values, 16, 0, chunk(b"tRNS", struct.pack(">H", values[1, 2])))
    expected = np.round(values / 257)
    expected[1, 2] = 255
    np.testing.assert_array_equal(read_gray(tmp_path / "a.png", content), expected)


def jpeg2000(samples: np.ndarray, pixel_format: str) -> bytes:
    """Returns a lossless file of 16-bit numbers [height,width] or [height,width,3]."""
    av = pytest.importorskip("av")
    encoder = av.CodecContext.create("jpeg2000", "w")
    encoder.height, encoder.width = samples.shape[:2]
    encoder.pix_fmt, encoder.time_base = pixel_format, fractions.Fraction(1)
    encoder.options = {"format": "jp2", "pred": "dwt53"}
    frame = av.VideoFrame(encoder.width, encoder.height, pixel_format)
    rows = np.zeros((encoder.height, frame.planes[0].line_size // 2), "<u2")
    rows[:, : samples[0].size] = samples.reshape(len(samples), -1)
    frame.planes[0].update(rows.tobytes())
    return b"".join(map(bytes, [*encoder.encode(frame), *encoder.encode(None)]))


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_jpeg2000_of_more_than_8_bits_is_scaled_or_refused(tmp_path, bits):
    """Pillow turns white into black where it makes bytes of such channels, and shifts gray to 16 bits."""
    values = RAMP * (2**bits - 1) // RAMP.max()
    expected = np.round(values * 255 / (2**bits - 1))
    np.testing.assert_allclose(read_gray(tmp_path / "a.jp2", jpeg2000(values, f"gray{bits}le")), expected, atol=1)
    depth = views.depth(tmp_path / "a.jp2", SIDE, 2.0**bits, 1)[..., 0]  # white is the largest value
    np.testing.assert_allclose(depth, expected, atol=1)
    if bits == 16:
        with pytest.raises(UserError, match=r"a\.jp2: .*its values of 16 bits are not supported"):
            read_gray(tmp_path / "a.jp2", jpeg2000(values[..., None].repeat(3, -1), "rgb48le"))


@pytest.mark.parametrize(("transfer", "is_hdr"), [(1, False), (13, False), (16, True), (18, True)])
def test_hdr_is_refused_by_name(tmp_path, transfer, is_hdr):
    """The chunk cICP of PNG and the box nclx of AVIF name primaries, transfer function, matrix and range."""
    file = io.BytesIO()
    Image.fromarray((RAMP * 17).astype(np.uint8)).save(file, "AVIF", quality=100)
    head, box, rest = file.getvalue().partition(b"colrnclx")
    for name, content in {
        "a.png": png(RAMP * 17, 8, GRAY, chunk(b"cICP", bytes([9, transfer, 0, 1]))),
        "a.avif": head + box + struct.pack(">HH", 9, transfer) + rest[4:],
    }.items():
        if is_hdr:
            with pytest.raises(UserError, match=f"{name}: .*HDR .PQ or HLG.: convert it to sRGB"):
                read_gray(tmp_path / name, content)
        else:
            np.testing.assert_allclose(read_gray(tmp_path / name, content).astype(int), RAMP * 17, atol=6)


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_malformed_exif_data_does_not_refuse_intact_pixels(tmp_path, ending):
    image = Image.fromarray(np.full((SIDE, SIDE, 3), 77, np.uint8))
    image.save(tmp_path / f"a.{ending}", lossless=True, exif=b"Exif\0\0rubbish that is no TIFF header")
    assert (images.read(tmp_path / f"a.{ending}", SIDE) == 77).all()


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


def test_ids_outside_the_palette_and_lossy_labels_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png(RAMP, 4, PALETTE, chunk(b"PLTE", bytes(3 * 10))))
    with pytest.raises(UserError, match=r"a\.png: .*id 15 is outside its palette of 10 colours"):
        views.label_ids(tmp_path / "a.png", SIDE)
    ids = Image.fromarray(RAMP.astype(np.uint8))
    for name, options in {"b.jpg": {}, "b.tif": {"compression": "jpeg"}, "b.avif": {}, "b.jp2": {}}.items():
        ids.save(tmp_path / name, **options)
        with pytest.raises(UserError, match=rf"{name}: .*(JPEG|AVIF|JPEG2000) compression changes label ids"):
            views.label_ids(tmp_path / name, SIDE)


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


def test_cmyk_is_converted_by_its_profile(tmp_path):
    cyan = Image.new("CMYK", (SIDE, SIDE), (255, 0, 0, 0))
    cyan.save(tmp_path / "a.tif", icc_profile=cmyk_profile())
    red, green, blue = images.read(tmp_path / "a.tif", SIDE)[0, 0].astype(int)
    assert red > 2 * green and red > 2 * blue
    for options in ({}, {"icc_profile": b"no profile"}):
        cyan.save(tmp_path / "a.tif", **options)
        np.testing.assert_array_equal(images.read(tmp_path / "a.tif", SIDE)[0, 0], [0, 255, 255])
