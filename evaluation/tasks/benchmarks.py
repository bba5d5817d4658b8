"""Benchmarks: tasks of public data sets, in their original layout, and of rendered scenes.

rendered                 scenes of tokenizer.synthetic with exact annotations
pascal_segmentation      Pascal-5i (Shaban et al. 2017): the mask of one of a fold's five classes, white on black
pascal_detection         the bounding box of such a class, if it has one object, smaller than half the image
imagenet_colorization    the validation images of ImageNet, gray to colour
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from EasyLM.errors import choose
from EasyLM.flags import Flag
from evaluation.tasks import pascal, rendered
from evaluation.tasks.tasks import Pair, TaskSource
from tokenizer.builders import views
from tokenizer.media import folders, images
from tokenizer.synthetic import SPLITS

BENCHMARK_FLAGS = {
    "data_dir": Flag("", "Folder of the benchmark's data; not needed for rendered."),
    "fold": Flag(
        0, "For pascal_*: the tasks use classes 5 fold + 1 to 5 fold + 5.", least=0, most=pascal.NUM_FOLDS - 1
    ),
    "tasks": Flag("", f"For rendered: comma list of {', '.join(rendered.VIEWS)}; empty: all."),
    "split": Flag("scenes", "For rendered: how scenes differ from training scenes.", choices=tuple(SPLITS)),
    "n_examples": Flag(64, "For rendered: number of scenes to draw queries and shots from.", least=1),
}


@dataclasses.dataclass(frozen=True)
class BenchmarkSettings:
    """Values of `BENCHMARK_FLAGS`.

    Attributes:
      seed: different seeds give different rendered scenes.
    """

    data_dir: str = ""
    fold: int = 0
    tasks: str = ""
    split: str = "scenes"
    n_examples: int = 64
    seed: int = 0


def _rendered(settings: BenchmarkSettings, frames: int) -> list[TaskSource]:
    names: Sequence[str] = [name for name in settings.tasks.split(",") if name] or list(rendered.VIEWS)
    for name in names:
        choose("--tasks", name, rendered.VIEWS)
    return rendered.sources(names, settings.split, settings.seed, settings.n_examples, frames)


def _pascal_segmentation(settings: BenchmarkSettings, frames: int) -> list[TaskSource]:
    return [TaskSource("pascal_segmentation", "mask_iou", pairs=pascal.segmentation(settings.data_dir, settings.fold))]


def _pascal_detection(settings: BenchmarkSettings, frames: int) -> list[TaskSource]:
    return [TaskSource("pascal_detection", "mask_iou", pairs=pascal.detection(settings.data_dir, settings.fold))]


def _imagenet_colorization(settings: BenchmarkSettings, frames: int) -> list[TaskSource]:
    paths = folders.list_images(settings.data_dir, "data_dir")

    def gray(path: images.ImageFile, size: int) -> np.ndarray:
        return views.gray(images.read(path, size))

    pairs = [Pair(partial(gray, path), partial(images.read, path)) for path in paths]
    return [TaskSource("imagenet_colorization", "", pairs=pairs)]


_BENCHMARKS: dict[str, Callable[[BenchmarkSettings, int], list[TaskSource]]] = {
    "rendered": _rendered,
    "pascal_segmentation": _pascal_segmentation,
    "pascal_detection": _pascal_detection,
    "imagenet_colorization": _imagenet_colorization,
}
BENCHMARKS = tuple(_BENCHMARKS)


def sources(name: str, settings: BenchmarkSettings, frames: int) -> list[TaskSource]:
    """Returns the tasks of a benchmark.

    Args:
      frames: frames of a clip, including the answer.

    Raises:
      UserError: naming the flag, or the file that is missing or invalid.
    """
    return _BENCHMARKS[name](settings, frames)
