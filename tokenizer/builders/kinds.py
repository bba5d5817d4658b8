"""The kinds of sentences, and the sentences of a build as ordered image references."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from EasyLM.errors import UnavailableError, UserError
from EasyLM.process_pool import Workers, result
from EasyLM.skipped_inputs import SkippedInputs
from tokenizer.builders import arrangements, file_index, image_ref, samplers
from tokenizer.builders.arrangements import Arrangement, Images, Row
from tokenizer.builders.file_index import FileIndex, Layout
from tokenizer.builders.image_ref import ImageRef
from tokenizer.builders.samplers import Sampler
from tokenizer.builders.schedule import Slot
from tokenizer.builders.settings import SentenceSettings
from tokenizer.sources import reading

_PREFETCHED_VIDEOS = 16  # videos whose frame times are prefetched


@dataclasses.dataclass(frozen=True)
class Kind:
    """How sentences of a kind are made.

    Attributes:
      layout: groups files into rows and items.
      sampler: selects the rows of an example.
      arrangement: orders the images of a sentence.
      targets: the number of target folders: "none", "one", or "many" (one or more).
      is_video: the inputs are video files; their frames are the rows.
      subfolders: names of the folders inside the input folder that hold the images of a row.
      repeats_images: whether sentences of one example share images.
    """

    layout: Layout
    sampler: Callable[[FileIndex, SentenceSettings], Sampler]
    arrangement: Arrangement
    targets: str = "none"
    is_video: bool = False
    subfolders: tuple[str, ...] = ()
    repeats_images: bool = False

    @property
    def takes_keep_list(self) -> bool:
        """Whether its inputs are single images. A clip without some of its frames would not be a clip."""
        return self.layout in (file_index.by_name, file_index.by_stem, file_index.by_class) and not self.is_video


KINDS = {
    "images": Kind(file_index.by_name, samplers.SingleItems, arrangements.row_by_row),
    "paired": Kind(file_index.by_stem, samplers.Shots, arrangements.row_by_row, targets="one"),
    "map_color": Kind(file_index.by_stem, samplers.Shots, arrangements.coloured_labels, targets="one"),
    "multi_dataset": Kind(file_index.by_stem, samplers.Shots, arrangements.shuffled_tasks, targets="many"),
    "colorization": Kind(file_index.by_name, samplers.Shots, arrangements.colorization),
    "inpainting": Kind(file_index.by_name, samplers.Shots, arrangements.inpainting),
    "category": Kind(file_index.by_class, samplers.Classes, arrangements.row_by_row),
    "frames": Kind(file_index.by_clip, samplers.SingleItems, arrangements.frames),
    "video": Kind(file_index.by_name, samplers.SingleItems, arrangements.video, is_video=True, repeats_images=True),
    "multi_sequence": Kind(
        file_index.by_clip, samplers.SingleItems, arrangements.multi_sequence, targets="many", repeats_images=True
    ),
    "co3d": Kind(
        file_index.by_co3d_sequence, samplers.SingleItems, arrangements.co3d, subfolders=file_index.CO3D_SUBFOLDERS
    ),
}


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Inputs of one kind: a key of KINDS, the rows of their examples, and the settings of sampler and arrangement."""

    kind: str
    sampler: Sampler
    settings: SentenceSettings


@dataclasses.dataclass(frozen=True)
class Sentence:
    """The kind and the images of a sentence.

    Its example (numbered in the build) and its number in the example are the point where a build resumes.
    """

    kind: str
    example: int
    number: int
    images: list[ImageRef]


def compose(
    data_sets: Sequence[DataSet], slots: Iterable[Slot], workers: Workers, skipped: SkippedInputs
) -> Iterator[Sentence]:
    """Yields the sentences of examples.

    The settings of the data set, the example and the number determine a sentence. Inputs with too few frames are added
    to `skipped`.
    """
    for slot, rows, scene_times in _rows(data_sets, slots, workers):
        data_set = data_sets[slot.data_set]
        kind, settings = KINDS[data_set.kind], data_set.settings
        epoch, example_of_epoch = divmod(slot.example, data_set.sampler.num_examples)
        rng = np.random.default_rng([settings.seed, epoch, example_of_epoch])
        first = rows[0][0]
        try:
            scenes = [rows]
            if kind.is_video:
                scenes = [_frames(first, times_n) for times_n in result(scene_times, first.path)]
            if settings.depth_range:
                scenes = [[_with_depth(row, settings.depth_range) for row in rows]]
            for number, images in enumerate(_arrange(kind.arrangement, scenes, rng, settings)):
                yield Sentence(data_set.kind, slot.number, number, images)
        except arrangements.UnsuitableClipError as error:
            path = first.path if kind.is_video else reading.folder_of(first.path)
            skipped.add(path, f"{path}: {error}")
        except UnavailableError:
            raise
        except UserError as error:
            skipped.add(first.path, str(error))


def _frames(video: ImageRef, times_n: np.ndarray) -> list[Row]:
    return [(video._replace(seconds=seconds),) for seconds in times_n.tolist()]


def _arrange(
    arrangement: Arrangement, scenes: Sequence[list[Row]], rng: np.random.Generator, settings: SentenceSettings
) -> Iterator[Images]:
    """Yields the images of the sentences of all scenes. Leaves out scenes that are too short.

    Raises:
      UnsuitableClipError: if there is no sentence: that of the longest scene.
    """
    errors = []
    for rows in scenes:
        try:
            yield from arrangement(rows, rng, settings)
        except arrangements.UnsuitableClipError as error:
            errors.append((len(rows), error))
    if len(errors) == len(scenes):
        raise max(errors, key=lambda sized_error: sized_error[0])[1]


def _with_depth(row: Row, depth_range: str) -> Row:
    """Returns the row with the view `depth` for its annotations."""
    return row[0], *(annotation._replace(view="depth", argument=depth_range) for annotation in row[1:])


def _rows(
    data_sets: Sequence[DataSet], slots: Iterable[Slot], workers: Workers
) -> Iterator[tuple[Slot, list[Row], Any]]:
    """Yields (slot, rows, future of the frame times of a video's scenes or None). Prefetches frame times."""
    prefetched: collections.deque = collections.deque()
    most = _PREFETCHED_VIDEOS if any(KINDS[data_set.kind].is_video for data_set in data_sets) else 0
    for slot in slots:
        data_set = data_sets[slot.data_set]
        rows = data_set.sampler.rows(*divmod(slot.example, data_set.sampler.num_examples))
        scene_times = None
        if KINDS[data_set.kind].is_video:
            scene_times = workers.submit(image_ref.scenes, rows[0][0], data_set.settings.split_at_cuts)
        prefetched.append((slot, rows, scene_times))
        if len(prefetched) > most:
            yield prefetched.popleft()
    yield from prefetched
