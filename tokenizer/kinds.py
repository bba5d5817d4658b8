"""The kinds of sentences, and all sentences of a build in order, as lists of pictures that nobody has read yet."""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterator

import numpy as np

from EasyLM.errors import UserError
from EasyLM.workers import result
from tokenizer import collect, groups, sentences, videos
from tokenizer.pictures import Picture

_VIDEOS_AHEAD = 16  # whose frames are counted before their turn comes


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a kind of sentence is made of, and by which functions.

    Attributes:
      layout: which files stand together.
      group: which rows make an example.
      order: which picture follows which.
      targets: how many folders --target_dir names: none, one, or (many) one or more.
      videos: the inputs are video files, whose frames are the rows.
      folders: of one input folder, those that hold the pictures of a row.
    """

    layout: collect.Layout
    group: Callable
    order: sentences.Order
    targets: str = "none"
    videos: bool = False
    folders: tuple[str, ...] = ()


KINDS = {
    "images": Kind(collect.by_name, groups.Single, sentences.in_turn),
    "paired": Kind(collect.by_stem, groups.Shots, sentences.in_turn, targets="one"),
    "map_color": Kind(collect.by_stem, groups.Shots, sentences.coloured_labels, targets="one"),
    "multi_dataset": Kind(collect.by_stem, groups.Shots, sentences.shuffled_tasks, targets="many"),
    "colorization": Kind(collect.by_name, groups.Shots, sentences.colorization),
    "inpainting": Kind(collect.by_name, groups.Shots, sentences.inpainting),
    "category": Kind(collect.classes, groups.Classes, sentences.in_turn),
    "frames": Kind(collect.clips, groups.Single, sentences.frames),
    "video": Kind(collect.by_name, groups.Single, sentences.video, videos=True),
    "multi_sequence": Kind(collect.clips, groups.Single, sentences.multi_sequence, targets="many"),
    "co3d": Kind(collect.co3d, groups.Single, sentences.co3d, folders=collect.CO3D),
}


@dataclasses.dataclass(frozen=True)
class Sentence:
    """The pictures of a sentence; `example` and `number` within it say where a build goes on after it."""

    example: int
    number: int
    pictures: list[Picture]


def compose(kind: Kind, group, settings, span: range, workers, problems) -> Iterator[Sentence]:
    """The sentences of examples `span`, counted through all epochs; each follows from the seed and its numbers.

    An input that has no frames, or too few, is added to `problems`.
    """
    for example, rows, times in _examples(kind, group, span, workers):
        epoch, in_epoch = divmod(example, group.examples)
        rng = np.random.default_rng([settings.seed, epoch, in_epoch])
        path = rows[0][0].path
        try:
            if kind.videos:
                rows = [(Picture(path, seconds),) for seconds in result(times, path).tolist()]
            for number, ordered in enumerate(kind.order(rows, rng, settings)):
                yield Sentence(example, number, ordered)
        except sentences.TooShortError as reason:
            path = path if kind.videos else os.path.dirname(path)
            problems.add(path, f"{path}: {reason}")
        except UserError as error:
            problems.add(path, str(error))


def _examples(kind: Kind, group, span: range, workers) -> Iterator[tuple]:
    """(example, rows, future of the frames' times or None), in order; the workers look into videos ahead."""
    ahead: collections.deque = collections.deque()
    for example in span:
        rows = group.rows(*divmod(example, group.examples))
        times = workers.submit(videos.timestamps, rows[0][0].path) if kind.videos else None
        ahead.append((example, rows, times))
        if len(ahead) > (_VIDEOS_AHEAD if kind.videos else 0):
            yield ahead.popleft()
    yield from ahead
