"""Benchmarks: tasks of public data sets, in their original layout, and of synthetic images.

rendered                 scenes of tokenizer.synthetic with exact annotations
mappings                 mappings of tokenizer.mappings, another one for each query
pascal_segmentation      Pascal-5i (Shaban et al. 2017): the mask of one of a fold's five classes, white on black
pascal_detection         the bounding box of such a class, if it has one object, smaller than half the image
imagenet_colorization    the validation images of ImageNet, gray to colour
"""

import dataclasses
from collections.abc import Callable, Collection
from functools import partial

import numpy as np

from EasyLM.errors import choose
from EasyLM.flags import Flag
from evaluation.tasks import mapping_tasks, pascal, rendered
from evaluation.tasks.tasks import Pair, TaskSource
from tokenizer.builders import views
from tokenizer.media import folders, images
from tokenizer.synthetic import SPLITS

BENCHMARK_FLAGS = {
    "data_dir": Flag("", "Folder of the benchmark's data; not needed for rendered and mappings."),
    "fold": Flag(
        0, "For pascal_*: the tasks use the classes 5 * fold + 1 to 5 * fold + 5.", least=0, most=pascal.NUM_FOLDS - 1
    ),
    "tasks": Flag(
        "",
        f"For rendered: comma list of {', '.join(rendered.VIEWS)}; for mappings: of "
        f"{', '.join(mapping_tasks.FAMILIES)}; empty: all.",
    ),
    "split": Flag(
        "scenes", "For rendered and mappings: how scenes differ from training scenes.", choices=tuple(SPLITS)
    ),
    "mapping_splits": Flag(
        ",".join(mapping_tasks.SPLITS),
        f"For mappings: comma list of {', '.join(mapping_tasks.SPLITS)}: mappings of entries that training uses or "
        "does not use.",
    ),
    "n_examples": Flag(64, "For rendered: number of scenes to draw queries and shots from.", least=1),
}


@dataclasses.dataclass(frozen=True)
class BenchmarkSettings:
    """Values of `BENCHMARK_FLAGS`.

    Attributes:
      seed: different seeds give different rendered scenes and mappings.
    """

    data_dir: str = ""
    fold: int = 0
    tasks: str = ""
    split: str = "scenes"
    mapping_splits: str = ",".join(mapping_tasks.SPLITS)
    n_examples: int = 64
    seed: int = 0


def _rendered(settings: BenchmarkSettings, frames: int) -> list[TaskSource]:
    names = _choose_names("tasks", settings.tasks, rendered.VIEWS)
    return rendered.sources(names, settings.split, settings.seed, settings.n_examples, frames)


def _mappings(settings: BenchmarkSettings, frames: int) -> list[TaskSource]:
    families = _choose_names("tasks", settings.tasks, mapping_tasks.FAMILIES)
    splits = _choose_names("mapping_splits", settings.mapping_splits, mapping_tasks.SPLITS)
    return mapping_tasks.sources(families, splits, settings.split, settings.seed)


def _choose_names(flag: str, text: str, names: Collection[str]) -> list[str]:
    """Returns the names of a comma list; an empty list means all."""
    chosen = [name for name in text.split(",") if name] or list(names)
    for name in chosen:
        choose(f"--{flag}", name, names)
    return chosen


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
    "mappings": _mappings,
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
