"""Mappings from images to images that are drawn anew for each sentence, so that only its examples define them.

`draw` returns a random mapping of a family. All pairs of a sentence have the same mapping. The
distance of a mapping from a copy, or from the usual annotation, is uniform: k of n colours are exchanged, k of the
classes have a new colour. The tasks of the rendered benchmark are families with one mapping each.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tokenizer.mappings import held_out, steps
from tokenizer.mappings.steps import Scene, Source, Step
from tokenizer.synthetic import palette

TRAIN, SEEN, HELD_OUT = SPLITS = ("train", "seen", "held_out")

_TRAINED_LABELS = 5  # the background and the shapes of training scenes
_FEWEST_COLOURS = 4  # of a mosaic
_LEAST_HUE_TURN = 30.0  # degrees, of a mapping that is not a copy
_ATTEMPTS = 10_000  # to draw colours that can be exchanged, or another mapping; about 10 are needed
_USUAL_ENDS = np.array([(0, 0, 0), (255, 255, 255)], np.uint8)  # of ramps
_IMAGE = steps.View("image")


@dataclasses.dataclass(frozen=True)
class Mapping:
    """A mapping of a family.

    Attributes:
      family: a key of `FAMILIES`.
      source: makes the input image of a pair.
      steps: make the answer from the input, one after the other.
      label: the class that the mapping is about, so that most scenes should show it; 0: none.
    """

    family: str
    source: Source
    steps: tuple[Step, ...]
    label: int = 0

    def pair(self, scene: Scene, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns an input and its answer, uint8 [size,size,3].

        Args:
          scene: images of `scenes.scene` with those of `steps.with_views`. Mosaics do not use it.
          rng: of the tiles of a mosaic, or of the place of a hole.
        """
        source = pixels = self.source.draw(scene, rng, size)
        for step in self.steps:
            pixels = step.apply(pixels, scene)
        return source, pixels

    def views(self) -> tuple[str, str]:
        """Returns which views of the scene the input and the answer are; empty for other images."""
        last = self.steps[-1]
        return tuple(part.name if isinstance(part, steps.View) else "" for part in (self.source, last))  # type: ignore[return-value]

    def describe(self) -> dict[str, Any]:
        """Returns the mapping as JSON values: its source and its steps, each with its type and settings."""
        return {"source": _describe(self.source), "steps": [_describe(step) for step in self.steps]}


def _describe(part: Source | Step) -> dict[str, Any]:
    values = dataclasses.asdict(part)  # type: ignore[call-overload]
    values = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}
    return {"type": type(part).__name__, **values}


def draw(rng: np.random.Generator, family: str, split: str = TRAIN) -> Mapping:
    """Draws a mapping.

    Args:
      family: a key of `FAMILIES`.
      split: "train" for training sentences. For a benchmark: "seen" and "held_out", whose mappings change all that they
        can (all colours, all classes), by entries of the tables of `held_out` that training may use or may not use.
        A held-out composition consists of trained mappings. A task of the rendered benchmark has no splits.
    """
    assert split in SPLITS, split
    return FAMILIES[family](rng, split)


def draw_other(rng: np.random.Generator, mapping: Mapping, split: str) -> Mapping:
    """Draws another mapping with the same source and the same types of steps, for wrong examples.

    A mosaic of few colours may have no other held-out exchange. Therefore the other exchange can have any pairs of
    colours except those of the given one.

    Args:
      split: that of the given mapping, "seen" or "held_out". Mappings for training can be copies, which have no other.
    """
    assert split != TRAIN
    for _ in range(_ATTEMPTS):
        other = draw(rng, mapping.family, split)
        if [type(step) for step in other.steps] != [type(step) for step in mapping.steps]:
            continue
        given, first = mapping.steps[0], other.steps[0]
        if isinstance(given, steps.Exchange):
            first = steps.Exchange(given.colours, _other_images(rng, given))
        other = dataclasses.replace(other, source=mapping.source, steps=(first, *other.steps[1:]))
        if other.describe() != mapping.describe():
            return other
    raise AssertionError(f"no other mapping of {mapping.family} in {_ATTEMPTS} attempts")


def _other_images(rng: np.random.Generator, exchange: steps.Exchange) -> np.ndarray:
    """Draws an exchange of the same colours [k] in which each has another image, and none its own colour."""
    allowed = ~np.eye(held_out.NUM_COLOURS, dtype=bool)
    allowed[exchange.colours, exchange.images] = False
    images = _exchange(rng, exchange.colours, allowed)
    assert images is not None  # from three colours on, if no colour is its own image
    return images


def _allowed(table: np.ndarray, split: str) -> np.ndarray:
    """Returns the entries of a table of `held_out` that mappings of a split use."""
    return table if split == HELD_OUT else ~table


def _draw_count(rng: np.random.Generator, most: int, split: str) -> int:
    """Draws how much of a mapping differs from the usual one."""
    return int(rng.integers(most + 1)) if split == TRAIN else most


def _mosaic(rng: np.random.Generator, split: str) -> Mapping:
    """k of the n colours of a mosaic are exchanged. For k = 0 the answer is a copy."""
    n = int(rng.integers(_FEWEST_COLOURS, held_out.NUM_COLOURS + 1))
    k = _draw_count(rng, n, split)
    allowed = _allowed(held_out.COLOUR_PAIRS, split) & ~np.eye(held_out.NUM_COLOURS, dtype=bool)
    for _ in range(_ATTEMPTS):
        colours = rng.permutation(held_out.NUM_COLOURS)[:n]
        exchanged = colours[: k if k > 1 else 0]
        images = _exchange(rng, exchanged, allowed)
        if images is not None:
            return Mapping("mosaic", steps.Mosaic(np.sort(colours)), (steps.Exchange(exchanged, images),))
    raise AssertionError(f"no exchange of {k} colours in {_ATTEMPTS} attempts")


def _exchange(rng: np.random.Generator, colours: np.ndarray, allowed: np.ndarray) -> np.ndarray | None:
    """Draws a permutation of colours [k] with allowed pairs (colour, image) only; None if there is none.

    The permutation is the assignment of the least total cost, with a random cost for each pair.
    """
    from scipy.optimize import linear_sum_assignment  # here: it would be a quarter of each evaluation's start

    costs = np.where(allowed[np.ix_(colours, colours)], 0.0, len(colours)) + rng.random((len(colours),) * 2)
    images = colours[linear_sum_assignment(costs)[1]]
    return images if allowed[colours, images].all() else None


def _recolour(rng: np.random.Generator, split: str) -> Mapping:
    """A segmentation in which k of the classes, the background included, have new colours."""
    labels = _TRAINED_LABELS if split == TRAIN else held_out.NUM_LABELS
    colours, used = steps.USUAL_COLOURS.copy(), np.zeros(held_out.NUM_COLOURS, bool)
    allowed = _allowed(held_out.CLASS_COLOURS, split)
    for label in rng.permutation(labels)[: _draw_count(rng, labels, split)]:
        colour = rng.choice(np.flatnonzero(allowed[label] & ~used))
        used[colour] = True
        colours[label] = palette.COLOURS[colour]
    return Mapping("recolour", _IMAGE, (steps.Recolour(colours),))


def _marks(rng: np.random.Generator, split: str) -> Mapping:
    """A class is marked in a colour: on the image, or before a background of another colour."""
    label = int(rng.integers(1, _TRAINED_LABELS))
    colour = int(rng.choice(np.flatnonzero(_allowed(held_out.CLASS_COLOURS, split)[label])))
    background = -1
    if rng.random() < 0.5:
        background = (colour + int(rng.integers(1, held_out.NUM_COLOURS))) % held_out.NUM_COLOURS
    return Mapping("marks", _IMAGE, (steps.Mark(label, colour, background),), label)


def _channels(rng: np.random.Generator, split: str) -> Mapping:
    """The channels of a scene or mosaic are permuted and inverted, or its hues turned."""
    source = _IMAGE if rng.random() < 0.5 else _any_mosaic(rng)
    return Mapping("channels", source, (_channel_step(rng, split),))


def _channel_step(rng: np.random.Generator, split: str) -> Step:
    if rng.random() < 0.5:
        allowed = _allowed(held_out.CHANNELS, split)
        if split == SEEN:
            allowed = allowed & (np.arange(allowed.size).reshape(allowed.shape) > 0)  # no copy
        order, signs = np.argwhere(allowed)[rng.integers(np.count_nonzero(allowed))]
        return steps.Channels(int(order), int(signs))
    first, end = held_out.HUE_SECTOR
    if split == HELD_OUT:
        return steps.HueTurn(float(rng.uniform(first, end)))
    least = _LEAST_HUE_TURN if split == SEEN else 0.0
    return steps.HueTurn(float(rng.uniform(end + least, first + 360 - least) % 360))


def _geometry(rng: np.random.Generator, split: str) -> Mapping:
    """A scene, mosaic or segmentation is mirrored, turned and shifted."""
    source = (_IMAGE, steps.View("segmentation"), _any_mosaic(rng))[rng.integers(3)]
    return Mapping("geometry", source, (_geometry_step(rng, split, held_out.GEOMETRIES),))


def _geometry_step(rng: np.random.Generator, split: str, table: np.ndarray) -> steps.Geometry:
    """Draws a geometry. Half of the shifts are zero, a quarter are along one axis."""
    allowed = _allowed(table, split)
    while True:
        symmetry = int(rng.integers(held_out.NUM_SYMMETRIES))
        shift = rng.integers(palette.TILES, size=2) * ([(0, 0)] * 4 + [(1, 1)] * 2 + [(0, 1), (1, 0)])[rng.integers(8)]
        is_copy = (symmetry, *shift) == (held_out.IDENTITY, 0, 0)
        if allowed[symmetry, shift[0], shift[1]] and not (is_copy and split == SEEN):
            return steps.Geometry(symmetry, int(shift[0]), int(shift[1]))


def _ramps(rng: np.random.Generator, split: str) -> Mapping:
    """Depth, edges, the mask of all solids or the luminance in a ramp; k of its two ends have new colours."""
    allowed = _allowed(held_out.COLOUR_PAIRS, split) & ~np.eye(held_out.NUM_COLOURS, dtype=bool)
    low, high = np.argwhere(allowed)[rng.integers(np.count_nonzero(allowed))]
    ends = _USUAL_ENDS.copy()
    for end in rng.permutation(2)[: _draw_count(rng, 2, split)]:
        ends[end] = palette.COLOURS[(low, high)[end]]
    view = ("depth", "edges", "mask", "gray")[rng.integers(4)]
    return Mapping("ramps", _IMAGE, (steps.Ramp(view, ends),))


def _composed(rng: np.random.Generator, split: str) -> Mapping:
    """A mapping of another family, then a geometry or a change of the channels."""
    pairs = [(a, b) for a in _FIRST for b in ("geometry", "channels") if a != b]
    first, second = _choose(rng, [pair for pair in pairs if (pair in held_out.COMPOSITIONS) == (split == HELD_OUT)])
    part_split = TRAIN if split == TRAIN else SEEN
    if second == "channels":
        last = _channel_step(rng, part_split)
    else:
        last = _geometry_step(rng, part_split, held_out.GEOMETRIES_IN_COMPOSITIONS)
        if last.symmetry == held_out.ROTATION:
            part_split = SEEN  # after a copy, it would be the held-out geometry
    mapping = _FIRST[first](rng, part_split)
    return dataclasses.replace(mapping, family="composed", steps=(*mapping.steps, last))


def _photo_color(rng: np.random.Generator, split: str) -> Mapping:
    """A gray photograph to its colours, the true ones in half of the sentences, else with turned hues."""
    turn = () if rng.random() < 0.5 else (steps.HueTurn(float(rng.uniform(0, 360))),)
    return Mapping("photo_color", steps.View("gray"), (_IMAGE, *turn))


def _any_mosaic(rng: np.random.Generator) -> steps.Mosaic:
    n = rng.integers(_FEWEST_COLOURS, held_out.NUM_COLOURS + 1)
    return steps.Mosaic(np.sort(rng.permutation(held_out.NUM_COLOURS)[:n]))


def _choose(rng: np.random.Generator, values: Sequence[Any]) -> Any:
    return values[int(rng.integers(len(values)))]


def _task(name: str, source: Source, answer: str) -> Callable[[np.random.Generator, str], Mapping]:
    """Returns the family of a task: all its sentences have the same mapping."""
    mapping = Mapping(name, source, (steps.View(answer),))
    return lambda rng, split: mapping


_Draw = Callable[[np.random.Generator, str], Mapping]
_FIRST: dict[str, _Draw] = {
    "mosaic": _mosaic,
    "recolour": _recolour,
    "marks": _marks,
    "channels": _channels,
    "ramps": _ramps,
}
NEW_MAPPINGS: dict[str, _Draw] = {**_FIRST, "geometry": _geometry, "composed": _composed}
FAMILIES: dict[str, _Draw] = {
    **NEW_MAPPINGS,
    **{name: _task(name, _IMAGE, name) for name in ("segmentation", "depth", "normals", "edges")},
    "inpainting": _task("inpainting", steps.Hole(), "image"),
    "colorization": _task("colorization", steps.View("gray"), "image"),
    "photo_color": _photo_color,
}
