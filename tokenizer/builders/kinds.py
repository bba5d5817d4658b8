"""The kinds of sentences, and all sentences of a build in order, as lists of pictures that nobody has read yet."""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterator

import numpy as np

from EasyLM.errors import UserError
from EasyLM.process_pool import result
from tokenizer.builders import arrangements, file_index, samplers
from tokenizer.builders.image_ref import Picture
from tokenizer.media import videos

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

    layout: file_index.Layout
    group: Callable
    order: arrangements.Order
    targets: str = "none"
    videos: bool = False
    folders: tuple[str, ...] = ()


KINDS = {
    "images": Kind(file_index.by_name, samplers.Single, arrangements.in_turn),
    "paired": Kind(file_index.by_stem, samplers.Shots, arrangements.in_turn, targets="one"),
    "map_color": Kind(file_index.by_stem, samplers.Shots, arrangements.coloured_labels, targets="one"),
    "multi_dataset": Kind(file_index.by_stem, samplers.Shots, arrangements.shuffled_tasks, targets="many"),
    "colorization": Kind(file_index.by_name, samplers.Shots, arrangements.colorization),
    "inpainting": Kind(file_index.by_name, samplers.Shots, arrangements.inpainting),
    "category": Kind(file_index.classes, samplers.Classes, arrangements.in_turn),
    "frames": Kind(file_index.clips, samplers.Single, arrangements.frames),
    "video": Kind(file_index.by_name, samplers.Single, arrangements.video, videos=True),
    "multi_sequence": Kind(file_index.clips, samplers.Single, arrangements.multi_sequence, targets="many"),
    "co3d": Kind(file_index.co3d, samplers.Single, arrangements.co3d, folders=file_index.CO3D),
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
        except arrangements.TooShortError as reason:
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
