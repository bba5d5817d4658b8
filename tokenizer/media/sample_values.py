"""What the stored values of an image file mean: bit depth, polarity, transparent value, colours.

Pillow leaves these to the caller for gray of more than 8 bits and for colours other than sRGB. It also scales gray of
fewer bits, and PGM files of any largest value, to whole bytes: that is wrong for label ids, depths and the transparent
value.
"""

import contextlib
import functools
import io
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from tokenizer.media import colours

SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B")  # Pillow's modes of 16-bit gray; "I" can hold 32 bits
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANAR_CONFIGURATION, _SAMPLE_FORMAT = 258, 262, 284, 339  # TIFF tags
_WHITE_IS_ZERO, _SEPARATE_PLANES, _SIGNED = 0, 2, 2  # values of the last three tags
_SAME_COLOURS = 0.02  # matrices that differ less: PNG files round chromaticities
_SAME_SAMPLES = 2  # of 255: profiles of sRGB differ by so much, because some of them round their curve
_LOSSY_FORMATS = ("JPEG", "JPEG2000", "MPO", "AVIF")
_JPEG_IN_TIFF = ("jpeg", "tiff_jpeg")  # Pillow's names of compressions
_JPEG2000_START = b"\xff\x4f\xff\x51"  # the markers SOC and SIZ
_JPEG2000_BITS = 38  # bytes from there to the byte of the first channel: its bits less 1; the highest bit: signed


def sixteen_bit_gray(image: Image.Image) -> np.ndarray:
    """Returns an image of SIXTEEN_BIT_MODES as gray float64 [height,width] in [0, 1], white where transparent.

    The largest value of a TIFF file follows from its bits per sample. Other files use all 16 bits.

    Raises:
      ValueError: if a value does not fit into the bits.
    """
    bits = _tiff_bits(image)
    largest = 2**bits - 1
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > largest:
        raise ValueError(
            f"its values are {values.min()}..{values.max()}, more than {bits} bits: save it with 8 or 16 bits"
        )
    transparent = image.info.get("transparency")
    gray = values / largest
    if _is_white_zero(image):
        gray = 1 - gray
    return np.where(values == transparent, 1.0, gray) if isinstance(transparent, int) else gray


def stored_values(image: Image.Image) -> Image.Image:
    """Returns the values of an opened gray or palette image without Pillow's scaling, in mode I or F; black is 0.

    Call it before the pixels are loaded: an image forgets the layout of its file then.
    """
    numerator, denominator = _scale(image)
    if image.mode == "F":
        return image
    values = np.asarray(image).astype(np.int64)
    if image.mode in SIXTEEN_BIT_MODES and _is_white_zero(image):
        values = 2 ** _tiff_bits(image) - 1 - values
    return Image.fromarray(((values * denominator + numerator // 2) // numerator).astype(np.int32))


def check_signs(image: Image.Image) -> None:
    """Raises ValueError for a TIFF file of signed 8-bit values, which Pillow reads as unsigned."""
    tags = getattr(image, "tag_v2", {})
    bits = np.max(tags.get(_BITS_PER_SAMPLE, 1))
    if bits <= 8 and _SIGNED in np.atleast_1d(tags.get(_SAMPLE_FORMAT, ())):
        raise ValueError(f"its values are signed integers of {bits} bits: save it with unsigned ones")


def check_jpeg2000(image: Image.Image, head: bytes) -> None:
    """Raises ValueError for a JPEG 2000 file whose values Pillow scales wrongly to bytes: white would become black.

    Args:
      image: the opened image.
      head: the file's first bytes.
    """
    _, start, channels = head.partition(_JPEG2000_START)
    if not start or len(channels) <= _JPEG2000_BITS:
        return
    bits = (channels[_JPEG2000_BITS] & 0x7F) + 1
    if bits < 8 or (bits > 8 and image.mode not in SIXTEEN_BIT_MODES):
        raise ValueError(f"its values of {bits} bits are not supported: save it with 8, or in gray with 16")
    image.info["bits"] = bits


def correct_layout(image: Image.Image) -> None:
    """Corrects the layout of stored values that Pillow tells its decoder. Call it before the pixels are loaded.

    Pillow takes white for black in PSD files of 1 bit, and 16-bit values for bytes in uncompressed TIFF files that
    store their channels one after the other.
    """
    opened: Any = image  # the classes of the formats have more attributes
    tags: Any = getattr(opened, "tag_v2", {})
    if opened.format == "PSD" and opened.mode == "1":
        opened.tile = [tile._replace(args="1;I") for tile in opened.tile]
    elif tags.get(_PLANAR_CONFIGURATION) == _SEPARATE_PLANES and np.max(tags.get(_BITS_PER_SAMPLE, 1)) == 16:
        layout = ";16B" if tags.prefix == b"MM" else ";16L"
        opened.tile = [
            tile._replace(args=(tile.args[0] + layout, *tile.args[1:])) if tile.codec_name == "raw" else tile
            for tile in opened.tile
        ]


def scale_transparency(image: Image.Image) -> None:
    """Scales the transparent value of a PNG file as Pillow scales its pixels. Call it before the pixels are loaded."""
    value = image.info.get("transparency")
    if isinstance(value, int) and image.mode == "L":
        numerator, denominator = _scale(image)
        image.info["transparency"] = value * numerator // denominator
    elif isinstance(value, tuple) and _decoder_arguments(image)[0] == "RGB;16B":
        image.info["transparency"] = tuple(channel >> 8 for channel in value)  # Pillow keeps the upper bytes


def _tiff_bits(image: Image.Image) -> int:
    return min(int(np.max(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, 16))), 16)


def _is_white_zero(image: Image.Image) -> bool:
    return getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO


def _scale(image: Image.Image) -> tuple[int, int]:
    """Returns the factor by which Pillow multiplies stored values, as a fraction: 85 for gray of 2 bits."""
    arguments = _decoder_arguments(image)
    if image.format == "PPM" and image.mode in ("L", "I") and len(arguments) == 2:
        return 255 if image.mode == "L" else 65535, arguments[1]  # the largest value of the file
    if image.format == "JPEG2000" and image.mode in SIXTEEN_BIT_MODES:
        return 2 ** (16 - image.info.get("bits", 16)), 1
    if image.mode != "L":
        return 1, 1
    return {"L;2": 85, "L;4": 17}.get(str(arguments[0])[:3], 1), 1


def _decoder_arguments(image: Image.Image) -> tuple:
    """Returns the arguments of Pillow's decoder; the first one is the layout of the stored values."""
    tiles = getattr(image, "tile", [])
    arguments = tiles[0].args if tiles else ""
    return arguments if isinstance(arguments, tuple) and arguments else (arguments,)


def check_labels(image: Image.Image, ids: np.ndarray) -> None:
    """Checks that ids can be label ids of the image.

    Raises:
      ValueError: if compression has changed them, or they are outside the palette or 0..2^24-1.
    """
    is_jpeg_in_tiff = image.format == "TIFF" and image.info.get("compression") in _JPEG_IN_TIFF
    if image.format in _LOSSY_FORMATS or is_jpeg_in_tiff:
        raise ValueError(
            f"{'JPEG' if is_jpeg_in_tiff else image.format} compression changes label ids: save them as PNG"
        )
    if image.mode == "P" and image.palette is not None:
        entries = len(image.palette.palette) // len(image.palette.mode)
        if ids.max() >= entries:
            raise ValueError(f"id {ids.max()} is outside its palette of {entries} colours")
    if ids.min() < 0 or ids.max() >= 2**24:
        raise ValueError(f"its ids are {ids.min()}..{ids.max()}: must be from 0 to 2^24 - 1")


def to_srgb(rgb: Image.Image, image: Image.Image) -> Image.Image:
    """Converts RGB pixels of an opened image to sRGB, by what its file says about its colours.

    Of several statements the first counts, as in the PNG specification (third edition, 4.3): numbers of H.273
    (`info["cicp"]`, which `images.prepare` sets), an ICC profile, sRGB, the gamma and primaries of a PNG file. Ignores
    a malformed profile or chunk, and a profile for other colours than the image has.
    """
    if "cicp" in image.info:
        primaries, _ = image.info["cicp"]
        return _by_light(rgb, colours.srgb_light, colours.wide_to_srgb(primaries))
    converted = _by_profile(rgb, image)
    if converted is not None:
        return converted
    if image.format != "PNG" or "srgb" in image.info:
        return rgb
    return _by_light(rgb, _gamma_light(image.info.get("gamma", 0)), _png_primaries(image))


def _by_profile(rgb: Image.Image, image: Image.Image) -> Image.Image | None:
    """Converts by the embedded ICC profile. None: there is no valid one for the image's colours."""
    profile = image.info.get("icc_profile")
    if not profile:
        return None
    is_gray = image.mode in ("1", "L", "LA", *SIXTEEN_BIT_MODES)
    with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space == "GRAY" and is_gray:
            return ImageCms.profileToProfile(rgb.getchannel(0), source, _srgb(), outputMode="RGB") or rgb
        if space == "RGB" and not is_gray and not _means_srgb(profile):
            return ImageCms.profileToProfile(rgb, source, _srgb(), outputMode="RGB") or rgb
        if space == "RGB":
            return rgb
    return None


@functools.lru_cache(maxsize=16)
def _means_srgb(profile: bytes) -> bool:
    """Whether an RGB profile leaves the colours of sRGB as they are. Their pixels are not rounded once more.

    Some profiles with sRGB in their names differ from it, for example those of linear light. A profile without curves
    and primaries has tables for printers as well, which differ from sRGB on purpose; its name counts.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if not source.profile.is_matrix_shaper:
        return "sRGB" in ImageCms.getProfileDescription(source)
    levels = range(0, 256, 15)
    samples = np.array([*itertools.product(levels, repeat=3)], np.uint8)[None]
    converted = ImageCms.profileToProfile(Image.fromarray(samples), source, _srgb(), outputMode="RGB")
    return bool(np.abs(np.asarray(converted).astype(int) - samples).max() <= _SAME_SAMPLES)


def _gamma_light(gamma: float) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the function from signals of a PNG file to light. Its gamma is the exponent from light to signals.

    A gamma of 1/2.2 means the curve of sRGB. As in libpng, so does a gamma that differs from it by less than 5 percent.
    """
    if gamma <= 0 or abs(2.2 * gamma - 1) < 0.05:
        return colours.srgb_light
    return lambda signal: signal ** (1 / gamma)


def _png_primaries(image: Image.Image) -> np.ndarray | None:
    """Returns the matrix to linear sRGB of a PNG file's primaries. None: there are none, or almost those of sRGB.

    Primaries without a gamma are ignored, because the linear light is unknown.
    """
    values = image.info.get("chromaticity", ())
    if len(values) != 8 or "gamma" not in image.info:
        return None
    white, red, green, blue = (values[i : i + 2] for i in range(0, 8, 2))
    with contextlib.suppress(ValueError):
        matrix = colours.primaries_to_srgb(red, green, blue, white)
        return None if np.abs(matrix - np.eye(3)).max() < _SAME_COLOURS else matrix
    return None


def _by_light(
    rgb: Image.Image, to_light: Callable[[np.ndarray], np.ndarray], to_srgb_33: np.ndarray | None
) -> Image.Image:
    """Converts RGB pixels to sRGB by their light and, if it is not sRGB's, the matrix of their primaries."""
    if to_light is colours.srgb_light and to_srgb_33 is None:
        return rgb
    light_HW3 = to_light(np.arange(256) / 255)[np.asarray(rgb)]
    if to_srgb_33 is not None:
        light_HW3 = light_HW3 @ to_srgb_33.T
    return Image.fromarray(np.round(255 * colours.srgb_signal(light_HW3)).astype(np.uint8))


def cmyk_to_srgb(image: Image.Image) -> Image.Image:
    """Converts CMYK pixels to RGB, by the embedded ICC profile if there is a valid one."""
    profile = image.info.get("icc_profile")
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if source.profile.xcolor_space.strip() == "CMYK":
                return ImageCms.profileToProfile(image, source, _srgb(), outputMode="RGB") or image.convert("RGB")
    return image.convert("RGB")


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
