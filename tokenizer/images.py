"""Pictures as files: any image to RGB pixels, folders to lists, matching by stem, and grids to look at.

Shapes: n pictures, S the side in pixels. Pixels are float32 in [0, 1], RGB, channels last.
"""

import os
import pathlib
import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from EasyLM.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# What Pillow raises for a broken file, or one that is too large to be true.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B")


def load(path, size: int) -> np.ndarray:
    """A picture as the tokenizer sees it: RGB, resized (bicubic, the aspect not kept) to [size,size,3] in [0, 1].

    The camera's rotation is applied, transparency lies over white, of an animation the first frame counts, and 16-bit
    gray is scaled from 0..65535.

    Raises:
      UserError: naming the path, if the file is missing, broken or no picture.
    """
    try:
        with Image.open(path) as image:
            return to_pixels(image, size)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable picture ({error})") from error


def to_pixels(image: Image.Image, size: int | None) -> np.ndarray:
    """What `load` makes of an opened file; size None: [height,width,3]. Raises one of `UNREADABLE` if it is broken."""
    rgb = _to_rgb(ImageOps.exif_transpose(image))
    resized = rgb if size is None else rgb.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized, np.float32) / 255


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        gray = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.round(np.clip(gray, 0, 255)).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its values are floating point, whose range is unknown: save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def find(directory: str, flag: str) -> list[pathlib.Path]:
    """The pictures in a folder and the folders below it, by their names in order. Hidden files and others are left out.

    Raises:
      UserError: naming the flag, if there is no such folder, or no picture in it.
    """
    if not os.path.isdir(directory):
        raise UserError(f"--{flag}={directory}: no such folder")
    root = pathlib.Path(directory)
    found = [path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS and not _hidden(path, root)]
    if not found:
        raise UserError(f"--{flag}={directory}: no picture there ({', '.join(EXTENSIONS)})")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _hidden(path: pathlib.Path, root: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def stems(paths: Sequence[pathlib.Path], directory: str, flag: str) -> dict[str, pathlib.Path]:
    """Pictures by stem: their path within the folder without its extension, as `cats/0001`.

    Raises:
      UserError: naming two pictures of one stem.
    """
    by_stem: dict[str, pathlib.Path] = {}
    for path in paths:
        stem = path.relative_to(directory).with_suffix("").as_posix()
        if stem in by_stem:
            raise UserError(f"--{flag}={directory}: {by_stem[stem].name} and {path.name} share the stem {stem!r}")
        by_stem[stem] = path
    return by_stem


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1], clamped, as bytes."""
    return np.round(255 * np.clip(pixels, 0, 1)).astype(np.uint8)


def grid(pictures: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """Bytes [n,S,S,3] in rows of `columns`, `gap` white pixels apart: one picture, uint8 [height,width,3]."""
    count, height, width, _ = pictures.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    return canvas


def tiled(pictures: np.ndarray) -> np.ndarray:
    """Bytes [rows,columns,height,width,3] edge to edge: one picture, uint8 [rows*height,columns*width,3]."""
    rows, columns, height, width, _ = pictures.shape
    return pictures.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)


def save(path, picture: np.ndarray) -> None:
    """Writes bytes [height,width,3] as a picture, by a temporary name, so that nobody sees half of it."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(picture).save(temporary, format=Image.registered_extensions()[path.suffix.lower()])
    os.replace(temporary, path)
