"""Tables and charts of what a model learns from examples (`in_context`)."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evaluation.tasks import mapping_tasks
from evaluation.tasks.in_context import FIRST_TOKENS, WRONG
from evaluation.tasks.metrics import HIGHER_IS_BETTER
from evaluation.tasks.plots import save_curves
from evaluation.tasks.report import cell
from tokenizer.media import charts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SOURCES = ("model", WRONG, "lookup", "copy_query", "copy_last", "tokenizer")
_TITLES = {"nats": "nats per token", "first_accuracy": f"accuracy of the first {FIRST_TOKENS} tokens"}
_SPLIT_COLOURS = dict(zip(mapping_tasks.SPLITS, ("#4a6fa5", "#c8321e"), strict=True))
# Source -> line style. Lines that need no model are drawn in gray, for the last split.
_MODEL_STYLES: dict[str, Any] = {"model": "solid", WRONG: (0, (2, 1.5))}
_BASELINE_STYLES: dict[str, Any] = {"lookup": (0, (6, 2, 1, 2)), "copy_query": (0, (1, 1)), "tokenizer": "solid"}
Results = Mapping[str, Mapping[str, Any]]


def print_tables(results: Results) -> None:
    """Prints the metrics by number of shots, then the paired differences.

    Args:
      results: the value of `tasks` in the JSON file.
    """
    print(f"{'task':20}{'shots':>6}  {'metric':15}" + "".join(f"{name:>17}" for name in _SOURCES))
    for task, result in results.items():
        for point in result["curve"]:
            for metric in ("nats", "accuracy", "first_accuracy", result["figure"], "mse"):
                if metric in point:
                    cells = "".join(f"{cell(point[metric].get(source)):>17}" for source in _SOURCES)
                    print(f"{task:20}{point['shots']:6}  {metric:15}{cells}")
    print("\ndifferences by query; positive: the examples help")
    for task, result in results.items():
        for comparison, values in result["differences"].items():
            cells = ", ".join(f"{metric} {cell(value)}" for metric, value in values.items())
            print(f"{task:20}  {comparison:14}{cells}")


def plot(results: Results, path: str | os.PathLike) -> None:
    """Writes charts, one column per family: nats, accuracy of the first tokens, and the task's metric or mse.

    Args:
      results: the value of `tasks` in the JSON file; error bars are standard errors.
      path: checked with `charts.check_output`.
    """
    families = list(dict.fromkeys(result["family"] for result in results.values()))
    figure = charts.new_figure(2.5 * len(families) + 1, 7.8)
    axes = figure.subplots(3, len(families), squeeze=False)
    for column, family in enumerate(families):
        of_family = [result for result in results.values() if result["family"] == family]
        for row, metric in enumerate(("nats", "first_accuracy", of_family[0]["figure"] or "mse")):
            _plot_metric(axes[row, column], of_family, metric)
            direction = "higher is better" if metric in HIGHER_IS_BETTER else "lower is better"
            title = f"{_TITLES.get(metric, metric)}\n({direction})"
            axes[row, column].set_title(title if row else f"{family}\n{title}", fontsize=charts.LABEL_SIZE)
        axes[2, column].set_xlabel("shots", fontsize=charts.LABEL_SIZE)
    save_curves(figure, path, columns=max(2, len(families)))


def _plot_metric(axis: "Axes", results: Sequence[Mapping[str, Any]], metric: str) -> None:
    """Draws the curves of a family's splits, and of the answers that need no model for the last split."""
    for result in results:
        for source, style in _MODEL_STYLES.items():
            label = result["split"].replace("_", "-") + (" mappings" if source == "model" else ", wrong examples")
            colour = _SPLIT_COLOURS[result["split"]]
            _plot_source(axis, result["curve"], metric, source, {"color": colour, "linestyle": style, "label": label})
    for source, style in _BASELINE_STYLES.items():
        options = {"color": "#7a7a7a", "linestyle": style, "label": source.replace("_", " "), "linewidth": 1.2}
        _plot_source(axis, results[-1]["curve"], metric, source, options)
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))


def _plot_source(
    axis: "Axes", curve: Sequence[Mapping[str, Any]], metric: str, source: str, options: dict[str, Any]
) -> None:
    points = [(point["shots"], point[metric][source]) for point in curve if source in point.get(metric, {})]
    if points:
        shots, values = zip(*points)
        means, errors = ([value[key] for value in values] for key in ("mean", "standard_error"))
        if source in _BASELINE_STYLES:
            axis.plot(shots, means, **options)
        else:
            axis.errorbar(shots, means, errors, marker="o", markersize=3, linewidth=1.6, capsize=2, **options)
