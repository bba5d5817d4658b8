"""Prompts a model with a few examples of each task and measures its answers: `python -m evaluation.fewshot ...`.

Tasks are folders of images and their annotations, folders of clips whose next frame is asked for, or a `--benchmark`
(EVAL.md). Several numbers of shots make a curve: the queries stay, and fewer shots are the last of more.

Figures, beside what needs no model: perplexity of the true answer against the tokens' frequencies, and the errors of
the drawn answer against those of a copy of the query, of a copy of the last annotation (or frame), and of the
annotations' mean; the true answer through the tokenizer says what no model can be expected to beat.

Shapes: Q queries, P pictures of a prompt, N tokens of an image, S the side in pixels.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from EasyLM.errors import UserError, choose
from EasyLM.flags import Flag, run, to_dataclass
from EasyLM.models.generate import check_sampling, check_seed
from EasyLM.storage import check_output, write_json
from evaluation.prompting import PROMPTER_FLAGS, GenerationSettings, Prompter, PrompterSettings
from evaluation.runs import UNFINISHED, Results
from evaluation.tasks import benchmarks, contact_sheet, metrics, plots, tasks
from tokenizer.image_quality import FeatureStatistics, frechet_distance, inception, lpips, warn_if_few
from tokenizer.media import charts, images
from tokenizer.synthetic import SPLITS

FLAGS = {
    **PROMPTER_FLAGS,
    "input_dirs": Flag("", "Comma list of folders of images, one for each task."),
    "target_dirs": Flag("", "Comma list of folders of annotations, one for each task; its name is the task's."),
    "figures": Flag("", f"Comma list: what each task is judged by ({', '.join(metrics.FIGURES)}), or nothing between."),
    "palette": Flag("", "File of colours, R G B a line, the background first: the figure palette_iou is of these."),
    "depth_range": Flag("", "near,far: how far white and black are, for depth_abs_rel; empty: as in rendered scenes."),
    "clip_dirs": Flag("", "Comma list of folders of clips (folders of frames), each a task of its own."),
    "benchmark": Flag("", "Tasks that need no folders of yours.", choices=("", *benchmarks.BENCHMARKS)),
    "data_dir": Flag("", "Folder of the benchmark's data; rendered: none."),
    "fold": Flag(0, "pascal_*: the classes 5 fold + 1 to 5 fold + 5 are asked for."),
    "tasks": Flag("", f"rendered: comma list of {', '.join(benchmarks.RENDERED)}; empty: all."),
    "split": Flag("scenes", "rendered: what no training scene has, besides its seed.", choices=tuple(SPLITS)),
    "n_examples": Flag(64, "rendered: scenes to draw queries and shots from."),
    "n_shots": Flag("3", "Comma list: examples before the query."),
    "n_context_frames": Flag("", "Comma list: frames before the one asked for; empty: as n_shots, but at least 1."),
    "n_queries": Flag(16, "Queries of each task."),
    "temperature": Flag(0.0, "Of the sampling; 0: the likeliest token."),
    "top_p": Flag(1.0, "Sample from the likeliest tokens whose probabilities add up to this."),
    "seed": Flag(0, "Of the examples' choice and of the sampling."),
    "batch_size": Flag(8, "Prompts at a time; changes no result."),
    "lpips_weights": Flag("", "Comma list of files: torchvision's VGG16 and the layers of LPIPS. Adds LPIPS."),
    "inception_weights": Flag("", "File of pytorch-fid's InceptionV3. Adds FID, of all answers to a task together."),
    "output_json": Flag("", "Write the figures to this file."),
    "output_plot": Flag("", "Draw the figures over the number of shots to this PNG file."),
    "output_picture": Flag("", "Write a sheet to this PNG file: prompt, answer, truth."),
    "rows_per_task": Flag(2, "Queries of each task on the sheet."),
}


def main(config) -> None:
    """Measures every task, prints a table, writes figures, curves and sheet."""
    judges = metrics.task_figures(config.palette, config.depth_range)
    shots, frames = _check(config, judges)
    sources = _sources(config, max(frames) + 1)
    _check_outputs(config)
    kept = Results(config.output_json and f"{config.output_json}.{UNFINISHED}", dict(config))
    wanted = _figures(config.lpips_weights)
    network = inception.Inception(config.inception_weights, config.batch_size) if config.inception_weights else None
    prompter = Prompter.load(to_dataclass(PrompterSettings, config))
    results, rows = {}, []
    for source in sources:
        counts = frames if source.clips else shots
        _check_length(prompter, source, max(counts))
        task = tasks.load(source, max(counts), config.n_queries, config.seed, prompter.codec.config.resolution)
        case = _case(config, task)
        if kept.missing([case]):
            judged = wanted | ({task.figure: judges[task.figure]} if task.figure else {})
            curve, answers_QN = measure(config, prompter, task, counts, judged, network)
            kept.add(case, {"curve": curve, "answers": answers_QN[: config.rows_per_task].tolist()})
        results[task.name] = {
            "queries": len(task.prompts.answer_Q),
            "figure": task.figure,
            "counts": "context frames" if task.is_clip else "shots",
            "curve": kept[case]["curve"],
        }
        if config.output_picture:
            rows.append((task, max(counts), prompter.decode(np.array(kept[case]["answers"], np.int32))))
    _print_table(results)
    _write(config, results, rows)
    kept.discard()


class Case(NamedTuple):
    """A task as `Results` knows it: by its pictures themselves, wherever they come from."""

    name: str
    files: tuple[str, ...]
    parameters: tuple[str, ...]


def _case(config, task: tasks.Task) -> Case:
    digest = hashlib.blake2b(digest_size=8)
    for array in (task.pixels, *dataclasses.astuple(task.prompts)):
        digest.update(array.tobytes())
    files = (config.palette, config.inception_weights, *config.lpips_weights.split(","))
    return Case(task.name, tuple(filter(None, files)), (task.figure, digest.hexdigest()))


def _check(config, judges: dict[str, Callable]) -> tuple[list[int], list[int]]:
    """The numbers of shots and of frames to measure at."""
    for name in ("n_queries", "batch_size", "n_examples", "rows_per_task"):
        if config[name] < 1:
            raise UserError(f"--{name}={config[name]}: must be at least 1")
    check_sampling(config.temperature, 0, config.top_p)
    check_seed(config.seed)
    inputs, targets, figures = (config[name].split(",") for name in ("input_dirs", "target_dirs", "figures"))
    if len(inputs) != len(targets):
        raise UserError(f"--target_dirs has {len(targets)} folders, --input_dirs {len(inputs)}: one of each for a task")
    if config.figures and len(figures) != len(inputs):
        raise UserError(f"--figures has {len(figures)} names, --input_dirs {len(inputs)} folders: one for each")
    for figure in filter(None, figures):
        if figure == "palette_iou" and not config.palette:
            raise UserError("--figures=palette_iou: --palette is missing, the file of its colours")
        choose("--figures", figure, judges)
    if not (config.input_dirs or config.clip_dirs or config.benchmark):
        raise UserError("no task: give --input_dirs and --target_dirs, or --clip_dirs, or --benchmark")
    shots = _counts(config, "n_shots", least=0)
    if config.n_context_frames:
        return shots, _counts(config, "n_context_frames", least=1)
    return shots, sorted({max(1, count) for count in shots})


def _check_outputs(config) -> None:
    """Raises UserError for what would fail only once all is measured."""
    if config.output_json:
        check_output(config.output_json, "output_json")
    if config.output_picture:
        images.check_output(config.output_picture, "output_picture")
    if config.output_plot:
        charts.check_output(config.output_plot, "output_plot")


def _counts(config, name: str, least: int) -> list[int]:
    try:
        counts = sorted({int(count) for count in str(config[name]).split(",")})
    except ValueError:
        raise UserError(f"--{name}={config[name]}: must be a comma list of integers, as 0,1,3") from None
    if counts[0] < least:
        raise UserError(f"--{name}={config[name]}: must be at least {least}")
    return counts


def _sources(config, frames: int) -> list[tasks.Source]:
    found = []  # (where it comes from, the task)
    if config.input_dirs:
        inputs, targets = config.input_dirs.split(","), config.target_dirs.split(",")
        figures = config.figures.split(",") if config.figures else [""] * len(inputs)
        for folders in zip(inputs, targets, figures, strict=True):
            found.append((f"--target_dirs={folders[1]}", tasks.folder_pairs(*folders)))
    if config.clip_dirs:
        found += [(f"--clip_dirs={folder}", tasks.folder_clips(folder)) for folder in config.clip_dirs.split(",")]
    if config.benchmark:
        of_benchmark = benchmarks.BENCHMARKS[config.benchmark](config, frames)
        found += [(f"--benchmark={config.benchmark}", source) for source in of_benchmark]
    places = {}
    for place, source in found:
        if source.name in places:  # results have one entry a name
            raise UserError(
                f"{places[source.name]} and {place}: two tasks named {source.name!r}: rename one, or measure it apart"
            )
        places[source.name] = place
    return [source for _, source in found]


def _figures(lpips_weights: str) -> dict[str, Callable]:
    if not lpips_weights:
        return metrics.PICTURE_FIGURES
    params = lpips.load(lpips_weights)
    return metrics.PICTURE_FIGURES | {"lpips": partial(jax.jit(lpips.distance), params)}


def _check_length(prompter: Prompter, source: tasks.Source, shots: int) -> None:
    name, count = ("n_context_frames", shots + 1) if source.clips else ("n_shots", 2 * shots + 2)
    if count > prompter.max_images:
        raise UserError(
            f"--{name}={shots}: with the answer {count} pictures; the model's longest sequence holds "
            f"{prompter.max_images}"
        )


def measure(
    config,
    prompter: Prompter,
    task: tasks.Task,
    counts: list[int],
    wanted: dict[str, Callable],
    network: inception.Inception | None,
) -> tuple[list[dict], np.ndarray]:
    """The figures at each number of shots, the model's also query by query, and the tokens [Q,N] drawn at the last.

    Args:
      wanted: figures: (pictures, truths) -> [Q].
      network: what FID is measured by, where it is asked for.
    """
    tokens_nN = prompter.encode(task.pixels)
    truths = task.pixels[task.prompts.answer_Q]
    true_tokens_QN = tokens_nN[task.prompts.answer_Q]
    through_tokenizer = prompter.decode(true_tokens_QN)
    if network:
        warn_if_few(task.name, len(truths))
    by_frequency_QN = metrics.unigram_log_likelihoods(true_tokens_QN, prompter.codec.config.num_embeddings)
    curve = []
    least_QN = None  # the likelihoods at the fewest shots
    for shots in counts:
        prompts_QPN = tokens_nN[task.prompts.shown(shots)]
        drawn_QN, likelihoods_QN = _answers(config, prompter, prompts_QPN, true_tokens_QN, f"{task.name}: {shots}")
        least_QN = likelihoods_QN if least_QN is None else least_QN
        answers = prompter.decode(drawn_QN)
        compared = {"model": answers, **baselines(task, shots), "tokenizer": through_tokenizer}
        of_tokens = {
            "perplexity": metrics.perplexity(likelihoods_QN),
            "unigram_perplexity": metrics.perplexity(by_frequency_QN),
            "nats_gained": np.mean(likelihoods_QN - least_QN, axis=1),
        }
        of_pictures = {
            name: {who: _in_parts(figure, drawn, truths, config.batch_size) for who, drawn in compared.items()}
            for name, figure in wanted.items()
        }
        of_model = of_tokens | {name: values["model"] for name, values in of_pictures.items()}
        curve.append(
            {
                "shots": shots,
                **jax.tree.map(metrics.with_standard_error, of_tokens | of_pictures),
                **({"fid": fids(network, compared, truths)} if network else {}),
                "per_query": {name: values.tolist() for name, values in of_model.items()},
            }
        )
    return curve, drawn_QN


def _in_parts(figure: Callable, drawn: np.ndarray, truths: np.ndarray, size: int) -> np.ndarray:
    """A figure of each picture [Q], of so many at a time: on its way a figure may need a hundred times their memory."""
    parts = (slice(start, start + size) for start in range(0, len(drawn), size))
    return np.concatenate([np.asarray(figure(drawn[part], truths[part])) for part in parts])


def _answers(config, prompter: Prompter, prompts_QPN, true_tokens_QN, what: str) -> tuple[np.ndarray, np.ndarray]:
    """The tokens drawn after each prompt, and the log-likelihoods of the true ones: both [Q, N]."""
    drawn, likelihoods = [], []
    for start in tqdm(range(0, len(prompts_QPN), config.batch_size), desc=what, unit="batch"):
        part = slice(start, start + config.batch_size)
        answers_BCFN = prompter.generate(
            prompts_QPN[part],
            GenerationSettings(
                context_images=prompts_QPN.shape[1] + 1,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=config.seed,
            ),
        )
        drawn.append(answers_BCFN[:, 0, 0])
        likelihoods.append(prompter.log_likelihoods(prompts_QPN[part], true_tokens_QN[part]))
    return np.concatenate(drawn), np.concatenate(likelihoods)


def fids(network: inception.Inception, compared: dict[str, np.ndarray], truths: np.ndarray) -> dict[str, float]:
    """FID of each one's answers against the truths, both [Q,S,S,3]."""
    true = FeatureStatistics.of(network(truths))
    return {who: frechet_distance(FeatureStatistics.of(network(drawn)), true) for who, drawn in compared.items()}


def baselines(task: tasks.Task, shots: int) -> dict[str, np.ndarray]:
    """Answers [Q,S,S,3] that need no model. Of a clip, the query is the last frame."""
    found = {} if task.is_clip else {"copy_query": task.pixels[task.prompts.query_Qq[:, -1]]}
    if shots:
        annotations_QK = task.prompts.annotations(shots)
        found["copy_last"] = task.pixels[annotations_QK[:, -1]]
        found["mean_annotation"] = np.stack([task.pixels[numbers].mean(axis=0) for numbers in annotations_QK])
    return found


def _print_table(results: dict) -> None:
    """The figures at the largest number of shots, a line each."""
    columns = ("model", "copy_last", "copy_query", "tokenizer")
    print(f"{'task':22}{'shots':>6}  {'figure':18}" + "".join(f"{name:>19}" for name in (*columns, "unigram")))
    for task, result in results.items():
        point = result["curve"][-1]
        lines = {"perplexity": {"model": point["perplexity"], "unigram": point["unigram_perplexity"]}}
        if len(result["curve"]) > 1:
            lines["nats_gained"] = {"model": point["nats_gained"]}
        lines |= {name: point[name] for name in ("mse", result["figure"]) if name}
        for name, values in lines.items():
            cells = "".join(f"{_cell(values.get(column)):>19}" for column in (*columns, "unigram"))
            print(f"{task:22}{point['shots']:6}  {name:18}{cells}")


def _cell(value: dict[str, float] | None) -> str:
    return "" if value is None else f"{value['mean']:.4g} ±{value['standard_error']:.2g}"


def _write(config, results: dict, rows: list) -> None:
    if config.output_json:
        asked = {
            name: config[name] for name in ("checkpoint", "benchmark", "split", "n_queries", "temperature", "seed")
        }
        write_json(config.output_json, {"settings": asked, "tasks": results})
    if config.output_plot:
        plots.curves(results, config.output_plot)
        print(f"look at {config.output_plot}")
    if config.output_picture:
        draw(rows, config.rows_per_task).save(config.output_picture)
        print(f"look at {config.output_picture}")


def draw(rows: list[tuple[tasks.Task, int, np.ndarray]], rows_per_task: int):
    """The sheet: for each task some prompts with the model's answer, framed, and the truth."""
    drawn = []
    for task, shots, answers in rows:
        captions = [*task.captions(shots), "the model", "truth"]
        prompts_QP, truths_Q = task.prompts.shown(shots), task.prompts.answer_Q
        for i in range(min(rows_per_task, len(answers))):
            shown = [*task.pixels[prompts_QP[i]], answers[i], task.pixels[truths_Q[i]]]
            drawn.append(contact_sheet.Row(task.name, captions, shown))
    return contact_sheet.sheet(drawn, size=96, framed="the model")


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
