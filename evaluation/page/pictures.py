"""Pictures of the page: enlarged images, and their files.

Imports no JAX: the process that reads videos uses this module.
Shapes: see `evaluation.prompting`; s the side of an enlarged image.
"""

import io
import pathlib
import tempfile

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tokenizer.media import images

_MIN_SIDE = 256  # pixels; smaller images are enlarged
_MARK = "enlarged"  # text in the PNG files of enlarged images; its value is the factor
_SIGNATURE = b"\x89PNG"


def enlarged_side(size: int) -> int:
    """Returns the side of an enlarged image: the least multiple of its side that is at least `_MIN_SIDE`."""
    return -(-_MIN_SIDE // size) * size


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """Enlarges images, uint8 [...,S,S,3], to [...,s,s,3] by repeating their pixels."""
    factor = enlarged_side(pixels.shape[-2]) // pixels.shape[-2]
    return pixels.repeat(factor, -3).repeat(factor, -2)


def save_png(pixels: np.ndarray, folder: pathlib.Path, prefix: str) -> str:
    """Writes an image, uint8 [height,width,3], under a new name, and returns its path."""
    return _save(images.png_bytes(pixels), folder, prefix)


def save_enlarged(image: np.ndarray, folder: pathlib.Path, prefix: str) -> str:
    """Writes an image, uint8 [S,S,3], enlarged, under a new name, and returns its path."""
    file, mark = io.BytesIO(), PngInfo()
    mark.add_text(_MARK, str(enlarged_side(len(image)) // len(image)))
    Image.fromarray(enlarged(image)).save(file, "PNG", pnginfo=mark)
    return _save(file.getvalue(), folder, prefix)


def original(file: bytes, size: int) -> np.ndarray | None:
    """Returns the image, uint8 [size,size,3], whose enlargement `save_enlarged` wrote; None: it is another file.

    Resizing the enlargement would blur the image. `file` is an image that can be decoded.
    """
    if not file.startswith(_SIGNATURE) or _MARK.encode() not in file[:200]:
        return None
    with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
        side = enlarged_side(size)
        if image.info.get(_MARK) != str(side // size) or image.size != (side, side) or image.mode != "RGB":
            return None
        return np.asarray(image)[:: side // size, :: side // size]


def _save(content: bytes, folder: pathlib.Path, prefix: str) -> str:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{prefix}_", suffix=".png", delete=False) as file:
        file.write(content)
    return file.name
