"""Prompts a model with a few examples of each task and measures its answers: `python -m evaluation.fewshot ...`.

A task is a folder of images with a folder of annotations, or a folder of clips (the model predicts the next frame), or
a task of a `--benchmark` (EVAL.md). Several numbers of shots give a curve. All its points have the same queries, and a
prompt with fewer shots uses the last shots of a longer prompt.

The table compares the model with baselines. The baseline of perplexity is the token frequencies (unigram). The
baselines of the other metrics are a copy of the query, a copy of the last annotation (or frame) and the mean
annotation. The true answer, encoded and decoded by the tokenizer, bounds what any model can reach.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from EasyLM.errors import UserError, prefix_errors
from EasyLM.flags import Flag, run, to_dataclass
from EasyLM.storage import check_output, split_paths, write_json
from evaluation.prompting import PROMPTER_FLAGS, GenerationSettings, LargestBatch, Prompter, PrompterSettings
from evaluation.runs import UNFINISHED, Results, open_results
from evaluation.tasks import (
    TASK_FLAGS,
    InContextMeasurement,
    MappingTask,
    Measurement,
    TaskSettings,
    TaskSource,
    in_context,
    in_context_report,
    load_task,
    metrics,
    plots,
    report,
    select_tasks,
)
from evaluation.tasks.selection import TaskSelection
from tokenizer.image_quality import inception, lpips
from tokenizer.media import charts, images

FLAGS = {
    **PROMPTER_FLAGS,
    **TASK_FLAGS,
    "n_queries": Flag(16, "Queries of each task.", least=1),
    "temperature": Flag(0.0, "Sampling temperature; 0: take the most likely token.", least=0),
    "top_p": Flag(1.0, "Sample from the most likely tokens that together have this probability.", above=0, most=1),
    "seed": Flag(0, "Seed for drawing examples and for sampling tokens.", least=0, most=2**31 - 1),
    "batch_size": Flag(8, "Prompts per batch; does not change results.", least=1),
    "lpips_weights": Flag("", "Comma list of files: VGG16 of torchvision and the linear layers of LPIPS. Adds LPIPS."),
    "inception_weights": Flag("", "File of pytorch-fid's InceptionV3. Adds FID over all answers to a task."),
    "output_json": Flag("", "JSON file for the metrics."),
    "output_plot": Flag("", "Image file for charts of the metrics over the number of shots."),
    "output_picture": Flag("", "Image file for a sheet of prompts, generated answers and true answers."),
    "rows_per_task": Flag(2, "Queries of each task shown on the sheet.", least=1),
    "n_answers": Flag(
        8,
        "For mappings: queries of each task whose answers are generated, at 0, 1, 3, 7 and the most shots.",
        least=1,
    ),
}


def main(config: ConfigDict) -> None:
    """Measures every task; prints a table; writes metrics, charts and sheet."""
    selection = select_tasks(to_dataclass(TaskSettings, config))
    generation = GenerationSettings.from_user(config)
    check_outputs(config)
    with open_results(config.output_json and f"{config.output_json}.{UNFINISHED}", dict(config)) as results:
        measure_all(config, selection, generation, results)


def measure_all(config: ConfigDict, selection: TaskSelection, generation: GenerationSettings, results: Results) -> None:
    """Measures the tasks without a result in `results`, prints and writes everything, and discards `results`."""
    image_metrics, network = load_metrics(config)
    longest = max(answer_images(source, max(selection.counts(source)))[1] for source in selection.sources)
    whole = dataclasses.replace(generation, context_images=longest)
    largest = LargestBatch(config.batch_size, longest - 1, whole)
    prompter = Prompter.load(to_dataclass(PrompterSettings, config), largest=largest)
    weight_files = tuple(filter(None, (config.palette, config.inception_weights, *split_paths(config.lpips_weights))))

    tasks_json: dict[str, dict[str, Any]] = {}
    rows = []
    for source in selection.sources:
        counts = selection.counts(source)
        check_length(prompter, source, max(counts))
        task = load_task(source, max(counts), config.n_queries, config.seed, prompter.codec.resolution)
        example = TaskExample(task.name, weight_files, (task.metric, task.digest()))
        if results.missing([example]):
            own_metric = {task.metric: selection.metrics[task.metric]} if task.metric else {}
            settings = prompter, generation, config.batch_size, image_metrics | own_metric
            if isinstance(task, MappingTask):
                curve, answers_QN = InContextMeasurement(*settings, config.n_answers).curve(task, counts)
            else:
                curve, answers_QN = Measurement(*settings, network).curve(task, counts)
            results.add(example, {"curve": curve, "answers": answers_QN[: config.rows_per_task].tolist()})
        tasks_json[task.name] = {
            "queries": len(task.prompts.answer_Q),
            "figure": task.metric,
            "counts": "context frames" if task.is_clip else "shots",
            "curve": results[example]["curve"],
        }
        if isinstance(task, MappingTask):
            tasks_json[task.name] |= in_context.summary(task, results[example]["curve"])
        if config.output_picture:
            answers = prompter.decode(np.array(results[example]["answers"], np.int32))
            rows += report.sheet_rows(task, max(counts), answers)
    (in_context_report.print_tables if config.benchmark == "mappings" else report.print_table)(tasks_json)
    if config.output_json:
        names = ("checkpoint", "benchmark", "split", "n_queries", "temperature", "seed")
        write_json(config.output_json, {"settings": {name: config[name] for name in names}, "tasks": tasks_json})
    if config.output_plot:
        (in_context_report.plot if config.benchmark == "mappings" else plots.plot_curves)(
            tasks_json, config.output_plot
        )
        print(f"wrote {config.output_plot}")
    if config.output_picture:
        images.save(config.output_picture, report.answer_sheet(rows))
        print(f"wrote {config.output_picture}")
    results.discard()


class TaskExample(NamedTuple):
    """A task as an example of `Results`."""

    name: str
    files: tuple[str, ...]
    parameters: tuple[str, ...]


def check_outputs(config: ConfigDict) -> None:
    """Checks that the outputs can be written, before the model is loaded."""
    if config.output_json:
        check_output(config.output_json, "output_json")
    if config.output_picture:
        images.check_output(config.output_picture, "output_picture")
    if config.output_plot:
        charts.check_output(config.output_plot, "output_plot")


def load_metrics(config: ConfigDict) -> tuple[dict[str, metrics.ImageMetric], inception.Inception | None]:
    """Returns the metrics of every task, and the network for FID if `--inception_weights` is given."""
    image_metrics, network = dict(metrics.IMAGE_METRICS), None
    if config.lpips_weights:
        with prefix_errors(f"--lpips_weights={config.lpips_weights}"):
            image_metrics["lpips"] = functools.partial(jax.jit(lpips.distance), lpips.load(config.lpips_weights))
    if config.inception_weights and config.benchmark == "mappings":
        raise UserError("--inception_weights: --benchmark=mappings has no FID")
    if config.inception_weights:
        with prefix_errors(f"--inception_weights={config.inception_weights}"):
            network = inception.Inception(config.inception_weights, config.batch_size)
    return image_metrics, network


def answer_images(source: TaskSource, shots: int) -> tuple[str, int]:
    """Returns the flag that says how long the prompts of a task are, and the images of a prompt with its answer."""
    return ("n_context_frames", shots + 1) if source.clips else ("n_shots", 2 * shots + 2)


def check_length(prompter: Prompter, source: TaskSource, shots: int) -> None:
    """Checks that the longest prompt of a task and its answer fit into the model's context."""
    flag, count = answer_images(source, shots)
    if count > prompter.max_images:
        raise UserError(
            f"--{flag}={shots}: a prompt and its answer are {count} images; the model's longest sequence holds "
            f"{prompter.max_images}"
        )


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
