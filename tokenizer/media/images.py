"""One image file: decoded to RGB pixels, encoded as PNG, written atomically."""

import contextlib
import io
import os
import pathlib
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, features

from EasyLM import storage
from EasyLM.errors import UserError
from tokenizer.media import colours, sample_values

ImageFile = str | os.PathLike | BinaryIO

WRITABLE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Pillow reads these formats only if it was built with their library: library -> format, extensions.
_OPTIONAL_FORMATS = {
    "jpg_2000": ("JPEG2000", (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx")),
    "avif": ("AVIF", (".avif",)),
}
_AVAILABLE_FORMATS = [_OPTIONAL_FORMATS[library] for library in _OPTIONAL_FORMATS if features.check(library)]
# Pillow recognizes a format by the content, not by the extension. It would pass PostScript to another program.
_FORMATS = (
    *("PNG", "JPEG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "TGA", "PCX", "PSD", "QOI", "SGI"),
    *(name for name, _ in _AVAILABLE_FORMATS),
)
IMAGE_EXTENSIONS = (
    *WRITABLE_EXTENSIONS,
    *(".jpe", ".jfif", ".apng", ".dib", ".pbm", ".pnm", ".tga", ".pcx", ".psd", ".qoi", ".sgi"),
    *(extension for _, extensions in _AVAILABLE_FORMATS for extension in extensions),
)
_BLOCK_BYTES = 1 << 20
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# By EXIF orientation. (Pillow's exif_transpose also rewrites the other EXIF entries, and fails if one is malformed.)
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load(path: ImageFile, size: int) -> np.ndarray:
    """Loads an image as the tokenizer's input: `read`, scaled to float32 [0, 1].

    Raises:
      UserError: naming the path, if the file is missing, broken or not an image.
    """
    return to_float32(read(path, size))


def read(path: ImageFile, size: int, fast_decode: bool = False) -> np.ndarray:
    """Reads an image as RGB bytes, resized (bicubic, without keeping the aspect ratio) to uint8 [size,size,3].

    Applies the EXIF orientation, composites transparency over white, takes the first frame of an animation, converts
    the colours that the file states to sRGB, and scales gray of more than 8 bits by its largest possible value.

    Args:
      path: the file.
      size: the side.
      fast_decode: decode a JPEG file at 1/2, 1/4 or 1/8 of its sides, as long as they are not below `size`. The decoder
        leaves out the high frequencies of each block of 8x8 pixels, which take most of the time.

    Raises:
      UserError: naming the path, if the file is missing, broken or not an image.
    """
    with open_image(path) as image:
        if fast_decode:
            image.draft(None, (size, size))
        return to_bytes(image, size)


@contextlib.contextmanager
def open_image(path: ImageFile) -> Iterator[Image.Image]:
    """Opens an image file. Converts any error raised inside the context to a UserError that names the path."""
    if isinstance(path, str | os.PathLike) and os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: is not a file")  # reading a pipe could wait forever
    try:
        with Image.open(path, formats=_FORMATS) as image:
            prepare(image)
            yield image
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # Pillow's decoders raise many classes on broken bytes, even IndexError
        if isinstance(path, str | os.PathLike):
            storage.check_no_pointer(path)
        raise UserError(f"{path}: not a readable image ({error or type(error).__name__})") from error


def prepare(image: Image.Image) -> None:
    """Checks and corrects what Pillow does not. Call it on an opened image before its pixels are loaded.

    Raises:
      ValueError: if a PNG file is damaged, a PNG or AVIF file is HDR or has an unknown transfer function, or the values
        of a TIFF or JPEG 2000 file are of a type that Pillow misreads.
    """
    _check_png(image)
    _check_avif(image)
    sample_values.check_jpeg2000(image, _head(image, "JPEG2000"))
    sample_values.check_signs(image)
    sample_values.correct_layout(image)
    sample_values.scale_transparency(image)


def _check_png(image: Image.Image) -> None:
    """Verifies the checksums of the pixel data of a PNG file, and reads its chunk of colours. Pillow does neither."""
    file = getattr(image, "fp", None)
    if image.format != "PNG" or file is None:
        return
    position = file.tell()
    file.seek(len(_PNG_SIGNATURE))
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IDAT":
            crc = zlib.crc32(kind)
            while length and (data := file.read(min(length, _BLOCK_BYTES))):
                crc, length = zlib.crc32(data, crc), length - len(data)
            if file.read(4) != struct.pack(">I", crc):
                raise ValueError("its pixels are damaged: their checksum differs")
        elif kind == b"cICP":
            content = file.read(min(length, 4))  # primaries, transfer function, matrix, range
            _set_colours(image, content[:1], content[1:2])
            file.seek(length - len(content) + 4, os.SEEK_CUR)
        else:
            file.seek(length + 4, os.SEEK_CUR)
    file.seek(position)


def _check_avif(image: Image.Image) -> None:
    """Reads the box of an AVIF file that names its colours."""
    _, box, numbers = _head(image, "AVIF").partition(b"colrnclx")
    if box:  # 16-bit numbers of the primaries and the transfer function
        _set_colours(image, numbers[1:2], numbers[3:4])
        if "icc_profile" in image.info:  # which describes more, and is preferred in AVIF
            image.info.pop("cicp", None)


def _head(image: Image.Image, image_format: str) -> bytes:
    """Returns the first bytes of a file of a format; of other files, none."""
    file = getattr(image, "fp", None)
    if image.format != image_format or file is None:
        return b""
    position = file.tell()
    file.seek(0)
    head = file.read(_BLOCK_BYTES)
    file.seek(position)
    return head


def _set_colours(image: Image.Image, primaries: bytes, transfer: bytes) -> None:
    """Sets the numbers of H.273 of an image's colours. Raises ValueError if they are not supported."""
    if not primaries or not transfer:
        return
    if transfer[0] in (colours.PQ, colours.HLG):
        raise ValueError("its colours are HDR (PQ or HLG): convert it to sRGB")
    colours.check_transfer(transfer[0])
    if primaries[0] not in colours.UNKNOWN:
        image.info["cicp"] = primaries[0], transfer[0]


def to_pixels(image: Image.Image, size: int | None) -> np.ndarray:
    """Converts an opened image as `load` does, to float32 [height,width,3]. With size None it keeps its size."""
    return to_float32(to_bytes(image, size))


def to_float32(pixels: np.ndarray) -> np.ndarray:
    """Scales bytes to float32 in [0, 1] in one pass. `astype` and a division take four times as long."""
    return np.divide(pixels, np.float32(255), dtype=np.float32)


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Clips pixels to [0, 1] and rounds them to bytes."""
    return np.round(255 * np.clip(pixels, 0, 1)).astype(np.uint8)


def to_bytes(image: Image.Image, size: int | None) -> np.ndarray:
    """Converts an opened image as `read` does, to uint8 [height,width,3]. With size None it keeps its size."""
    rgb = _to_rgb(upright(image))
    if size is not None:
        rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(sample_values.to_srgb(rgb, image))  # fewer pixels than before the resize


def upright(image: Image.Image, samples: Image.Image | None = None) -> Image.Image:
    """Applies the EXIF orientation of an opened image to it, or to `samples` that were computed from it."""
    samples = image if samples is None else samples
    image.load()  # a PNG file can store EXIF data after the pixels
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # malformed EXIF data raises many classes; the pixels are intact
        return samples
    transpose = _ORIENTATIONS.get(orientation)
    return samples if transpose is None else samples.transpose(transpose)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in sample_values.SIXTEEN_BIT_MODES:
        return Image.fromarray(to_uint8(sample_values.sixteen_bit_gray(image))).convert("RGB")
    if image.mode == "F":
        raise ValueError("its values are floating point, whose range is unknown: save it with 8 or 16 bits")
    if image.has_transparency_data:
        return over_white(image)
    if image.mode == "RGB":  # `convert` would copy it, which takes 3% of the time to read a JPEG file
        return image
    return sample_values.cmyk_to_srgb(image) if image.mode == "CMYK" else image.convert("RGB")


def over_white(image: Image.Image) -> Image.Image:
    """Composites an image with transparency over white. Returns RGB."""
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def png_bytes(pixels: np.ndarray | Image.Image) -> bytes:
    """Encodes an image, uint8 [height,width,3] or Pillow's, as a PNG file."""
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, "PNG")
    return file.getvalue()


def check_output(path: str, flag: str) -> None:
    """Checks that `save` can write the path, and creates its folder, before the image is computed.

    Raises:
      UserError: naming the flag, if `save` cannot write there.
    """
    check_extension(path, f"--{flag}={path}")
    storage.check_output(path, flag)


def check_extension(path: str, label: str) -> None:
    """Checks that `save` can write files with the path's extension.

    Raises:
      UserError: beginning with `label`, if it cannot.
    """
    if not path.lower().endswith(WRITABLE_EXTENSIONS):
        raise UserError(f"{label}: must end with one of {', '.join(WRITABLE_EXTENSIONS)}")


def save(path: str | os.PathLike, pixels: np.ndarray) -> None:
    """Atomically writes an image, uint8 [height,width,3] or gray of 8 or 16 bits [height,width]; creates its folder."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No fsync: commands write thousands of images, and a lost one is quick to write again.
    with storage.atomic_path(path, sync=False) as temporary:
        Image.fromarray(pixels).save(temporary, format=Image.registered_extensions()[path.suffix.lower()])
