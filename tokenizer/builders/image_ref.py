"""Pictures of a sentence before they are read: which file, which moment of it, seen how.

Reading needs no JAX: worker processes import this. Shapes: S the side in pixels. Pixels are bytes, RGB, channels last.
"""

import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from tokenizer.media import images, videos

LUMINANCE = np.array([0.2989, 0.5870, 0.1140])  # of red, green, blue
HOLE = (0.1, 0.5)  # side of a hole, in sides of the picture
PATCHES = 8  # in a row: 32 pixels of 256
FARTHEST = 0.2  # brightness of the farthest point that has a depth; without one it is black


class Picture(NamedTuple):
    """A picture; equal ones have the same pixels.

    Attributes:
      path: an image, or a video if `seconds` is given.
      seconds: the moment of the video.
      view: one of VIEWS.
      key: decides what is random in the view.
    """

    path: str
    seconds: float | None = None
    view: str = "plain"
    key: int = 0


def facts(sentence: Iterable[Picture]) -> dict:
    """What a record says of where its pictures come from; times and views only where there are any.

    A view with a random key is written `hole:KEY`.
    """
    sentence = list(sentence)
    found: dict = {"sources": [picture.path for picture in sentence]}
    if any(picture.seconds is not None for picture in sentence):
        found["seconds"] = [picture.seconds for picture in sentence]
    if any(picture.view != "plain" for picture in sentence):
        found["views"] = [p.view + f":{p.key}" * (p.view in RANDOM) for p in sentence]
    return found


def of_record(record: dict) -> list[Picture]:
    """The pictures of a record: the inverse of `facts`."""
    count = len(record["sources"])
    seconds, views = record.get("seconds", [None] * count), record.get("views", ["plain"] * count)
    keyed = [view.partition(":") for view in views]
    return [Picture(p, s, v, int(key or 0)) for p, s, (v, _, key) in zip(record["sources"], seconds, keyed)]


def groups(sentence: Iterable[Picture]) -> Iterator[list[Picture]]:
    """The pictures in parts that are best read at once: the frames of a video together, else one by one."""
    frames: dict[str, list[Picture]] = {}
    for picture in sentence:
        if picture.seconds is None:
            yield [picture]
        else:
            frames.setdefault(picture.path, []).append(picture)
    yield from frames.values()


def read(group: list[Picture], size: int) -> np.ndarray:
    """The pixels of one of the `groups`, uint8 [len(group),size,size,3].

    Raises:
      UserError: naming the path that cannot be read.
    """
    if group[0].seconds is not None:
        return images.to_uint8(videos.read(group[0].path, [picture.seconds for picture in group], size))
    return np.stack([VIEWS[picture.view](picture.path, size, picture.key) for picture in group])


def gray(pixels: np.ndarray) -> np.ndarray:
    """Luminance by the weights of ITU-R BT.601, in all three channels: uint8 [...,3]."""
    return np.repeat(np.round(pixels @ LUMINANCE).astype(np.uint8)[..., None], 3, axis=-1)


def colours(ids: np.ndarray) -> np.ndarray:
    """The colour of each label id, uint8 [...,3]: the palette of PASCAL VOC, 0 is black; all ids below 2^24 differ.

    Bits 0, 3, 6, ... of an id are the bits of red, from the highest down; 1, 4, 7, ... of green; 2, 5, 8, ... of blue.
    """
    channels = [sum((ids >> (3 * i + channel) & 1) << 7 - i for i in range(8)) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def label_ids(path, size: int) -> np.ndarray:
    """The ids of a label picture, int64 [size,size], resized to the nearest: gray values of 8 or 16 bits, or the
    numbers of palette colours.

    Raises:
      UserError: naming the path, if it cannot be read or has colours of its own.
    """
    with images.open_image(path) as image:
        if image.mode not in ("1", "L", "P", *images.SIXTEEN_BIT_MODES):
            raise ValueError(f"its values are {image.mode}, no label ids: save it in gray or with a palette")
        return _nearest(np.asarray(image).astype(np.int64), size)


def co3d_depth(path, size: int) -> np.ndarray:
    """A depth map of CO3D as a picture, brighter where nearer, black where there is none: uint8 [size,size,3].

    The file's 16-bit values are the bits of float16 depths; `depth_masks/` beside its folder says which are valid. Each
    picture is scaled by its own nearest and farthest point, as the unit differs from sequence to sequence.
    """
    with images.open_image(path) as image:
        if image.mode not in images.SIXTEEN_BIT_MODES:
            raise ValueError(f"its values are {image.mode}, not 16-bit depths of CO3D")
        depth = _nearest(np.asarray(image).astype(np.uint16), size).view(np.float16).astype(np.float64)
    with images.open_image(co3d_depth_mask(path)) as image:
        valid = _nearest(np.asarray(image.convert("L")), size) > 0
    valid &= np.isfinite(depth) & (depth > 0)
    shown = depth[valid]
    if shown.size:
        reach = max(shown.max() - shown.min(), 1e-6)
        nearness = (shown.max() - shown) / reach
        depth[valid] = FARTHEST + (1 - FARTHEST) * nearness
    brightness = np.where(valid, depth, 0)
    return np.repeat(images.to_uint8(brightness)[..., None], 3, axis=-1)


def co3d_depth_mask(path) -> pathlib.Path:
    """The mask of a depth map: S/depths/frame000001.jpg.geometric.png -> S/depth_masks/frame000001.png."""
    path = pathlib.Path(path)
    return path.parent.parent / "depth_masks" / f"{path.name.split('.')[0]}.png"


def _nearest(values: np.ndarray, size: int) -> np.ndarray:
    """[height,width] -> [size,size], each the value at its centre: numbers that stand for things are not mixed."""
    rows, columns = ((2 * np.arange(size) + 1) * extent // (2 * size) for extent in values.shape)
    return values[rows[:, None], columns]


def with_hole(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pixels [size,size,3] with a black square, 10 to 50 percent of the side, anywhere."""
    size = len(pixels)
    side = max(1, round(rng.uniform(*HOLE) * size))
    top, left = rng.integers(0, size - side + 1, 2)
    pixels = pixels.copy()
    pixels[top : top + side, left : left + side] = 0
    return pixels


def _hole(path, size: int, key: int) -> np.ndarray:
    return with_hole(images.read(path, size), np.random.default_rng(key))


def _patches(path, size: int, key: int) -> np.ndarray:
    """Squares of 1/8 of the side, as many black as a random ratio says, at least one and not all of them."""
    rng = np.random.default_rng(key)
    count = PATCHES * PATCHES
    dropped = rng.permutation(count) < rng.integers(1, count)
    place = np.arange(size) * PATCHES // size
    black = dropped.reshape(PATCHES, PATCHES)[place[:, None], place]
    return np.where(black[..., None], np.uint8(0), images.read(path, size))


# How a file becomes pixels: (path, size, key) -> uint8 [size,size,3].
VIEWS: dict[str, Callable[[str, int, int], np.ndarray]] = {
    "plain": lambda path, size, key: images.read(path, size),
    "gray": lambda path, size, key: gray(images.read(path, size)),
    "hole": _hole,
    "patches": _patches,
    "palette": lambda path, size, key: colours(label_ids(path, size)),
    "co3d_depth": lambda path, size, key: co3d_depth(path, size),
}
RANDOM = ("hole", "patches")  # views that a key decides
