"""Views turn the file of an image into pixels: plain, gray, masked, label colours, CO3D depth."""

import os
import pathlib
from collections.abc import Callable

import numpy as np

from tokenizer.media import images, sample_values

LUMINANCE = np.array([0.2989, 0.5870, 0.1140])  # of red, green, blue
HOLE_RANGE = (0.1, 0.5)  # side of a hole relative to the side of the image
PATCHES = 8  # along a side: a patch has 32 of 256 pixels
MIN_BRIGHTNESS = 0.2  # of the farthest valid depth; invalid depths are black


def gray(pixels: np.ndarray) -> np.ndarray:
    """Returns the luminance (weights of ITU-R BT.601) in all three channels: uint8 [...,3]."""
    return np.repeat(np.round(pixels @ LUMINANCE).astype(np.uint8)[..., None], 3, axis=-1)


def label_colours(ids: np.ndarray) -> np.ndarray:
    """Returns the colour of each label id in the PASCAL VOC palette, uint8 [...,3]. Id 0 is black.

    Bits 0, 3, 6, ... of an id are the bits of red, the highest first; bits 1, 4, 7, ... of green; 2, 5, 8, ... of blue.
    All ids below 2^24 have different colours.
    """
    channels = [sum((ids >> (3 * i + channel) & 1) << 7 - i for i in range(8)) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def label_ids(path: str | os.PathLike, size: int) -> np.ndarray:
    """Reads the ids of a label image, int64 [size,size], resized to the nearest pixel. Applies the EXIF orientation.

    An id is a gray value of 1 to 16 bits, or an index into the file's palette.

    Raises:
      UserError: naming the path, if it cannot be read, is RGB or JPEG, or has an id outside its palette.
    """
    with images.open_image(path) as image:
        if image.mode not in ("1", "L", "P", *sample_values.SIXTEEN_BIT_MODES):
            raise ValueError(f"its values are {image.mode}, not label ids: save it in gray or with a palette")
        step = sample_values.label_step(image)
        ids = np.asarray(images.upright(image)).astype(np.int64) // step
        sample_values.check_labels(image, ids)
        return _resize_nearest(ids, size)


def co3d_depth(path: str | os.PathLike, size: int) -> np.ndarray:
    """Reads a CO3D depth map as an image, brighter where nearer, black where invalid: uint8 [size,size,3].

    The 16-bit values are the bits of float16 depths. The file in `depth_masks` marks the valid ones. Each image is
    scaled by its own nearest and farthest point, because the unit differs between sequences.
    """
    with images.open_image(path) as image:
        if image.mode not in sample_values.SIXTEEN_BIT_MODES:
            raise ValueError(f"its values are {image.mode}, not 16-bit depths of CO3D")
        depth = (
            _resize_nearest(np.asarray(images.upright(image)).astype(np.uint16), size)
            .view(np.float16)
            .astype(np.float64)
        )
    with images.open_image(co3d_depth_mask(path)) as image:
        valid = _resize_nearest(np.asarray(images.upright(image).convert("L")), size) > 0
    valid &= np.isfinite(depth) & (depth > 0)
    valid_depth = depth[valid]
    if valid_depth.size:
        extent = max(valid_depth.max() - valid_depth.min(), 1e-6)
        nearness = (valid_depth.max() - valid_depth) / extent
        depth[valid] = MIN_BRIGHTNESS + (1 - MIN_BRIGHTNESS) * nearness
    brightness = np.where(valid, depth, 0)
    return np.repeat(images.to_uint8(brightness)[..., None], 3, axis=-1)


def co3d_depth_mask(path: str | os.PathLike) -> pathlib.Path:
    """Returns the mask of a depth map: S/depths/frame000001.jpg.geometric.png -> S/depth_masks/frame000001.png."""
    path = pathlib.Path(path)
    return path.parent.parent / "depth_masks" / f"{path.name.split('.')[0]}.png"


def _resize_nearest(values: np.ndarray, size: int) -> np.ndarray:
    """Resizes [height,width] to [size,size] without interpolation, by the value at the centre of each pixel."""
    rows, columns = ((2 * np.arange(size) + 1) * extent // (2 * size) for extent in values.shape)
    return values[rows[:, None], columns]


def with_hole(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blackens a square at a random position of pixels [size,size,3]; its side is 10 to 50 percent of theirs."""
    size = len(pixels)
    side = max(1, round(rng.uniform(*HOLE_RANGE) * size))
    top, left = rng.integers(0, size - side + 1, 2)
    pixels = pixels.copy()
    pixels[top : top + side, left : left + side] = 0
    return pixels


def _read_with_hole(path: str, size: int, key: int) -> np.ndarray:
    return with_hole(images.read(path, size), np.random.default_rng(key))


def _read_with_patches(path: str, size: int, key: int) -> np.ndarray:
    """Reads an image and blackens a random share of its 8x8 patches, at least one and not all."""
    rng = np.random.default_rng(key)
    count = PATCHES * PATCHES
    is_dropped = rng.permutation(count) < rng.integers(1, count)
    patch = np.arange(size) * PATCHES // size  # index of the patch of each row or column of pixels
    is_black = is_dropped.reshape(PATCHES, PATCHES)[patch[:, None], patch]
    return np.where(is_black[..., None], np.uint8(0), images.read(path, size))


# Each reads a file: (path, size, key) -> uint8 [size,size,3].
VIEWS: dict[str, Callable[[str, int, int], np.ndarray]] = {
    "plain": lambda path, size, key: images.read(path, size),
    "gray": lambda path, size, key: gray(images.read(path, size)),
    "hole": _read_with_hole,
    "patches": _read_with_patches,
    "palette": lambda path, size, key: label_colours(label_ids(path, size)),
    "co3d_depth": lambda path, size, key: co3d_depth(path, size),
}
RANDOM_VIEWS = ("hole", "patches")  # views that depend on the key
