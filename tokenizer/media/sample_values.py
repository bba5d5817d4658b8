"""What the stored values of an image file mean: bit depth, polarity, transparent value, colour profile.

Pillow leaves these to the caller for gray of more than 8 bits and for embedded colour profiles. It also multiplies gray
of 2 and 4 bits so that it fills a byte, which is wrong for label ids.
"""

import contextlib
import functools
import io

import numpy as np
from PIL import Image, ImageCms

SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B")  # Pillow's modes of 16-bit gray; "I" can hold 32 bits
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags
_WHITE_IS_ZERO = 0
_LOSSY_FORMATS = ("JPEG", "JPEG2000", "MPO")


def sixteen_bit_gray(image: Image.Image) -> np.ndarray:
    """Returns an image of SIXTEEN_BIT_MODES as gray float64 [height,width] in [0, 1], white where transparent.

    The largest value of a TIFF file follows from its bits per sample. Other files use all 16 bits.

    Raises:
      ValueError: if a value does not fit into the bits.
    """
    tags = getattr(image, "tag_v2", {})
    bits = min(int(np.max(tags.get(_BITS_PER_SAMPLE, 16))), 16)
    largest = 2**bits - 1
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > largest:
        raise ValueError(
            f"its values are {values.min()}..{values.max()}, more than {bits} bits: save it with 8 or 16 bits"
        )
    transparent = image.info.get("transparency")
    gray = values / largest
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        gray = 1 - gray
    return np.where(values == transparent, 1.0, gray) if isinstance(transparent, int) else gray


def label_step(image: Image.Image) -> int:
    """Returns the factor by which Pillow multiplies the ids of a label image: 85 for 2 bits, 17 for 4 bits, else 1.

    Call it before the pixels are loaded: an image forgets the layout of its file then.
    """
    tiles = getattr(image, "tile", [])
    if image.mode != "L" or not tiles:
        return 1
    arguments = tiles[0].args
    raw_mode = arguments[0] if isinstance(arguments, tuple) else arguments
    return {"L;2": 85, "L;4": 17}.get(str(raw_mode)[:3], 1)


def check_labels(image: Image.Image, ids: np.ndarray) -> None:
    """Checks that ids can be label ids of the image.

    Raises:
      ValueError: if compression has changed them, or they are outside the palette.
    """
    if image.format in _LOSSY_FORMATS:
        raise ValueError(f"{image.format} compression changes label ids: save them as PNG")
    if image.mode == "P" and image.palette is not None:
        entries = len(image.palette.palette) // len(image.palette.mode)
        if ids.max() >= entries:
            raise ValueError(f"id {ids.max()} is outside its palette of {entries} colours")


def to_srgb(rgb: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts RGB pixels from an ICC colour profile to sRGB. Ignores a malformed profile or one of another space."""
    if not profile:
        return rgb
    with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() == "RGB" and "sRGB" not in ImageCms.getProfileDescription(source):
            return ImageCms.profileToProfile(rgb, source, _srgb(), outputMode="RGB") or rgb
    return rgb


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
