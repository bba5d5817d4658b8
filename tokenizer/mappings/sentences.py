"""Composes sentences of mappings from a pool, without encoding them. A sentence is a function of its seed and the pool.

Shapes: n sentences, m new images, S the side in pixels.
"""

import dataclasses
import functools
import time
from typing import Any

import numpy as np

from tokenizer.mappings import mappings
from tokenizer.mappings.pool import NUM_FRAMES, Pool

PAIRS = 8
FRAMES = "frames"  # the family of clips: 16 frames in order
NUM_IMAGES = 2 * PAIRS
FAMILIES = (*mappings.FAMILIES, FRAMES)
NEW_IMAGE = -1  # instead of the number of an image of the pool

_SHARE_WITH_LABEL = 0.75  # of the scenes, if the mapping is about a class

assert NUM_FRAMES == NUM_IMAGES


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The families of a set of sentences.

    Attributes:
      weights: shares of the families. They need not add up to 1.
      num_mappings: mappings of each family, the same ones for all seeds; 0: a new one for each sentence.
    """

    families: tuple[str, ...]
    weights: tuple[float, ...]
    num_mappings: int = 0

    def draw(self, rng: np.random.Generator) -> str:
        """Draws a family."""
        totals = np.cumsum(self.weights)
        return self.families[int(np.searchsorted(totals, rng.random() * totals[-1], side="right"))]

    def draw_mapping(self, rng: np.random.Generator, family: str) -> mappings.Mapping:
        """Draws a mapping of a family of `mappings`."""
        if self.num_mappings:
            number = int(rng.integers(self.num_mappings))
            rng = np.random.default_rng([number, list(mappings.FAMILIES).index(family), 37])
        return mappings.draw(rng, family)


@dataclasses.dataclass(frozen=True)
class Sentences:
    """Consecutive sentences.

    Attributes:
      numbers: of the images in the pool, int32 [n,16]; NEW_IMAGE for others.
      pixels: the other images in order, uint8 [m,S,S,3].
      keys: further keys of each record: `kind`, the family, and `mapping`, see `Mapping.describe`.
      seconds: CPU time of composing.
    """

    numbers: np.ndarray
    pixels: np.ndarray
    keys: list[dict[str, Any]]
    seconds: float


def compose_range(directory: str, mixture: Mixture, seeds: range) -> Sentences:
    """Composes the sentences of seeds from the pool in a folder."""
    start = time.process_time()
    pool = _open(directory)
    numbers, pixels, keys = [], [], []
    for seed in seeds:
        sentence_numbers, sentence_pixels, sentence_keys = compose(pool, mixture, seed)
        numbers.append(sentence_numbers)
        pixels += sentence_pixels
        keys.append(sentence_keys)
    empty = np.zeros((0, pool.size, pool.size, 3), np.uint8)
    stacked = np.stack(pixels) if pixels else empty
    return Sentences(np.array(numbers, np.int32), stacked, keys, time.process_time() - start)


def compose(pool: Pool, mixture: Mixture, seed: int) -> tuple[list[int], list[np.ndarray], dict[str, Any]]:
    """Returns the numbers of a sentence's images, its new images and its keys, as in `Sentences`."""
    rng = np.random.default_rng([seed, 29])
    family = mixture.draw(rng)
    if family == FRAMES:
        return list(pool.frame_numbers(int(rng.integers(pool.counts["clips"])))), [], {"kind": family}
    mapping = mixture.draw_mapping(rng, family)
    group = "photos" if family == "photo_color" else "scenes"
    numbers, pixels = [], []
    for item in _choose_items(rng, pool, group, mapping.label):
        pair = mapping.pair(pool.scene(group, item), rng, pool.size)
        for image, view in zip(pair, mapping.views(), strict=True):
            numbers.append(pool.number(group, view, item) if view else NEW_IMAGE)
            if not view:
                pixels.append(image)
    return numbers, pixels, {"kind": family, "mapping": mapping.describe()}


def sentence_images(pool: Pool, family: str, seed: int) -> np.ndarray:
    """Returns the images of a sentence of a family, uint8 [16,S,S,3]."""
    numbers, new_images, _ = compose(pool, Mixture((family,), (1.0,)), seed)
    pixels = pool.pixels(np.maximum(numbers, 0))
    if new_images:
        pixels[np.array(numbers) == NEW_IMAGE] = new_images
    return pixels


def _choose_items(rng: np.random.Generator, pool: Pool, group: str, label: int) -> list[int]:
    """Draws the scenes or photographs of a sentence, all different. Most of them show the label if it is not 0."""
    items = rng.choice(pool.counts[group], PAIRS, replace=False)
    if label:
        showing = np.flatnonzero(pool.shows[:, label])
        count = min(int(rng.binomial(PAIRS, _SHARE_WITH_LABEL)), len(showing))
        both = [*rng.choice(showing, count, replace=False).tolist(), *items.tolist()]
        items = rng.permutation(list(dict.fromkeys(both))[:PAIRS])
    return items.tolist()


@functools.lru_cache(maxsize=1)
def _open(directory: str) -> Pool:
    return Pool(directory)
