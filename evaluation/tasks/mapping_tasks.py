"""The benchmark of mappings: tasks whose mapping is drawn anew for each query, so that only its shots define it.

A task is a family of `tokenizer.mappings` in a split: "seen" mappings consist of entries that occur in
training, "held_out" mappings of entries that do not. Each query has its own mapping and its own scenes, so the queries
are independent. Wrong shots have the inputs of the shots, and the answers of another mapping.

Shapes: Q queries, P pairs of a prompt (K shots, then the query), S the side in pixels.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from EasyLM.errors import UserError
from EasyLM.progress import progress
from evaluation.tasks.prompt_layout import PromptLayout
from evaluation.tasks.tasks import Task, TaskSource
from tokenizer.mappings import mappings, steps
from tokenizer.mappings.mappings import Mapping
from tokenizer.synthetic import scenes, seed_ranges

SPLITS = (mappings.SEEN, mappings.HELD_OUT)
# Family -> its metric besides mse.
FAMILIES = {
    "mosaic": "colour_iou",
    "recolour": "colour_iou",
    "marks": "colour_iou",
    "channels": "",
    "geometry": "",
    "ramps": "",
    "composed": "",
}
_CANDIDATES_PER_PAIR = 3  # scenes among which those that show a class are chosen
_SCENES_PER_QUERY = 256  # scene seeds of a query; most are not used
MOST_QUERIES = seed_ranges.SEEDS_PER_BLOCK // _SCENES_PER_QUERY


@dataclasses.dataclass(frozen=True)
class MappingTask(Task):
    """The prompts of a task of mappings.

    Attributes:
      family: a key of `FAMILIES`.
      split: a member of `SPLITS`.
      wrong: the same prompts with wrong annotations.
      keys_QPSS3: images in which the colour of a pixel determines its colour in the answer, uint8; None: there are
        none, because the mapping does not treat each pixel by itself.
    """

    family: str
    split: str
    wrong: PromptLayout
    keys_QPSS3: np.ndarray | None  # noqa: N815


def sources(families: Sequence[str], splits: Sequence[str], scene_split: str, seed: int) -> list[TaskSource]:
    """Returns the task of each family in each split.

    Args:
      families: keys of `FAMILIES`.
      splits: members of `SPLITS`.
      scene_split: a key of `SPLITS` of tokenizer.synthetic.
      seed: different seeds give different mappings and scenes.
    """
    return [
        TaskSource(
            f"{family}_{split}",
            FAMILIES[family],
            load=functools.partial(_load, family, split, scene_split, seed),
        )
        for family in families
        for split in splits
    ]


class Prompt(NamedTuple):
    """The pairs of a prompt: inputs, annotations and wrong annotations, keys or None; each uint8 [P,S,S,3]."""

    inputs: np.ndarray
    answers: np.ndarray
    wrong: np.ndarray
    keys: np.ndarray | None


def _load(family: str, split: str, scene_split: str, seed: int, shots: int, queries: int, side: int) -> MappingTask:
    """Draws the prompts of a task. Query i depends on the seed and on i only; more shots come before fewer shots."""
    if queries > MOST_QUERIES:
        raise UserError(f"--n_queries={queries}: the mappings of a seed have at most {MOST_QUERIES} queries")
    first_seeds = seed_ranges.benchmark_seeds(seed, queries * _SCENES_PER_QUERY)[::_SCENES_PER_QUERY]
    description = f"{family}_{split}: scenes"
    prompts = [
        _prompt(*draw_mappings(family, split, first), scene_split, first, shots + 1, side)
        for first in progress(first_seeds, desc=description, unit="query")
    ]
    images = [np.stack([prompt.inputs, prompt.answers, prompt.wrong], axis=1) for prompt in prompts]
    pixels = np.stack(images)  # [Q,P,3,S,S,3]
    keys = [prompt.keys for prompt in prompts if prompt.keys is not None]  # of all prompts, or of none
    indices_QP3 = np.arange(pixels.size // (3 * side * side)).reshape(pixels.shape[:3])

    def layout(answer: int) -> PromptLayout:
        return PromptLayout(indices_QP3[:, :-1, [0, answer]], indices_QP3[:, -1, :1], indices_QP3[:, -1, 1])

    return MappingTask(
        f"{family}_{split}",
        FAMILIES[family],
        pixels.reshape(-1, side, side, 3).astype(np.float32) / 255,
        layout(answer=1),
        family,
        split,
        wrong=layout(answer=2),
        keys_QPSS3=np.stack(keys) if keys else None,
    )


def draw_mappings(family: str, split: str, seed: int) -> tuple[Mapping, Mapping]:
    """Draws the mapping of a query, and the mapping of its wrong examples."""
    rng = np.random.default_rng([seed, list(FAMILIES).index(family), SPLITS.index(split), 41])
    mapping = mappings.draw(rng, family, split)
    return mapping, mappings.draw_other(rng, mapping, split)


def _prompt(mapping: Mapping, other: Mapping, scene_split: str, first_seed: int, pairs: int, side: int) -> Prompt:
    """Makes the pairs of a prompt. Shots are made last to first, so that more shots do not change fewer shots."""
    numbers = list(range(first_seed, first_seed + pairs))
    if mapping.label:  # scenes that show the class, if there are enough
        candidates = range(first_seed, first_seed + _CANDIDATES_PER_PAIR * pairs)
        labels = [_scene(number, side, scene_split)["labels"] for number in candidates]
        numbers = sorted(candidates, key=lambda number: not (labels[number - first_seed] == mapping.label).any())[
            :pairs
        ]
    made = []
    for number in numbers:
        scene = _scene(number, side, scene_split)
        source, answer = mapping.pair(scene, np.random.default_rng([number, 43]), side)
        _, wrong = other.pair(scene, np.random.default_rng([number, 43]), side)
        made.append((source, answer, wrong, _key(mapping, source, scene)))
    inputs, answers, wrongs, keys = zip(*made[::-1])
    return Prompt(np.stack(inputs), np.stack(answers), np.stack(wrongs), None if keys[0] is None else np.stack(keys))


def _key(mapping: Mapping, source: np.ndarray, scene: steps.Scene) -> np.ndarray | None:
    """Returns the key image of a pair, see `MappingTask`."""
    if mapping.family == "mosaic":
        return source
    (step, *_) = mapping.steps
    if mapping.family == "recolour":
        return scene["segmentation"]
    if mapping.family == "ramps":
        assert isinstance(step, steps.Ramp)
        return dataclasses.replace(step, ends=np.array([(0, 0, 0), (255, 255, 255)])).apply(source, scene)
    return None


@functools.lru_cache(maxsize=4096)
def _scene(seed: int, side: int, split: str) -> dict[str, np.ndarray]:
    return steps.with_views(scenes.scene(seed, side, split))
