"""Example prompts with the true answers: rendered scenes, and photographs if they are installed.

Shapes: see `evaluation.prompting`.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from EasyLM.errors import UserError
from tokenizer.builders import views
from tokenizer.synthetic import layouts, photos, scenes
from tokenizer.synthetic.seed_ranges import page_example_seed

NUM_SHOTS, NUM_FRAMES = 3, 7  # both kinds of prompts have seven images: one length to compile
NUM_TRUE_FRAMES = 8  # that follow a sequence


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """An example prompt.

    Attributes:
      name: its name.
      images: uint8 [P,S,S,3].
      make_truth: returns `truth`. It is called at the first use, because rendering large frames takes seconds.
      is_analogy: whether the images are pairs and a query, not frames.
    """

    name: str
    images: np.ndarray
    make_truth: Callable[[], np.ndarray]
    is_analogy: bool

    @functools.cached_property
    def truth(self) -> np.ndarray:
        """The images that follow, uint8 [F,S,S,3]."""
        return self.make_truth()

    def truth_after(self, prompt: np.ndarray) -> np.ndarray | None:
        """Returns the images that follow a prompt, uint8 [P,S,S,3], if the prompt is this example or a part of it.

        A part has the example's query after any of its pairs, or consecutive frames of the example. None for other
        prompts.
        """
        if self.is_analogy:
            pairs = [self.images[i : i + 2] for i in range(0, len(self.images) - 1, 2)]
            given = [prompt[i : i + 2] for i in range(0, len(prompt) - 1, 2)]
            own = len(prompt) % 2 and np.array_equal(prompt[-1], self.images[-1])
            is_known = own and all(any(np.array_equal(pair, other) for other in pairs) for pair in given)
            return self.truth if is_known else None
        for end in range(len(prompt), len(self.images) + 1):
            if np.array_equal(self.images[end - len(prompt) : end], prompt):
                return np.concatenate([self.images[end:], self.truth])
        return None


def analogies(size: int) -> list[Example]:
    """Returns prompts [image, annotation, ..., query]: annotations of rendered scenes, inpainting and colorization.

    Colorization needs photographs; it is omitted if none are installed.
    """
    examples = []
    for number, annotation in enumerate(scenes.ANNOTATIONS):
        rendered = _scenes(number, size)
        examples.append(_analogy(annotation, [(scene["image"], scene[annotation]) for scene in rendered]))
    number = len(scenes.ANNOTATIONS)
    rng = np.random.default_rng(page_example_seed(10 * number))
    whole = [scene["image"] for scene in _scenes(number, size)]
    examples.append(_analogy("inpainting", [(views.with_hole(image, rng), image) for image in whole]))
    try:
        colours = [photos.crop(page_example_seed(i), size, held_out=True) for i in range(NUM_SHOTS + 1)]
    except UserError:
        return examples
    return [*examples, _analogy("colours", [(views.gray(colour), colour) for colour in colours])]


def _scenes(number: int, size: int) -> list[dict[str, np.ndarray]]:
    return [scenes.scene(page_example_seed(10 * number + i), size) for i in range(NUM_SHOTS + 1)]


def _analogy(name: str, pairs: list[tuple[np.ndarray, np.ndarray]]) -> Example:
    images = np.stack([image for pair in pairs for image in pair])
    return Example(name, images[:-1], lambda: images[-1:], is_analogy=True)


def sequences(size: int, count: int = 4) -> list[Example]:
    """Returns prompts of frames of moving scenes."""
    return [_sequence(f"scene {i + 1}", page_example_seed(1000 + i), size) for i in range(count)]


def _sequence(name: str, seed: int, size: int) -> Example:
    layout = layouts.seeded_layout(seed)

    def frames(begin: int, end: int) -> np.ndarray:
        return np.stack([scenes.render(layout, frame, size)["image"] for frame in range(begin, end)])

    all_frames = NUM_FRAMES + NUM_TRUE_FRAMES
    return Example(name, frames(0, NUM_FRAMES), lambda: frames(NUM_FRAMES, all_frames), is_analogy=False)
