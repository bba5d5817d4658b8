"""The rendered benchmark: tasks on scenes whose seeds are reserved for evaluation."""

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from evaluation.tasks.tasks import ImageLoader, Pair, TaskSource
from tokenizer.builders import views
from tokenizer.synthetic import scenes, seed_ranges

# (the images of a scene, random number generator) -> an image of a prompt
View = Callable[[Mapping[str, np.ndarray], np.random.Generator], np.ndarray]


def _annotation(name: str) -> View:
    return lambda scene, rng: scene[name]


_IMAGE = _annotation("image")

# Task -> views of the image and of the annotation. None: the task is to predict the next frame of a clip.
VIEWS: dict[str, tuple[View, View] | None] = {
    "segmentation": (_IMAGE, _annotation("segmentation")),
    "depth": (_IMAGE, _annotation("depth")),
    "normals": (_IMAGE, _annotation("normals")),
    "edges": (_IMAGE, _annotation("edges")),
    "colorization": (lambda scene, rng: views.gray(scene["image"]), _IMAGE),
    "inpainting": (lambda scene, rng: views.with_hole(scene["image"], rng), _IMAGE),
    "rotation": (_IMAGE, lambda scene, rng: np.rot90(scene["image"])),  # by 90 degrees, counterclockwise
    "frames": None,
}
_METRICS = {
    "segmentation": "scene_iou",
    "depth": "depth_abs_rel",
    "normals": "normal_degrees",
    "edges": "edge_f_score",
}


def sources(names: Sequence[str], split: str, seed: int, num_examples: int, frames: int) -> list[TaskSource]:
    """Returns tasks on the same rendered scenes.

    Args:
      names: keys of `VIEWS`.
      split: a key of `SPLITS` of tokenizer.synthetic.
      seed: different seeds give different scenes.
      num_examples: number of scenes of a task.
      frames: frames of a clip, including the answer.
    """
    seeds = seed_ranges.benchmark_seeds(seed, num_examples)
    tasks = []
    for name in names:
        pair_views, metric = VIEWS[name], _METRICS.get(name, "")
        if pair_views is None:
            tasks.append(TaskSource(name, metric, clips=[_clip_loaders(scene, split, frames) for scene in seeds]))
        else:
            image, annotation = pair_views
            pairs = [
                Pair(partial(_view, image, scene, split), partial(_view, annotation, scene, split)) for scene in seeds
            ]
            tasks.append(TaskSource(name, metric, pairs=pairs))
    return tasks


def _clip_loaders(seed: int, split: str, frames: int) -> list[ImageLoader]:
    return [partial(_frame, seed, split, frames, index) for index in range(frames)]


@functools.lru_cache(maxsize=4096)
def _scene(seed: int, size: int, split: str) -> dict[str, np.ndarray]:
    return scenes.scene(seed, size, split)


@functools.lru_cache(maxsize=512)
def _clip(seed: int, size: int, frames: int, split: str) -> list[np.ndarray]:
    return [frame["image"] for frame in scenes.clip(seed, size, frames, split)]


def _frame(seed: int, split: str, frames: int, index: int, size: int) -> np.ndarray:
    return _clip(seed, size, frames, split)[index]


def _view(view: View, seed: int, split: str, size: int) -> np.ndarray:
    return view(_scene(seed, size, split), np.random.default_rng([seed, 5]))
