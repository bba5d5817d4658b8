"""149 image files, what their formats say about the pixels, and where libvips disagrees."""

import dataclasses
import io
import itertools
import struct
import zlib
from collections.abc import Iterator

import image_kit
import numpy as np
from image_kit import BLACK_IS_ZERO, GRAY, GRAY_ALPHA, PALETTE, RGB, RGBA, WHITE_IS_ZERO, chunk, png, tiff
from PIL import Image

SIDE = 16
RAMP = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)
# Red, green, blue and yellow quarters: all turned and mirrored versions differ.
COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8).repeat(8, 0).repeat(8, 1)
INKS = np.array([[[0, 255, 255, 0], [255, 0, 255, 0]], [[255, 255, 0, 0], [0, 0, 255, 0]]], np.uint8)  # of COLOURS
ALPHA = np.where(np.arange(SIDE) < 12, 255, 51).repeat(SIDE).reshape(SIDE, SIDE)  # a fifth opaque at the bottom
OLIVE = np.full((SIDE, SIDE, 3), (120, 140, 60), np.uint8)
MUTED = np.stack([40 + RAMP * 2 // 3, np.flip(40 + RAMP * 2 // 3), 90 + RAMP.T // 3], -1).astype(np.uint8)
DISPLAY_P3 = image_kit.rgb_profile(image_kit.P3_PRIMARIES, image_kit.SRGB_CURVE, b"Display P3")
OTHER_INKS = "converts CMYK without a profile by a profile of its own"
UNSCALED = "does not scale by the largest value"
TURNS = {  # EXIF orientation -> function from shown to stored pixels
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: p.swapaxes(0, 1)[::-1, ::-1],
    8: lambda p: np.rot90(p, -1),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A file.

    Attributes:
      says: what the format says.
      pixels: the image, uint8 [S,S,3].
      ids: the label ids [S,S]; None: the file must be refused as a label map.
      tolerance: of each pixel, for lossy formats and rounding.
      vips_differs: why libvips does not give `pixels`; empty: it does.
    """

    name: str
    content: bytes
    says: str
    pixels: np.ndarray
    ids: np.ndarray | None = None
    tolerance: int = 1
    vips_differs: str = ""


def gray(values: np.ndarray, largest: int) -> np.ndarray:
    return np.round(values * 255 / largest).astype(np.uint8)[..., None].repeat(3, -1)


def over_white(pixels: np.ndarray, alpha: np.ndarray = ALPHA) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.round(pixels * share + 255 * (1 - share)).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, image_format: str, **options) -> bytes:
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, image_format, **options)
    return file.getvalue()


def exif(orientation: int) -> bytes:
    entries = Image.Exif()
    entries[274] = orientation
    return entries.tobytes()


def with_alpha(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels, ALPHA[..., None].astype(pixels.dtype)], axis=-1)


def where(condition: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """The pixels with white where the condition holds."""
    return np.where(condition[..., None], np.uint8(255), pixels)


def lab_pixels(lightness: float, a: float, b: float) -> np.ndarray:
    """A colour of CIE L*a*b* with the white of D50, by the formulas of CIE 15 and IEC 61966-2-1."""
    y = (lightness + 16) / 116
    roots = np.array([y + a / 500, y, y - b / 200])
    xyz = np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29)) * (0.9642, 1, 0.8249)
    to_rgb = ((3.13386, -1.61687, -0.49061), (-0.97877, 1.91614, 0.03345), (0.07195, -0.22899, 1.40524))
    return np.full((SIDE, SIDE, 3), encoded(np.array(to_rgb) @ xyz), np.uint8)


def linear_gray(values: np.ndarray, largest: int) -> np.ndarray:
    """Values that are proportional to light, encoded as sRGB."""
    return encoded(values / largest)[..., None].repeat(3, -1)


def from_display_p3(pixels: np.ndarray) -> np.ndarray:
    """Pixels of Display P3 as sRGB, by the matrix of CSS Color 4 (section 18), which clips each channel."""
    to_srgb = ((1.2249402, -0.2249402, 0), (-0.0420570, 1.0420570, 0), (-0.0196376, -0.0786360, 1.0982736))
    signal = pixels / 255
    light = np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    return encoded(light @ np.array(to_srgb).T)


def encoded(light: np.ndarray) -> np.ndarray:
    """Light as sRGB, uint8."""
    light = np.clip(light, 0, 1)
    signal = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(255 * signal).astype(np.uint8)


def png_cases() -> Iterator[Case]:
    for bits in (1, 2, 4, 8, 16):
        largest = 2**bits - 1
        values = RAMP * largest // 255
        yield Case(f"gray{bits}.png", png(values, bits), f"gray, {bits} bits", gray(values, largest), values)
        clear = int(values[7, 9])
        transparent = chunk(b"tRNS", struct.pack(">H", clear))
        pixels = where(values == clear, gray(values, largest))
        yield Case(
            f"gray{bits}_trns.png", png(values, bits, GRAY, transparent), f"value {clear} is clear", pixels, values
        )
    for bits in (1, 2, 4, 8):
        ids = RAMP % 2**bits
        colours = np.random.default_rng(bits).integers(0, 256, (2**bits, 3)).astype(np.uint8)
        plte = chunk(b"PLTE", colours.tobytes())
        yield Case(f"palette{bits}.png", png(ids, bits, PALETTE, plte), f"palette, {bits} bits", colours[ids], ids)
        content = png(ids, bits, PALETTE, plte, chunk(b"tRNS", bytes([255, 51])))
        pixels = np.where((ids == 1)[..., None], over_white(colours[ids], np.full_like(ids, 51)), colours[ids])
        yield Case(f"palette{bits}_trns.png", content, "colour 1 is a fifth opaque", pixels, ids)
    green = np.all(COLOURS == (0, 255, 0), axis=-1)
    for bits, samples in ((8, COLOURS.astype(int)), (16, COLOURS.astype(int) * 200)):  # 255 * 200: bytes C7 and 38
        largest = 2**bits - 1
        pixels, alpha = np.round(samples * 255 / largest).astype(np.uint8), ALPHA * largest // 255
        yield Case(f"rgb{bits}.png", png(samples, bits, RGB), "RGB", pixels)
        content = png(samples, bits, RGB, chunk(b"tRNS", struct.pack(">3H", *samples[0, -1].tolist())))
        yield Case(f"rgb{bits}_trns.png", content, "green is clear", where(green, pixels))
        content = png(np.stack([RAMP * largest // 255, alpha], -1), bits, GRAY_ALPHA)
        yield Case(f"gray_alpha{bits}.png", content, "gray and alpha", over_white(gray(RAMP, 255)))
        content = png(np.concatenate([samples, alpha[..., None]], axis=-1), bits, RGBA)
        yield Case(f"rgba{bits}.png", content, "RGB and alpha", over_white(pixels))
    swapped = encode(COLOURS, "PNG", icc_profile=image_kit.swapped_profile())
    pixels = COLOURS[..., [1, 0, 2]]
    yield Case("icc.png", swapped, "profile with red and green exchanged", pixels, None, 4)
    for name, stored in (("muted", MUTED), ("pure", COLOURS)):
        content = encode(stored, "PNG", icc_profile=DISPLAY_P3)
        yield Case(f"icc_p3_{name}.png", content, "Display P3", from_display_p3(stored), None, 2)
    linear = image_kit.rgb_profile(image_kit.SRGB_PRIMARIES, image_kit.LINEAR_CURVE, b"sRGB, linear")
    content = encode(MUTED, "PNG", icc_profile=linear)
    yield Case("icc_linear.png", content, "proportional to light", encoded(MUTED / 255), None, 2)
    profile = image_kit.linear_gray_profile()
    values = 64 + RAMP * 3 // 4  # not the darkest ones, which readers interpolate in a table
    for bits, kind in ((8, np.uint8), (16, np.uint16)):
        stored, largest = values * (2**bits - 1) // 255, 2**bits - 1
        content = encode(stored.astype(kind), "PNG", icc_profile=profile)
        pixels = linear_gray(stored, largest)
        yield Case(f"gray{bits}_icc.png", content, "gray with a linear profile", pixels, stored, 2)
    text = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  20\nneither hex nor EXIF\n")
    plain = b"Raw profile type exif\0\nexif\n  20\nneither hex nor EXIF\n"
    rubbish = {b"eXIf": b"no EXIF", b"zTXt": text, b"tEXt": plain, b"iTXt": plain.replace(b"\0", bytes(5))}
    for kind, data in (rubbish | {b"iCCP": b"x\0\0no profile"}).items():
        content = png(COLOURS.astype(int), 8, RGB, chunk(kind, data))
        yield Case(f"rubbish_{kind.decode()}.png", content, "RGB, with rubbish beside it", COLOURS)
    frames = [Image.fromarray(COLOURS), Image.new("RGB", (SIDE, SIDE), "gray")]
    content = encode(frames[0], "PNG", save_all=True, append_images=frames[1:])
    yield Case("moving.png", content, "animation: the first frame", COLOURS)


def jpeg_cases() -> Iterator[Case]:
    best = {"quality": 100, "subsampling": 0}
    yield Case("rgb.jpg", encode(COLOURS, "JPEG", **best), "YCbCr 4:4:4", COLOURS, None, 6)
    # Readers interpolate the chroma of 4:2:0 differently at edges: one without edges is the same in all.
    content = encode(OLIVE, "JPEG", quality=100, subsampling=2)
    yield Case("rgb_420.jpg", content, "YCbCr 4:2:0", OLIVE, None, 3)
    yield Case("progressive.jpg", encode(COLOURS, "JPEG", progressive=True, **best), "progressive", COLOURS, None, 6)
    yield Case("keep_rgb.jpg", encode(COLOURS, "JPEG", keep_rgb=True, quality=100), "RGB", COLOURS, None, 6)
    yield Case("gray.jpg", encode(gray(RAMP, 255)[..., 0], "JPEG", quality=100), "gray", gray(RAMP, 255), None, 3)
    inks = Image.fromarray(INKS.repeat(8, 0).repeat(8, 1), "CMYK")
    content = encode(inks, "JPEG", quality=100)
    yield Case("cmyk.jpg", content, "CMYK without a profile: 255 - ink", COLOURS, None, 12, OTHER_INKS)
    profile = image_kit.swapped_profile()
    content = encode(COLOURS, "JPEG", icc_profile=profile, **best)
    pixels = COLOURS[..., [1, 0, 2]]
    yield Case("icc.jpg", content, "profile with red and green exchanged", pixels, None, 8)
    content = encode(OLIVE, "JPEG", icc_profile=DISPLAY_P3, **best)
    yield Case("icc_p3.jpg", content, "Display P3", from_display_p3(OLIVE), None, 3)


def webp_cases() -> Iterator[Case]:
    yield Case("rgb.webp", encode(COLOURS, "WEBP", lossless=True), "lossless", COLOURS)
    yield Case(
        "rgba.webp", encode(with_alpha(COLOURS), "WEBP", lossless=True, exact=True), "alpha", over_white(COLOURS)
    )
    yield Case("lossy.webp", encode(OLIVE, "WEBP", quality=100), "lossy", OLIVE, None, 3)
    content = encode(COLOURS, "WEBP", lossless=True, icc_profile=image_kit.swapped_profile())
    pixels = COLOURS[..., [1, 0, 2]]
    yield Case("icc.webp", content, "profile with red and green exchanged", pixels, None, 4)
    content = encode(MUTED, "WEBP", lossless=True, icc_profile=DISPLAY_P3)
    yield Case("icc_p3.webp", content, "Display P3", from_display_p3(MUTED), None, 2)
    frames = [Image.fromarray(COLOURS), Image.new("RGB", (SIDE, SIDE), "gray")]
    content = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    yield Case("moving.webp", content, "animation: the first frame", COLOURS)


def tiff_cases() -> Iterator[Case]:
    for bits, polarity in itertools.product((1, 2, 4, 8, 12, 16), (WHITE_IS_ZERO, BLACK_IS_ZERO)):
        if (bits, polarity) == (12, WHITE_IS_ZERO):
            continue  # Pillow has no decoder for it: test_what_pillow_does_not_read_is_named
        largest = 2**bits - 1
        values = RAMP * largest // 255  # where black is 0
        stored = values if polarity == BLACK_IS_ZERO else largest - values
        name = f"gray{bits}_{'white' if polarity == WHITE_IS_ZERO else 'black'}_is_zero.tif"
        unread = "does not read 12 bits" if bits == 12 else ""
        says = f"gray, {bits} bits"
        yield Case(name, tiff(stored, bits, polarity), says, gray(values, largest), values, 1, unread)
    yield Case("rgb8.tif", tiff(COLOURS, 8, 2), "RGB", COLOURS)
    yield Case("rgb8_planar.tif", tiff(COLOURS, 8, 2, {284: (2,)}), "RGB, one plane a channel", COLOURS)
    wide = MUTED.astype(int) * 257
    yield Case("rgb16.tif", tiff(wide, 16, 2), "RGB, 16 bits", MUTED)
    yield Case("rgb16_planar.tif", tiff(wide, 16, 2, {284: (2,)}), "16 bits, one plane a channel", MUTED)
    for extra, says in ((2, "alpha"), (1, "premultiplied alpha")):
        samples = with_alpha(COLOURS)
        if extra == 1:
            samples[..., :3] = np.round(COLOURS * (ALPHA[..., None] / 255))
        yield Case(f"rgba_{extra}.tif", tiff(samples, 8, 2, {338: (extra,)}), says, over_white(COLOURS), None, 3)
    ids = RAMP % 16
    for bits in (4, 8):
        colours = np.random.default_rng(9).integers(0, 256, (2**bits, 3)).astype(np.uint8)
        palette = tuple((colours.T.ravel().astype(int) * 257).tolist())
        yield Case(f"palette{bits}.tif", tiff(ids, bits, 3, {320: palette}), "palette", colours[ids], ids)
    samples = with_alpha(COLOURS)
    differs = "takes any fourth channel for alpha"
    yield Case("rgbx.tif", tiff(samples, 8, 2, {338: (0,)}), "a channel without meaning", COLOURS, None, 1, differs)
    wide = samples.astype(int) * 257
    yield Case("rgba16.tif", tiff(wide, 16, 2, {338: (2,)}), "alpha, 16 bits", over_white(COLOURS))
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        content = encode(COLOURS, "TIFF", compression=compression)
        yield Case(f"{compression}.tif", content, "compressed RGB", COLOURS)
    content = encode(COLOURS, "TIFF", compression="jpeg", quality=100)
    yield Case("jpeg.tif", content, "compressed YCbCr", COLOURS, None, 6)
    yield Case("big.tif", encode(COLOURS, "TIFF", big_tiff=True), "BigTIFF", COLOURS)
    fax = encode(Image.fromarray(RAMP > 127), "TIFF", compression="group4")
    yield Case("fax.tif", fax, "1 bit, compressed", gray(RAMP > 127, 1), (RAMP > 127).astype(int))
    inks = Image.fromarray(INKS.repeat(8, 0).repeat(8, 1), "CMYK")
    yield Case("cmyk.tif", encode(inks, "TIFF"), "CMYK without a profile: 255 - ink", COLOURS, None, 1, OTHER_INKS)
    cyan = Image.new("CMYK", (SIDE, SIDE), (255, 0, 0, 0))
    content = encode(cyan, "TIFF", icc_profile=image_kit.cmyk_profile())
    lightness, *ab = image_kit.CYAN_IN_PROFILE
    pixels = lab_pixels(lightness / 2.55, *(value - 128 for value in ab))
    yield Case("cmyk_icc.tif", content, "profile in which cyan ink is red", pixels, None, 2, "refuses this profile")
    content = encode(COLOURS, "TIFF", icc_profile=image_kit.swapped_profile())
    pixels = COLOURS[..., [1, 0, 2]]
    yield Case("icc.tif", content, "profile with red and green exchanged", pixels, None, 4)
    pages = [Image.fromarray(COLOURS), Image.new("RGB", (SIDE, SIDE), "gray")]
    content = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    yield Case("pages.tif", content, "several pages: the first one", COLOURS)


def orientation_cases() -> Iterator[Case]:
    """Colours and gray ids of 2 and 16 bits with each EXIF orientation."""
    for orientation, turn in TURNS.items():
        stored, says = np.ascontiguousarray(turn(COLOURS)), f"orientation {orientation}"
        for image_format, name, options in (
            ("JPEG", "jpg", {"quality": 100, "subsampling": 0}),
            ("WEBP", "webp", {"lossless": True}),
        ):
            content = encode(stored, image_format, exif=exif(orientation), **options)
            yield Case(f"turned{orientation}.{name}", content, says, COLOURS, None, 6)
        for bits in (2, 16):
            values = RAMP * (2**bits - 1) // 255
            content = png(turn(values), bits, GRAY, chunk(b"eXIf", exif(orientation).removeprefix(b"Exif\0\0")))
            yield Case(f"turned{orientation}_{bits}.png", content, says, gray(values, 2**bits - 1), values)
        content = tiff(turn(RAMP), 8, BLACK_IS_ZERO, {274: (orientation,)})
        yield Case(f"turned{orientation}.tif", content, says, gray(RAMP, 255), RAMP)


def other_cases() -> Iterator[Case]:
    palette = Image.fromarray(COLOURS).convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    ids = np.asarray(palette).astype(int)
    yield Case("palette.gif", encode(palette, "GIF", optimize=False), "palette", COLOURS, ids)
    clear = int(ids[0, -1])
    content = encode(palette, "GIF", transparency=clear, optimize=False)
    yield Case("clear.gif", content, "green is clear", where(ids == clear, COLOURS), ids)
    gray_frame = Image.new("RGB", (SIDE, SIDE), "gray")
    content = encode(palette, "GIF", save_all=True, append_images=[gray_frame], duration=9, optimize=False)
    yield Case("moving.gif", content, "animation: the first frame", COLOURS, ids)
    yield Case("rgb.bmp", encode(COLOURS, "BMP"), "RGB", COLOURS)
    rgbx = encode(with_alpha(COLOURS), "BMP")
    differs = "takes the reserved byte for alpha"
    yield Case("rgb32.bmp", rgbx, "RGB and a reserved byte", COLOURS, None, 1, differs)
    yield Case("palette.bmp", encode(palette, "BMP"), "palette", COLOURS, ids)
    bits = RAMP > 127
    yield Case("gray1.bmp", encode(Image.fromarray(bits), "BMP"), "1 bit", gray(bits, 1), bits.astype(int))
    yield Case("gray8.bmp", encode(RAMP.astype(np.uint8), "BMP"), "gray", gray(RAMP, 255), RAMP)
    yield Case(
        "bits.pbm", b"P4 16 16\n" + np.packbits(~bits, axis=1).tobytes(), "1 is black", gray(bits, 1), bits.astype(int)
    )
    for largest in (15, 100, 255, 1000, 65535):
        values = RAMP * largest // 255
        data = values.astype(np.uint8 if largest < 256 else ">u2").tobytes()
        content = f"P5 16 16 {largest}\n".encode() + data
        unscaled = "" if largest in (255, 65535) else UNSCALED
        yield Case(f"gray{largest}.pgm", content, f"white is {largest}", gray(values, largest), values, 1, unscaled)
    values = RAMP // 17
    content = f"P2 16 16 15 {' '.join(map(str, values.ravel()))}".encode()
    yield Case("plain.pgm", content, "text, white is 15", gray(values, 15), values, 1, UNSCALED)
    yield Case("rgb.ppm", b"P6 16 16 255\n" + COLOURS.tobytes(), "RGB", COLOURS)
    yield Case("rgb16.ppm", b"P6 16 16 65535\n" + (COLOURS.astype(int) * 257).astype(">u2").tobytes(), "RGB", COLOURS)
    for image_format in ("TGA", "PCX", "SGI", "QOI"):
        unread = "does not read QOI" if image_format == "QOI" else ""
        yield Case(f"rgb.{image_format.lower()}", encode(COLOURS, image_format), "RGB", COLOURS, None, 1, unread)
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 1, SIDE, SIDE, 1, 0) + bytes(12 + 2)
    content = header + np.packbits(~bits, axis=1).tobytes()
    yield Case("bits.psd", content, "1 is black", gray(bits, 1), bits.astype(int), 1, "takes black for transparent")
    yield Case("rgba.tga", encode(with_alpha(COLOURS), "TGA"), "RGB and alpha", over_white(COLOURS))
    yield Case("rgb.jp2", encode(COLOURS, "JPEG2000"), "lossless RGB", COLOURS)
    yield Case("rgba.jp2", encode(with_alpha(COLOURS), "JPEG2000"), "lossless, alpha", over_white(COLOURS))
    yield Case("rgb.avif", encode(COLOURS, "AVIF", quality=100, subsampling="4:4:4"), "AV1 4:4:4", COLOURS, None, 8)


CASES = {
    case.name: case
    for case in (
        *(*png_cases(), *jpeg_cases(), *webp_cases(), *tiff_cases()),
        *(*orientation_cases(), *other_cases()),
    )
}
