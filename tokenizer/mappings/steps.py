"""The steps of which mappings consist. A step turns an image into another one, with the scene that the image shows.

A source makes the input image of a pair; the steps make the answer of it. Both know the scene: a dictionary of views,
uint8 [S,S,3], and `labels`, the class ids uint8 [S,S]. Lengths are in tiles, an eighth of the side each, so that a
mapping does not depend on the size of the images.
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from tokenizer.builders import views
from tokenizer.mappings import held_out
from tokenizer.media import images
from tokenizer.synthetic import palette, scenes

Scene = Mapping[str, np.ndarray]

VIEWS = ("image", *scenes.ANNOTATIONS, "gray")  # the views of a scene
USUAL_COLOURS = np.array([scenes.BACKGROUND, *scenes.PALETTE.values()], np.uint8)  # of the labels
_CHANNEL_ORDERS = np.array([(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
_PLACES = np.array([16, 4, 1])  # of the three levels in the index of a palette colour
_LEVEL_STEP = palette.LEVELS[1] - palette.LEVELS[0]
_TO_YIQ = np.array([views.LUMINANCE, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])


def with_views(scene: Scene) -> dict[str, np.ndarray]:
    """Returns the images of `scenes.scene` with the views that they do not contain: `gray` and `labels`."""
    return {**scene, "gray": views.gray(scene["image"]), "labels": scenes.label_ids(scene["segmentation"])}


class Source(Protocol):
    """Makes the input image of a pair."""

    def draw(self, scene: Scene, rng: np.random.Generator, size: int) -> np.ndarray:
        """Returns pixels, uint8 [size,size,3]."""
        ...


class Step(Protocol):
    """Makes an image from the image of the step before."""

    def apply(self, pixels: np.ndarray, scene: Scene) -> np.ndarray:
        """Returns pixels, uint8 [S,S,3]."""
        ...


@dataclasses.dataclass(frozen=True)
class View:
    """A view of the scene, as a source or as a step."""

    name: str

    def draw(self, scene: Scene, rng: np.random.Generator, size: int) -> np.ndarray:
        return scene[self.name]

    def apply(self, pixels: np.ndarray, scene: Scene) -> np.ndarray:
        return scene[self.name]


@dataclasses.dataclass(frozen=True)
class Hole:
    """The scene's image with a black square at a random place, as in the benchmark's task `inpainting`."""

    def draw(self, scene: Scene, rng: np.random.Generator, size: int) -> np.ndarray:
        return views.with_hole(scene["image"], rng)


@dataclasses.dataclass(frozen=True, eq=False)
class Mosaic:
    """Tiles of random colours, each independent of the others. `colours` [n] are indices of palette colours."""

    colours: np.ndarray

    def draw(self, scene: Scene, rng: np.random.Generator, size: int) -> np.ndarray:
        chosen = self.colours[rng.integers(len(self.colours), size=(palette.TILES, palette.TILES))]
        return palette.enlarge(palette.COLOURS[chosen], size)


@dataclasses.dataclass(frozen=True, eq=False)
class Exchange:
    """Replaces palette colours: `colours` [n] by `images` [n], indices. The image has palette colours only."""

    colours: np.ndarray
    images: np.ndarray

    def apply(self, pixels: np.ndarray, scene: Scene) -> np.ndarray:
        table = palette.COLOURS.copy()
        table[self.colours] = palette.COLOURS[self.images]
        return table[pixels // _LEVEL_STEP @ _PLACES]


@dataclasses.dataclass(frozen=True, eq=False)
class Recolour:
    """The segmentation of the scene: label i has the colour `colours[i]`, uint8 [labels,3]."""

    colours: np.ndarray

    def apply(self, pixels: np.ndarray, scene: Scene) -> np.ndarray:
        return self.colours[scene["labels"]]


@dataclasses.dataclass(frozen=True)
class Mark:
    """Draws a class in a palette colour. `background` is a palette colour for all else; -1 keeps the image."""

    label: int
    colour: int
    background: int

    def apply(self, pixels: np.ndarray, scene: Scene) -> np.ndarray:
        other = pixels if self.background < 0 else palette.COLOURS[self.background]
        return np.where((scene["labels"] == self.label)[..., None], palette.COLOURS[self.colour], other)


@dataclasses.dataclass(frozen=True, eq=False)
class Ramp:
    """A gray view of the scene in a ramp of colours: `ends` [2,3], the colours of black and of white.

    The views are depth, edges, `mask` (solids are white) and `gray` (the luminance of the image).
    """

    view: str
    ends: np.ndarray

    def apply(self, pixels: np.ndarray, scene: Scene) -> np.ndarray:
        gray = np.minimum(scene["labels"], 1) * 255 if self.view == "mask" else scene[self.view][..., 0]
        return palette.ramp(gray, *self.ends)


@dataclasses.dataclass(frozen=True)
class Channels:
    """Permutes the channels (`order` 0..5), then inverts those of the bits of `signs` (0..7, bit 0 is red)."""

    order: int
    signs: int

    def apply(self, pixels: np.ndarray, scene: Scene) -> np.ndarray:
        inverted = np.array([self.signs >> channel & 1 for channel in range(3)], bool)
        return pixels[..., _CHANNEL_ORDERS[self.order]] ^ np.where(inverted, 255, 0).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class HueTurn:
    """Turns the hues by an angle in degrees. The luminance stays, up to the limits of the channels."""

    degrees: float

    def apply(self, pixels: np.ndarray, scene: Scene) -> np.ndarray:
        cos, sin = np.cos(np.deg2rad(self.degrees)), np.sin(np.deg2rad(self.degrees))
        turn = np.array([(1, 0, 0), (0, cos, -sin), (0, sin, cos)])
        matrix = np.linalg.inv(_TO_YIQ) @ turn @ _TO_YIQ
        return images.to_uint8(pixels @ matrix.T / 255)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A symmetry of the square (see `held_out`), then a cyclic shift by whole tiles."""

    symmetry: int
    down: int
    right: int

    def apply(self, pixels: np.ndarray, scene: Scene) -> np.ndarray:
        pixels = np.swapaxes(pixels, 0, 1) if self.symmetry >= held_out.NUM_SYMMETRIES // 2 else pixels
        tile = len(pixels) // palette.TILES
        return np.roll(np.rot90(pixels, self.symmetry), (self.down * tile, self.right * tile), axis=(0, 1))
