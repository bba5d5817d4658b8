"""Example prompts for the page: rendered scenes, and photographs if they are installed.

Shapes: see `evaluation.prompting`.
"""

import dataclasses

import numpy as np

from EasyLM.errors import UserError
from tokenizer.builders import views
from tokenizer.synthetic import photos, scenes
from tokenizer.synthetic.seed_ranges import page_example_seed

NUM_SHOTS, NUM_FRAMES = 3, 7  # both kinds of prompts have seven images: one length to compile


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """An example prompt: its name and its images, uint8 [P,S,S,3]."""

    name: str
    images: np.ndarray


def analogies(size: int) -> list[Example]:
    """Returns prompts [image, annotation, ..., query]: one per annotation of rendered scenes, and colourisation.

    Colourisation needs photographs; it is omitted if none are installed.
    """
    examples = []
    for number, annotation in enumerate(scenes.ANNOTATIONS):
        rendered = [scenes.scene(page_example_seed(10 * number + i), size) for i in range(NUM_SHOTS + 1)]
        examples.append(_analogy(annotation, [(scene["image"], scene[annotation]) for scene in rendered]))
    try:
        colours = [photos.crop(page_example_seed(i), size, held_out=True) for i in range(NUM_SHOTS + 1)]
    except UserError:
        return examples
    return [*examples, _analogy("colours", [(views.gray(colour), colour) for colour in colours])]


def _analogy(name: str, pairs: list[tuple[np.ndarray, np.ndarray]]) -> Example:
    return Example(name, np.stack([image for pair in pairs for image in pair][:-1]))


def sequences(size: int, count: int = 4) -> list[Example]:
    """Returns prompts of frames of moving scenes."""
    clips = [scenes.clip(page_example_seed(1000 + i), size, NUM_FRAMES) for i in range(count)]
    return [Example(f"scene {i + 1}", np.stack([frame["image"] for frame in clip])) for i, clip in enumerate(clips)]
