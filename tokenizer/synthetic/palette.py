"""64 colours that are spread evenly over RGB, and images that consist of them.

Colours of sentences that define their own mapping (`tokenizer.mappings`) are from this palette.
"""

from collections.abc import Callable

import numpy as np

from tokenizer.synthetic import scenes

LEVELS = (15, 90, 165, 240)  # of each channel
COLOURS = np.stack(np.meshgrid(LEVELS, LEVELS, LEVELS, indexing="ij"), axis=-1).reshape(-1, 3).astype(np.uint8)

TILES = 8  # along a side: a tile of a 32-pixel image has 4x4 pixels, the area of a token


def ramp(gray_SS: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Maps gray values to a colour ramp: 0 to `low` [3], 255 to `high` [3]; uint8 [S,S,3]."""
    share_SS1 = gray_SS[..., None] / 255
    return np.round(low + share_SS1 * (high.astype(float) - low)).astype(np.uint8)


def enlarge(tiles_TT: np.ndarray, size: int) -> np.ndarray:
    """Enlarges the tiles [T,T,...] of an image to pixels [S,S,...]. S need not be a multiple of T."""
    tile_S = np.arange(size) * len(tiles_TT) // size  # index of the tile of each row or column of pixels
    return tiles_TT[tile_S[:, None], tile_S]


def flat_image(seed: int, size: int) -> np.ndarray:
    """Returns an image of random palette colours, uint8 [size,size,3]: what a tokenizer for mappings has to preserve.

    The image is one of: a mosaic of tiles, one flat colour, two flat colours with a sharp edge, the segmentation of a
    scene in random colours, a scene with one shape marked in a flat colour, depth or edges of a scene in a colour ramp.
    """
    rng = np.random.default_rng([seed, 19])
    draw = _IMAGES[rng.choice(len(_IMAGES), p=_SHARES)]
    return draw(rng, seed, size)


def _mosaic(rng: np.random.Generator, seed: int, size: int) -> np.ndarray:
    used = rng.permutation(len(COLOURS))[: rng.integers(2, len(COLOURS) + 1)]
    tiles = TILES if rng.random() < 0.75 else int(rng.integers(2, TILES))
    return enlarge(COLOURS[rng.choice(used, (tiles, tiles))], size)


def _field(rng: np.random.Generator, seed: int, size: int) -> np.ndarray:
    return np.broadcast_to(COLOURS[rng.integers(len(COLOURS))], (size, size, 3)).copy()


def _two_areas(rng: np.random.Generator, seed: int, size: int) -> np.ndarray:
    """A half-plane, a disc or a rectangle on a background."""
    y_SS, x_SS = np.mgrid[:size, :size] + 0.5
    (y, x), extent = rng.uniform(0.2, 0.8, 2) * size, rng.uniform(0.1, 0.4, 2) * size
    shape = rng.integers(3)
    if shape == 0:
        angle = rng.uniform(0, 2 * np.pi)
        inside_SS = (y_SS - y) * np.sin(angle) + (x_SS - x) * np.cos(angle) > 0
    elif shape == 1:
        inside_SS = np.hypot(y_SS - y, x_SS - x) < extent[0]
    else:
        inside_SS = (np.abs(y_SS - y) < extent[0]) & (np.abs(x_SS - x) < extent[1])
    return _two_colours(rng)[inside_SS.astype(int)]


def _segmentation(rng: np.random.Generator, seed: int, size: int) -> np.ndarray:
    colours = COLOURS[rng.permutation(len(COLOURS))]
    return colours[scenes.label_ids(scenes.scene(seed, size)["segmentation"])]


def _marked(rng: np.random.Generator, seed: int, size: int) -> np.ndarray:
    scene = scenes.scene(seed, size)
    ids_SS = scenes.label_ids(scene["segmentation"])
    label = rng.choice(np.unique(ids_SS))
    return np.where((ids_SS == label)[..., None], COLOURS[rng.integers(len(COLOURS))], scene["image"])


def _ramp(rng: np.random.Generator, seed: int, size: int) -> np.ndarray:
    scene = scenes.scene(seed, size)
    return ramp(scene[("depth", "edges")[rng.integers(2)]][..., 0], *_two_colours(rng))


def _two_colours(rng: np.random.Generator) -> np.ndarray:
    """Two different colours: uint8 [2,3]."""
    return COLOURS[rng.permutation(len(COLOURS))[:2]]


_Draw = Callable[[np.random.Generator, int, int], np.ndarray]  # (generator, seed of the scene, size) -> [size,size,3]
_IMAGES: tuple[_Draw, ...] = (_mosaic, _field, _two_areas, _segmentation, _marked, _ramp)
_SHARES = (0.35, 0.05, 0.15, 0.2, 0.1, 0.15)
