"""Selects tasks, numbers of shots and metrics by flags."""

import dataclasses
from collections.abc import Mapping, Sequence

from EasyLM.errors import UserError, choose, prefix_errors
from EasyLM.flags import Flag, Required
from EasyLM.storage import split_paths
from evaluation.tasks import benchmarks, metrics
from evaluation.tasks.metrics import ImageMetric
from evaluation.tasks.tasks import TaskSource, folder_clips, folder_pairs
from tokenizer.builders import views

MAPPING_SHOTS = "0,1,3,7"
_FOLDERS_REQUIRED = Required(
    "unless --clip_dirs or --benchmark is given", lambda config: not (config.clip_dirs or config.benchmark)
)
TASK_FLAGS = {
    "input_dirs": Flag(
        "",
        "Comma list of folders of images, one for each task.",
        required=_FOLDERS_REQUIRED,
    ),
    "target_dirs": Flag(
        "",
        "Comma list of folders of annotations, one for each task. A task has the name of its folder.",
        required=_FOLDERS_REQUIRED,
    ),
    "figures": Flag(
        "", f"Comma list, a metric or nothing for each task: {', '.join(metrics.TASK_METRICS)}, palette_iou."
    ),
    "palette": Flag("", "Colour file of the metric palette_iou: one R G B per line, the background first."),
    "depth_range": Flag(
        "",
        "near,far: distances of white and black for depth_abs_rel; annotations of 16 bits or floating point hold "
        "distances in this unit. Empty: those of rendered scenes.",
    ),
    "clip_dirs": Flag("", "Comma list of folders of clips (folders of frames), one for each task."),
    "benchmark": Flag(
        "",
        "Adds the tasks of a public data set or of synthetic images.",
        choices=("", *benchmarks.BENCHMARKS),
    ),
    **benchmarks.BENCHMARK_FLAGS,
    "n_shots": Flag("", f"Comma list of numbers of shots; empty: 3, for mappings {MAPPING_SHOTS}."),
    "n_context_frames": Flag("", "Comma list of numbers of context frames of clips; empty: n_shots, at least 1."),
}


@dataclasses.dataclass(frozen=True)
class TaskSettings(benchmarks.BenchmarkSettings):
    """Values of `TASK_FLAGS`."""

    input_dirs: str = ""
    target_dirs: str = ""
    figures: str = ""
    palette: str = ""
    depth_range: str = ""
    clip_dirs: str = ""
    benchmark: str = ""
    n_shots: str = ""
    n_context_frames: str = ""


@dataclasses.dataclass(frozen=True)
class TaskSelection:
    """The tasks to measure.

    Attributes:
      shots: numbers of shots, ascending.
      frames: numbers of context frames of clips, ascending.
      metrics: the metrics that a task may name in `TaskSource.metric`.
    """

    sources: Sequence[TaskSource]
    shots: Sequence[int]
    frames: Sequence[int]
    metrics: Mapping[str, ImageMetric]

    def counts(self, source: TaskSource) -> Sequence[int]:
        """Returns the numbers of shots or context frames of a task."""
        return self.frames if source.clips else self.shots


def select_tasks(settings: TaskSettings) -> TaskSelection:
    """Validates the settings and lists the examples of each task. Reads no images.

    Raises:
      UserError: naming the flag and its value, or the file that is missing or invalid.
    """
    task_metrics = _task_metrics(settings)
    _check_folders(settings, task_metrics)
    default_shots = MAPPING_SHOTS if settings.benchmark == "mappings" else "3"
    shots = _parse_counts("n_shots", settings.n_shots or default_shots, least=0)
    frames = sorted({max(1, count) for count in shots})
    if settings.n_context_frames:
        frames = _parse_counts("n_context_frames", settings.n_context_frames, least=1)
    return TaskSelection(_list_sources(settings, max(frames) + 1), shots, frames, task_metrics)


def _task_metrics(settings: TaskSettings) -> Mapping[str, ImageMetric]:
    palette, depth_range = None, None
    if settings.palette:
        with prefix_errors("--palette"):
            palette = metrics.read_palette(settings.palette)
    if settings.depth_range:
        with prefix_errors(f"--depth_range={settings.depth_range}"):
            depth_range = views.parse_depth_range(settings.depth_range)
    return metrics.task_metrics(palette, depth_range)


def _check_folders(settings: TaskSettings, task_metrics: Mapping[str, ImageMetric]) -> None:
    inputs, targets = split_paths(settings.input_dirs), split_paths(settings.target_dirs)
    names = settings.figures.split(",")
    if len(inputs) != len(targets):
        raise UserError(
            f"--target_dirs has {len(targets)} folders, --input_dirs {len(inputs)}: give one of each per task"
        )
    if settings.figures and len(names) != len(inputs):
        raise UserError(
            f"--figures has {len(names)} names, --input_dirs {len(inputs)} folders: give one name per folder"
        )
    for name in filter(None, names):
        if name == "palette_iou" and not settings.palette:
            raise UserError("--figures=palette_iou: --palette is missing")
        choose("--figures", name, task_metrics)
    if settings.benchmark == "mappings" and (settings.input_dirs or settings.clip_dirs):
        raise UserError("--benchmark=mappings has tables and charts of its own: measure folders in a separate run")


def _parse_counts(flag: str, text: str, least: int) -> list[int]:
    try:
        counts = sorted({int(count) for count in text.split(",")})
    except ValueError:
        raise UserError(f"--{flag}={text}: must be a comma list of integers, such as 0,1,3") from None
    if counts[0] < least:
        raise UserError(f"--{flag}={text}: must be at least {least}")
    return counts


def _list_sources(settings: TaskSettings, frames: int) -> list[TaskSource]:
    """Lists the tasks of all flags. Results have one entry per name, so names must be unique."""
    sources: list[tuple[str, TaskSource]] = []  # flag that names the task, task
    if settings.input_dirs:
        inputs, targets = split_paths(settings.input_dirs), split_paths(settings.target_dirs)
        names = settings.figures.split(",") if settings.figures else [""] * len(inputs)
        for input_dir, target_dir, metric in zip(inputs, targets, names, strict=True):
            depth_range = settings.depth_range if metric == "depth_abs_rel" else ""
            sources.append((f"--target_dirs={target_dir}", folder_pairs(input_dir, target_dir, metric, depth_range)))
    if settings.clip_dirs:
        sources += [(f"--clip_dirs={folder}", folder_clips(folder)) for folder in split_paths(settings.clip_dirs)]
    if settings.benchmark:
        benchmark_sources = benchmarks.sources(settings.benchmark, settings, frames)
        sources += [(f"--benchmark={settings.benchmark}", source) for source in benchmark_sources]
    flag_of_name: dict[str, str] = {}
    for flag, source in sources:
        if source.name in flag_of_name:
            raise UserError(
                f"{flag_of_name[source.name]} and {flag}: two tasks named {source.name!r}: rename one, or measure them "
                "in separate runs"
            )
        flag_of_name[source.name] = flag
    return [source for _, source in sources]
