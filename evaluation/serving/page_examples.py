"""Prompts to try a model on, made when they are asked for: rendered scenes, and photographs where they are at hand.

Shapes: P pictures of a prompt, S the side in pixels.
"""

import dataclasses

import numpy as np

from EasyLM.errors import UserError
from tokenizer.builders import views
from tokenizer.synthetic import photos, scenes
from tokenizer.synthetic.seed_ranges import page_example_seed

PAIRS, FRAMES = 3, 7  # both make prompts of seven pictures, which are compiled once


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt, uint8 [P,S,S,3], and what the model is asked for."""

    name: str
    pictures: np.ndarray


def analogies(size: int) -> list[Example]:
    """[picture, annotation, ..., query] of each annotation of rendered scenes, and photographs to colour."""
    found = []
    for number, annotation in enumerate(scenes.ANNOTATIONS):
        drawn = [scenes.scene(page_example_seed(10 * number + i), size) for i in range(PAIRS + 1)]
        found.append(_analogy(annotation, [(one["image"], one[annotation]) for one in drawn]))
    try:
        colours = [photos.crop(page_example_seed(i), size, held_out=True) for i in range(PAIRS + 1)]
    except UserError:  # the packages that carry photographs are not installed
        return found
    return [*found, _analogy("colours", [(views.gray(colour), colour) for colour in colours])]


def _analogy(name: str, pairs: list[tuple[np.ndarray, np.ndarray]]) -> Example:
    return Example(name, np.stack([picture for pair in pairs for picture in pair][:-1]))


def sequences(size: int, count: int = 4) -> list[Example]:
    """Frames of scenes that move."""
    clips = [scenes.clip(page_example_seed(1000 + i), size, FRAMES) for i in range(count)]
    return [Example(f"scene {i + 1}", np.stack([one["image"] for one in clip])) for i, clip in enumerate(clips)]
