"""Views turn the file of an image into pixels: plain, gray, masked, label colours, depth."""

from collections.abc import Callable

import numpy as np

from EasyLM.errors import UserError
from tokenizer.media import images, sample_values
from tokenizer.media.images import ImageFile
from tokenizer.sources import reading

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


def label_ids(path: ImageFile, size: int) -> np.ndarray:
    """Reads the ids of a label image, int64 [size,size], resized to the nearest pixel. Applies the EXIF orientation.

    An id is a gray value as it is stored, where black is 0, or an index into the file's palette.

    Raises:
      UserError: naming the path, if it cannot be read, is RGB or JPEG, or has an id outside its palette.
    """
    with images.open_image(path) as image:
        if image.mode not in ("1", "L", "P", *sample_values.SIXTEEN_BIT_MODES):
            raise ValueError(f"its values are {image.mode}, not label ids: save it in gray or with a palette")
        ids = np.asarray(images.upright(image, sample_values.stored_values(image)))
        sample_values.check_labels(image, ids)
        return _resize_nearest(ids.astype(np.int64), size)


def depth(path: ImageFile, size: int, near: float, far: float) -> np.ndarray:
    """Reads a depth map as an image, white at `near` and black at `far` and beyond: uint8 [size,size,3].

    The distances are in the unit of the file, which has gray of 16 bits or floating point. Values that are not positive
    and finite are black. The map is resized to the nearest pixel. A file with gray of 8 bits or with colours is already
    an image: it is read as `images.read` does.

    Raises:
      UserError: naming the path, if it cannot be read or no value is between `near` and `far`.
    """
    with images.open_image(path) as image:
        if image.mode not in ("F", *sample_values.SIXTEEN_BIT_MODES):
            return images.to_bytes(image, size)
        values = np.asarray(images.upright(image, sample_values.stored_values(image)), np.float64)
        valid = np.isfinite(values) & (values > 0)
        if valid.any() and not ((values >= min(near, far)) & (values <= max(near, far)) & valid).any():
            least, most = values[valid].min(), values[valid].max()
            raise ValueError(f"its depths are {least:g} to {most:g}, all outside the range {near:g} to {far:g}")
    brightness = np.where(valid, (far - np.where(valid, values, far)) / (far - near), 0)
    return np.repeat(images.to_uint8(_resize_nearest(brightness, size))[..., None], 3, axis=-1)


def parse_depth_range(text: str) -> tuple[float, float]:
    """Parses `near,far`.

    Raises:
      UserError: if the text is not two different positive distances.
    """
    try:
        near, far = map(float, text.split(","))
    except ValueError:
        near = far = 0.0
    if not (0 < near < np.inf and 0 < far < np.inf and near != far):
        raise UserError("must be near,far: two different distances above 0, such as 0.5,10")
    return near, far


def co3d_depth(path: ImageFile, size: int, mask: str = "") -> np.ndarray:
    """Reads a CO3D depth map as an image, brighter where nearer, black where invalid: uint8 [size,size,3].

    The 16-bit values are the bits of float16 depths. The mask marks the valid ones; without an address, it is the file
    in `depth_masks` beside them. Each image is scaled by its own nearest and farthest point, because the unit differs
    between sequences.
    """
    with images.open_image(path) as image:
        if image.mode not in sample_values.SIXTEEN_BIT_MODES:
            raise ValueError(f"its values are {image.mode}, not 16-bit depths of CO3D")
        bits = np.asarray(images.upright(image, sample_values.stored_values(image))).astype(np.uint16)
        depth = _resize_nearest(bits, size).view(np.float16).astype(np.float64)
    with images.open_image(reading.open_item(mask or co3d_depth_mask(str(path)))) as image:
        valid = _resize_nearest(np.asarray(images.upright(image).convert("L")), size) > 0
    valid &= np.isfinite(depth) & (depth > 0)
    valid_depth = depth[valid]
    if valid_depth.size:
        extent = max(valid_depth.max() - valid_depth.min(), 1e-6)
        nearness = (valid_depth.max() - valid_depth) / extent
        depth[valid] = MIN_BRIGHTNESS + (1 - MIN_BRIGHTNESS) * nearness
    brightness = np.where(valid, depth, 0)
    return np.repeat(images.to_uint8(brightness)[..., None], 3, axis=-1)


def co3d_depth_mask(path: str) -> str:
    """Returns the mask of a depth map: S/depths/frame000001.jpg.geometric.png -> S/depth_masks/frame000001.png."""
    folder, _, name = path.rpartition("/")
    sequence = folder.rpartition("/")[0]
    return f"{sequence}/depth_masks/{name.split('.')[0]}.png"


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


def _with_patches(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blackens a random share of the 8x8 patches of pixels [size,size,3], at least one and not all."""
    count = PATCHES * PATCHES
    is_dropped = rng.permutation(count) < rng.integers(1, count)
    patch = np.arange(len(pixels)) * PATCHES // len(pixels)  # index of the patch of each row or column of pixels
    is_black = is_dropped.reshape(PATCHES, PATCHES)[patch[:, None], patch]
    return np.where(is_black[..., None], np.uint8(0), pixels)


# Of the pixels of an image: (uint8 [size,size,3], argument) -> uint8 [size,size,3]. The argument of a mask is the seed
# of its position.
_PIXEL_VIEWS: dict[str, Callable[[np.ndarray, str], np.ndarray]] = {
    "plain": lambda pixels, _: pixels,
    "gray": lambda pixels, _: gray(pixels),
    "hole": lambda pixels, key: with_hole(pixels, np.random.default_rng(int(key))),
    "patches": lambda pixels, key: _with_patches(pixels, np.random.default_rng(int(key))),
}
# Of a file whose values are not colours: (path, size, argument) -> uint8 [size,size,3]. The argument of a depth map of
# CO3D is the address of its mask.
_FILE_VIEWS: dict[str, Callable[[ImageFile, int, str], np.ndarray]] = {
    "palette": lambda path, size, _: label_colours(label_ids(path, size)),
    "depth": lambda path, size, depth_range: depth(path, size, *parse_depth_range(depth_range)),
    "co3d_depth": co3d_depth,
}


def read(view: str, path: ImageFile, size: int, argument: str, fast_decode: bool) -> np.ndarray:
    """Reads a view of an image file: uint8 [size,size,3].

    Args:
      view: a key of one of the tables above.
      path: the file.
      size: the side.
      argument: of the view.
      fast_decode: see `images.read`. It does not apply to values that are not colours.

    Raises:
      UserError: naming the path, if it cannot be read.
    """
    if view in _PIXEL_VIEWS:
        return _PIXEL_VIEWS[view](images.read(path, size, fast_decode), argument)
    return _FILE_VIEWS[view](path, size, argument)
