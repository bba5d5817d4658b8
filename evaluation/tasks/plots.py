"""Curves over the number of shots, drawn with matplotlib."""

from evaluation.tasks.metrics import HIGHER_IS_BETTER
from tokenizer.media import charts

_MODEL, _UNIGRAM = "#c8321e", "#7a4fa5"
_LINES = {
    "copy_query": ("#7a7a7a", (0, (1, 1))),
    "copy_last": ("#4a6fa5", (0, (4, 2))),
    "mean_annotation": ("#3f8f5b", (0, (6, 2, 1, 2))),
    "tokenizer": ("#b9a06a", "solid"),
}


def curves(results: dict, path: str) -> None:
    """Writes a chart: for each task a column, perplexity above and the task's own figure (or the squared error) below.

    Args:
      results: the `tasks` of fewshot's JSON; bars are standard errors.
      path: checked with `charts.check_output`.
    """
    figure = charts.new_figure(2.5 * len(results) + 1, 5.4)
    axes = figure.subplots(2, len(results), squeeze=False)
    for column, (name, result) in enumerate(results.items()):
        _perplexity(axes[0, column], result["curve"])
        judged = result["figure"] or "mse"
        _figure(axes[1, column], result["curve"], judged)
        axes[0, column].set_title(name, fontsize=11)
        axes[1, column].set_xlabel(result["counts"], fontsize=9)
        arrow = "higher is better" if judged in HIGHER_IS_BETTER else "lower is better"
        axes[1, column].set_title(f"{judged} ({arrow})", fontsize=8)
    axes[0, 0].set_ylabel("perplexity", fontsize=9)
    handles = {}
    for axis in axes.flat:
        charts.style(axis)
        axis.xaxis.get_major_locator().set_params(integer=True)
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False
    )
    charts.save(figure, path)


def _perplexity(axis, curve: list[dict]) -> None:
    shots = [point["shots"] for point in curve]
    _line(axis, shots, [point["perplexity"] for point in curve], "model")
    unigram = [point["unigram_perplexity"]["mean"] for point in curve]
    axis.plot(shots, unigram, linestyle=(0, (1, 1)), color=_UNIGRAM, label="unigram", linewidth=1.4)
    axis.set_yscale("log")
    axis.minorticks_off()
    axis.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axis.yaxis.set_major_formatter("{x:g}")


def _figure(axis, curve: list[dict], judged: str) -> None:
    for name, (colour, style) in _LINES.items():
        points = [(point["shots"], point[judged][name]["mean"]) for point in curve if name in point[judged]]
        if points:
            axis.plot(*zip(*points), color=colour, linestyle=style, label=name.replace("_", " "), linewidth=1.4)
    _line(axis, [point["shots"] for point in curve], [point[judged]["model"] for point in curve], "model")
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))


def _line(axis, shots: list[int], values: list[dict], label: str) -> None:
    means, errors = ([value[key] for value in values] for key in ("mean", "standard_error"))
    axis.errorbar(shots, means, errors, color=_MODEL, label=label, marker="o", markersize=4, linewidth=2, capsize=2)
