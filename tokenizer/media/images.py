"""Pictures as files: any image to RGB pixels, folders to lists, matching by stem, and grids to look at.

Shapes: n pictures, S the side in pixels. Pixels are float32 in [0, 1], RGB, channels last.
"""

import collections
import contextlib
import dataclasses
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import ExifTags, Image, features

from EasyLM import storage
from EasyLM.errors import UserError

WRITTEN = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# What Pillow reads by itself; some only where it was built with the library.
_OPTIONAL = {"jpg_2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"), "avif": (".avif",)}
EXTENSIONS = (
    *WRITTEN,
    *(".jpe", ".jfif", ".apng", ".dib", ".pbm", ".pnm", ".tga", ".pcx", ".psd", ".qoi", ".sgi"),
    *(extension for name, extensions in _OPTIONAL.items() if features.check(name) for extension in extensions),
)
_MOST_TOLD = 50  # extensions that are counted by name: where files are numbered behind the dot, each has another one
# By the camera's note. (Pillow's exif_transpose writes all other notes anew, and fails where one of them is odd.)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B")  # Pillow's modes of 16-bit gray; "I" may hold 32 bits


def load(path, size: int) -> np.ndarray:
    """A picture as the tokenizer sees it: `read`, scaled to [0, 1].

    Raises:
      UserError: naming the path, if the file is missing, broken or no picture.
    """
    return scaled(read(path, size))


def read(path, size: int) -> np.ndarray:
    """A picture as bytes: RGB, resized (bicubic, the aspect not kept) to uint8 [size,size,3].

    The camera's rotation is applied, transparency lies over white, of an animation the first frame counts, and 16-bit
    gray is scaled from 0..65535.

    Raises:
      UserError: naming the path, if the file is missing, broken or no picture.
    """
    with opened(path) as image:
        return _to_bytes(image, size)


@contextlib.contextmanager
def opened(path) -> Iterator[Image.Image]:
    """The image of a file; what goes wrong with it in here becomes a UserError with its path."""
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # on broken bytes Pillow's decoders raise nearly anything, IndexError too
        raise UserError(f"{path}: not a readable picture ({error or type(error).__name__})") from error


def to_pixels(image: Image.Image, size: int | None) -> np.ndarray:
    """What `load` makes of an opened file; size None: [height,width,3]."""
    return scaled(_to_bytes(image, size))


def scaled(pixels: np.ndarray) -> np.ndarray:
    """Bytes as float32 in [0, 1], in one pass: astype and division take four times as long."""
    return np.divide(pixels, np.float32(255), dtype=np.float32)


def _to_bytes(image: Image.Image, size: int | None) -> np.ndarray:
    rgb = _to_rgb(upright(image))
    return np.asarray(rgb if size is None else rgb.resize((size, size), Image.Resampling.BICUBIC))


def upright(image: Image.Image) -> Image.Image:
    """The image of a file, turned as the camera says."""
    image.load()  # of a PNG file the note may come last
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in SIXTEEN_BIT:
        gray = np.asarray(image)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError(f"its values are {gray.min()}..{gray.max()}, more than 16 bits: save it with 8 or 16 bits")
        return Image.fromarray(np.round(gray.astype(np.float64) / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its values are floating point, whose range is unknown: save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def find(directory: str, flag: str) -> list[pathlib.Path]:
    """The pictures in a folder and the folders below it, by their names in order. Hidden files and others are left out;
    how many of the others there are is told on standard error.

    Raises:
      UserError: naming the flag, if there is no such folder, or no picture in it.
    """
    others: collections.Counter = collections.Counter()
    names = sorted(entry.name for entry in walk(directory, flag, others=others))
    tell_others(others, f"--{flag}={directory}")
    return [pathlib.Path(directory, name) for name in names]


def tell_others(counts: dict[str, int], where: str) -> None:
    """Says on standard error how many files were passed over, by extension, if any were."""
    if counts:
        most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        told = ", ".join(f"{count} {name}" for name, count in most_first)
        print(f"{where}: passed over files of other extensions: {told}", file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file: its name within the folder that was walked, as `cats/0001.png`, its bytes, and when it changed."""

    name: str
    size: int
    changed_ns: int


def walk(
    directory: str, flag: str, extensions: Sequence[str] = EXTENSIONS, others: collections.Counter | None = None
) -> Iterator[Entry]:
    """The files of these extensions (in any case) in a folder and those below it, in no order, listing none in memory.

    Hidden files and folders are left out. Links to folders are followed, but for those to a folder that holds them.
    `others` counts by extension the files that are neither hidden nor of these.

    Raises:
      UserError: naming the flag, if there is no such folder, no such file in it, or a name that is not UTF-8.
    """
    if not os.path.isdir(directory):
        raise UserError(f"--{flag}={directory}: no such folder")
    found, folders = False, [("", ())]
    while folders:
        folder, above = folders.pop()
        stat = os.stat(os.path.join(directory, folder))
        # Not all that were visited: of two ways to a folder, the order of the listing would choose one.
        if (stat.st_dev, stat.st_ino) in above:
            continue
        above += ((stat.st_dev, stat.st_ino),)
        with os.scandir(os.path.join(directory, folder)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                # Of a link to itself, entry.is_dir() raises; of others than links it asks the disk nothing.
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    folders.append((f"{folder}{entry.name}/", above))
                elif entry.name.lower().endswith(tuple(extensions)):
                    found = True
                    yield _entry(entry, folder, directory, flag)
                elif others is not None:
                    _count(others, entry.name)
    if not found:
        raise UserError(f"--{flag}={directory}: no file of {', '.join(extensions)} there")


def _count(others: collections.Counter, name: str) -> None:
    extension = os.path.splitext(name)[1].lower().encode(errors="replace").decode() or "without one"
    others[extension if extension in others or len(others) < _MOST_TOLD else "of further ones"] += 1


def _entry(entry: os.DirEntry, folder: str, directory: str, flag: str) -> Entry:
    name = f"{folder}{entry.name}"
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"--{flag}={directory}: the name {os.fsencode(name)!r} is not UTF-8; rename the file") from None
    try:
        stat = entry.stat()
    except OSError:  # a link to nothing or to itself: whoever reads it says so
        stat = entry.stat(follow_symlinks=False)
    return Entry(name, stat.st_size, stat.st_mtime_ns)


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


def natural(name: str) -> str:
    """A key that sorts names by their numbers, then by text, 2.png before 10.png; of different names it differs."""
    return re.sub(r"[0-9]+", lambda digits: digits[0].zfill(20), name) + "\0" + name


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


def check_output(path: str, flag: str) -> None:
    """Makes the folder for a picture, and tries it, before the work for that picture.

    Raises:
      UserError: naming the flag, if `save` could not write it.
    """
    check_ending(path, f"--{flag}={path}")
    storage.check_output(path, flag)


def check_ending(path: str, name: str) -> None:
    """Raises UserError, which begins with `name`, unless `save` knows how to write files of that ending."""
    if not path.lower().endswith(WRITTEN):
        raise UserError(f"{name}: must end with one of {', '.join(WRITTEN)}")


def save(path, picture: np.ndarray) -> None:
    """Atomically writes an image file from bytes [height,width,3], or gray of 8 or 16 bits [height,width]."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without flushing to the disk: commands write images by the thousand, and a lost one is quick to write again.
    with storage.atomic_path(path, sync=False) as temporary:
        Image.fromarray(picture).save(temporary, format=Image.registered_extensions()[path.suffix.lower()])
