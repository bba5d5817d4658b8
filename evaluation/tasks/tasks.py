"""Tasks: examples from folders or benchmarks, their prompts and their pixels.

Shapes: n images, S the side in pixels. Pixels are float32 in [0, 1], RGB, channels last.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np

from EasyLM.errors import UserError
from evaluation.tasks.prompt_layout import PromptLayout, analogy_prompts, sequential_prompts
from tokenizer.builders import views
from tokenizer.media import folders, images

ImageLoader = Callable[[int], np.ndarray]  # side -> uint8 [S,S,3]
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Pair:
    """An image and its annotation. Shots have the group of their query, such as its class."""

    input: ImageLoader
    target: ImageLoader
    group: str = ""


@dataclasses.dataclass(frozen=True)
class TaskSource:
    """The examples of a task: pairs, or clips whose last used frame is the answer.

    Attributes:
      metric: key in `metrics.task_metrics` of an additional metric; empty: none.
      load: makes the prompts of a task without pairs and clips: (shots, queries, side) -> `Task`.
    """

    name: str
    metric: str
    pairs: Sequence[Pair] = ()
    clips: Sequence[Sequence[ImageLoader]] = ()
    load: "Callable[[int, int, int], Task] | None" = None


@dataclasses.dataclass(frozen=True)
class Task:
    """The prompts of a task, as indices into `pixels` [n,S,S,3]."""

    name: str
    metric: str
    pixels: np.ndarray
    prompts: PromptLayout

    @property
    def is_clip(self) -> bool:
        """Whether the examples are clips, whose next frame the model generates."""
        return not self.prompts.query_Qq.size

    @property
    def answers(self) -> np.ndarray:
        """The true answers: [Q,S,S,3]."""
        return self.pixels[self.prompts.answer_Q]

    def digest(self) -> str:
        """Returns a fingerprint of the images and prompts."""
        digest = hashlib.blake2b(digest_size=8)
        for array in (self.pixels, *dataclasses.astuple(self.prompts)):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def captions(self, shots: int) -> list[str]:
        """Returns a caption for each image of a prompt."""
        return ["frame"] * shots if self.is_clip else ["example", "answer"] * shots + ["query"]


def load_task(source: TaskSource, shots: int, queries: int, seed: int, side: int) -> Task:
    """Draws up to `queries` queries and the shots of each, and reads the images that the prompts use.

    Args:
      shots: shots, or context frames of a clip.
      side: side of the images, in pixels.

    Raises:
      UserError: naming the task, if it has too few examples, or the file that cannot be read.
    """
    if source.load:
        return source.load(shots, queries, side)
    if source.clips:
        prompts, loaders = _draw_sequences(source, shots, queries, seed)
    else:
        prompts, loaders = _draw_analogies(source, shots, queries, seed)
    used = np.unique(np.concatenate([prompts.images(shots).ravel(), prompts.answer_Q]))
    with ThreadPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(lambda index: loaders[index](side), used)))

    def index_of_used(indices: np.ndarray) -> np.ndarray:
        return np.searchsorted(used, indices)

    reindexed = PromptLayout(*map(index_of_used, (prompts.context_QKG, prompts.query_Qq, prompts.answer_Q)))
    return Task(source.name, source.metric, pixels.astype(np.float32) / 255, reindexed)


def _draw_analogies(source: TaskSource, shots: int, queries: int, seed: int) -> tuple[PromptLayout, list[ImageLoader]]:
    groups = [pair.group for pair in source.pairs]
    sizes = {group: groups.count(group) for group in set(groups)}
    candidates = [i for i, group in enumerate(groups) if sizes[group] > shots]
    if not candidates:
        raise UserError(f"{source.name}: {len(groups)} examples, too few for --n_shots={shots} and a query")
    loaders = [loader for pair in source.pairs for loader in (pair.input, pair.target)]
    return analogy_prompts(groups, _draw(candidates, queries, seed), shots, seed), loaders


def _draw_sequences(source: TaskSource, shots: int, queries: int, seed: int) -> tuple[PromptLayout, list[ImageLoader]]:
    candidates = [clip[: shots + 1] for clip in source.clips if len(clip) > shots]
    if not candidates:
        raise UserError(f"{source.name}: no clip has more than --n_context_frames={shots} frames")
    clips = _draw(candidates, queries, seed)
    return sequential_prompts(len(clips), shots + 1), [frame for clip in clips for frame in clip]


def _draw(values: Sequence[Item], count: int, seed: int) -> list[Item]:
    """Draws up to `count` values, in their original order."""
    order = np.random.default_rng([seed, 3]).permutation(len(values))
    return [values[i] for i in sorted(order[:count])]


def folder_pairs(input_dir: str, target_dir: str, metric: str, depth_range: str = "") -> TaskSource:
    """Pairs the images and annotations of two folders by stem. The task has the name of the second folder.

    Prints the number of images without an annotation.

    Args:
      depth_range: near,far of annotations that are depth maps; see `views.depth`.

    Raises:
      UserError: naming the flag and the folder.
    """
    inputs, targets = (
        folders.by_stem(folders.list_images(directory, flag), directory, flag)
        for directory, flag in ((input_dir, "input_dirs"), (target_dir, "target_dirs"))
    )
    stems = sorted(inputs.keys() & targets.keys())
    if unmatched := len(inputs) - len(stems):
        print(f"skipped {unmatched} of {len(inputs)} images of {input_dir}: no annotation in {target_dir}")

    def read_target(path: pathlib.Path, size: int) -> np.ndarray:
        return (
            views.depth(path, size, *views.parse_depth_range(depth_range)) if depth_range else images.read(path, size)
        )

    pairs = [Pair(partial(images.read, inputs[stem]), partial(read_target, targets[stem])) for stem in stems]
    return TaskSource(pathlib.Path(target_dir).name, metric, pairs=pairs)


def folder_clips(clip_dir: str) -> TaskSource:
    """Returns the clips of a folder: each folder in it with images. Frames are in natural order: 2.png before 10.png.

    Raises:
      UserError: naming the flag, if there is no image.
    """
    clips: dict[pathlib.Path, list[ImageLoader]] = {}
    for path in sorted(folders.list_images(clip_dir, "clip_dirs"), key=lambda path: folders.natural_key(path.stem)):
        clips.setdefault(path.parent, []).append(partial(images.read, path))
    return TaskSource(pathlib.Path(clip_dir).name, "", clips=[clips[folder] for folder in sorted(clips)])
