"""What a model is asked for: examples of a task, loaded, and the prompts made of them.

Shapes: n pictures, S the side in pixels. Pixels are float32 in [0, 1], RGB, channels last.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from EasyLM.errors import UserError
from evaluation.tasks import prompt_layout
from tokenizer.media import folders, images

Load = Callable[[int], np.ndarray]  # side -> uint8 [S,S,3]


@dataclasses.dataclass(frozen=True)
class Pair:
    """An example; the shots of a query are of its group (of its class, where a task has classes)."""

    input: Load
    target: Load
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a task's examples come from: pairs, or clips whose last frame is asked for.

    Attributes:
      figure: what answers are judged by besides the figures of every task: a name of `metrics.task_figures`, or ''.
    """

    name: str
    figure: str
    pairs: Sequence[Pair] = ()
    clips: Sequence[Sequence[Load]] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """A task with the pictures of its prompts, `pixels` [n,S,S,3], and the prompts as numbers of them."""

    name: str
    figure: str
    pixels: np.ndarray
    prompts: prompt_layout.Prompts

    @property
    def is_clip(self) -> bool:
        return not self.prompts.query_Qq.size

    def captions(self, shots: int) -> list[str]:
        """Of the pictures in a prompt."""
        return ["frame"] * shots if self.is_clip else ["example", "answer"] * shots + ["query"]


def load(source: Source, shots: int, queries: int, seed: int, side: int) -> Task:
    """Chooses up to `queries` of the examples by the seed, and the shots of each, and reads what is needed of them.

    Raises:
      UserError: naming the source, if it has too few examples, or the file that cannot be read.
    """
    if source.clips:
        chosen, loads = _sequences(source, shots, queries, seed)
    else:
        chosen, loads = _analogies(source, shots, queries, seed)
    used = np.unique(np.concatenate([chosen.shown(shots).ravel(), chosen.answer_Q]))
    with ThreadPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(lambda number: loads[number](side), used)))
    renumber = partial(np.searchsorted, used)
    numbered = prompt_layout.Prompts(*(renumber(getattr(chosen, field.name)) for field in dataclasses.fields(chosen)))
    return Task(source.name, source.figure, pixels.astype(np.float32) / 255, numbered)


def _analogies(source: Source, shots: int, queries: int, seed: int) -> tuple[prompt_layout.Prompts, list[Load]]:
    groups = [pair.group for pair in source.pairs]
    sizes = {group: groups.count(group) for group in set(groups)}
    able = [i for i, group in enumerate(groups) if sizes[group] > shots]
    if not able:
        raise UserError(f"{source.name}: {len(groups)} examples, too few for n_shots={shots} and a query")
    loads = [side for pair in source.pairs for side in (pair.input, pair.target)]
    return prompt_layout.analogies(groups, _some(able, queries, seed), shots, seed), loads


def _sequences(source: Source, shots: int, queries: int, seed: int) -> tuple[prompt_layout.Prompts, list[Load]]:
    able = [clip[: shots + 1] for clip in source.clips if len(clip) > shots]
    if not able:
        raise UserError(f"{source.name}: no clip has more than n_context_frames={shots} frames")
    chosen = _some(able, queries, seed)
    return prompt_layout.sequences(len(chosen), shots + 1), [frame for clip in chosen for frame in clip]


def _some(values: list, count: int, seed: int) -> list:
    """Up to `count` of the values, in their order."""
    order = np.random.default_rng([seed, 3]).permutation(len(values))
    return [values[i] for i in sorted(order[:count])]


def folder_pairs(input_dir: str, target_dir: str, figure: str) -> Source:
    """Images and annotations of two folders, matched by stem; the task is named after the second.

    Says how many images have no annotation.

    Raises:
      UserError: naming the flag and the folder.
    """
    sides = [
        folders.by_stem(folders.list_images(directory, flag), directory, flag)
        for directory, flag in ((input_dir, "input_dirs"), (target_dir, "target_dirs"))
    ]
    stems = sorted(sides[0].keys() & sides[1].keys())
    if alone := len(sides[0]) - len(stems):
        print(f"{alone} of {len(sides[0])} pictures of {input_dir} have no annotation in {target_dir} and are left out")
    pairs = [Pair(*(partial(images.read, side[stem]) for side in sides)) for stem in stems]
    return Source(pathlib.Path(target_dir).name, figure, pairs=pairs)


def folder_clips(clip_dir: str) -> Source:
    """Folders of frames anywhere below a folder: a clip each. Numbers in names count as numbers: 2.png before 10.png.

    Raises:
      UserError: naming the flag, if there is no picture.
    """
    clips: dict[pathlib.Path, list[Load]] = {}
    for path in sorted(folders.list_images(clip_dir, "clip_dirs"), key=lambda path: folders.natural_key(path.stem)):
        clips.setdefault(path.parent, []).append(partial(images.read, path))
    return Source(pathlib.Path(clip_dir).name, "", clips=[clips[folder] for folder in sorted(clips)])
