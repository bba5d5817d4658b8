"""Charts of metrics over the number of shots."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evaluation.tasks.metrics import HIGHER_IS_BETTER
from tokenizer.media import charts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MODEL_COLOUR, _UNIGRAM_COLOUR = "#c8321e", "#7a4fa5"
_BASELINE_STYLES = {
    "copy_query": ("#7a7a7a", (0, (1, 1))),
    "copy_last": ("#4a6fa5", (0, (4, 2))),
    "mean_annotation": ("#3f8f5b", (0, (6, 2, 1, 2))),
    "tokenizer": ("#b9a06a", "solid"),
}
Point = Mapping[str, Any]


def plot_curves(results: Mapping[str, Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Writes charts, one column per task: perplexity in the first row, the task's metric or mse in the second.

    Args:
      results: the `tasks` of fewshot's JSON; error bars are standard errors.
      path: checked with `charts.check_output`.
    """
    figure = charts.new_figure(2.5 * len(results) + 1, 5.4)
    axes = figure.subplots(2, len(results), squeeze=False)
    for column, (name, result) in enumerate(results.items()):
        _plot_perplexity(axes[0, column], result["curve"])
        metric = result["figure"] or "mse"
        _plot_metric(axes[1, column], result["curve"], metric)
        axes[0, column].set_title(name, fontsize=charts.TITLE_SIZE)
        axes[1, column].set_xlabel(result["counts"], fontsize=charts.LABEL_SIZE)
        direction = "higher is better" if metric in HIGHER_IS_BETTER else "lower is better"
        axes[1, column].set_title(f"{metric} ({direction})", fontsize=charts.TICK_SIZE)
    axes[0, 0].set_ylabel("perplexity", fontsize=charts.LABEL_SIZE)
    save_curves(figure, path)


def save_curves(figure: "Figure", path: str | os.PathLike, columns: int = 0) -> None:
    """Styles the axes of curves over a number of shots, adds one legend below them, and writes the file.

    Args:
      columns: of the legend; 0: all labels in one line.
    """
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        charts.style(axis)
        locator: Any = axis.xaxis.get_major_locator()  # a MaxNLocator
        locator.set_params(integer=True)
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=columns or len(handles),
        fontsize=charts.LABEL_SIZE,
        frameon=False,
    )
    charts.save(figure, path)


def _plot_perplexity(axis: "Axes", curve: Sequence[Point]) -> None:
    shots = [point["shots"] for point in curve]
    _plot_model(axis, shots, [point["perplexity"] for point in curve])
    unigram = [point["unigram_perplexity"]["mean"] for point in curve]
    axis.plot(shots, unigram, linestyle=(0, (1, 1)), color=_UNIGRAM_COLOUR, label="unigram", linewidth=1.4)
    axis.set_yscale("log")
    axis.minorticks_off()
    locator: Any = axis.yaxis.get_major_locator()  # a LogLocator
    locator.set_params(subs=(1, 2, 5))
    axis.yaxis.set_major_formatter("{x:g}")


def _plot_metric(axis: "Axes", curve: Sequence[Point], metric: str) -> None:
    for name, (colour, style) in _BASELINE_STYLES.items():
        points = [(point["shots"], point[metric][name]["mean"]) for point in curve if name in point[metric]]
        if points:
            axis.plot(*zip(*points), color=colour, linestyle=style, label=name.replace("_", " "), linewidth=1.4)
    _plot_model(axis, [point["shots"] for point in curve], [point[metric]["model"] for point in curve])
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))


def _plot_model(axis: "Axes", shots: Sequence[int], values: Sequence[Mapping[str, float]]) -> None:
    means, errors = ([value[key] for value in values] for key in ("mean", "standard_error"))
    axis.errorbar(
        shots, means, errors, color=_MODEL_COLOUR, label="model", marker="o", markersize=4, linewidth=2, capsize=2
    )
