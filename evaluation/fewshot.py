"""Prompts a model with a few examples of each task and measures its answers: `python -m evaluation.fewshot ...`.

A task is a pair of folders, images and their annotations matched by stem, or a folder of clips whose next frame is
asked for. Each query is preceded by `n_shots` other examples (or frames). Figures, for every task, beside what needs no
model: perplexity of the true answer against the tokens' frequencies, and mean squared error of the drawn answer against
a copy of the last annotation (or frame) of the prompt.

Shapes: Q queries, S shots, N tokens of an image, H the side in pixels.
"""

import dataclasses
import json
import os

import numpy as np
from tqdm import tqdm

from EasyLM import generate, sharding
from EasyLM.errors import UserError
from EasyLM.flags import Flag, run
from EasyLM.models.llama.llama_decode import LLaMADecoder, log_likelihoods
from evaluation import metrics, pictures, prompts
from evaluation.models import MODEL_FLAGS, load_model
from tokenizer import images
from tokenizer.codec import CODEC_FLAGS, Codec

FLAGS = {
    **MODEL_FLAGS,
    "vqgan": CODEC_FLAGS["vqgan"],
    "input_dirs": Flag("", "Comma list of folders of images, one for each task."),
    "target_dirs": Flag("", "Comma list of folders of annotations, one for each task; its name is the task's."),
    "clip_dirs": Flag("", "Comma list of folders of clips (folders of frames), each a task of its own."),
    "n_shots": Flag(3, "Examples before the query; for clips: frames before the one asked for."),
    "n_queries": Flag(16, "Queries of each task."),
    "temperature": Flag(0.0, "Of the sampling; 0: the likeliest token."),
    "top_p": Flag(1.0, "Sample from the likeliest tokens whose probabilities add up to this."),
    "seed": Flag(0, "Of the examples' choice and of the sampling."),
    "batch_size": Flag(8, "Prompts at a time; changes no result."),
    "mesh_dim": Flag("1,-1,1", "Mesh of devices, as for training."),
    "output_json": Flag("", "Write the figures to this file."),
    "output_picture": Flag("", "Write a sheet to this PNG file: prompt, answer, truth."),
    "rows_per_task": Flag(2, "Queries of each task on the sheet."),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """Prompts of one task, of one length, with their true answers; pictures as float32 in [0, 1]."""

    name: str
    captions: list[str]  # of the pictures in a prompt
    prompt_pictures: np.ndarray  # [Q, P, H, H, 3]
    truth_pictures: np.ndarray  # [Q, H, H, 3]
    prompt_tokens: np.ndarray  # [Q, P N]
    truth_tokens: np.ndarray  # [Q, N]


def main(config) -> None:
    """Measures every task, prints a table, writes figures and sheet."""
    _check(config)
    codec = Codec(config.vqgan)
    mesh = sharding.make_mesh(config.mesh_dim)
    sharding.check_batch_size("batch_size", config.batch_size, mesh)
    model, params = load_model(config.checkpoint, config.load_llama_config, mesh)
    tasks = _tasks(config, codec)
    results, rows = {}, []
    for task in tasks:
        answers = _answers(config, codec, LLaMADecoder(model, mesh=mesh), params, task)
        results[task.name] = figures(task, answers, *_likelihoods(config, codec, model, params, task, mesh), codec)
        rows.append((task, answers))
    _print_table(results)
    if config.output_json:
        os.makedirs(os.path.dirname(config.output_json) or ".", exist_ok=True)
        with open(config.output_json, "w", encoding="utf-8") as file:
            json.dump({"n_shots": config.n_shots, "tasks": results}, file, indent=2)
    if config.output_picture:
        os.makedirs(os.path.dirname(config.output_picture) or ".", exist_ok=True)
        draw(rows, config.rows_per_task).save(config.output_picture)
        print(f"look at {config.output_picture}")


def _check(config) -> None:
    for name in ("n_shots", "n_queries", "batch_size"):
        if config[name] < 1:
            raise UserError(f"--{name}={config[name]}: must be at least 1")
    inputs, targets = (_names(config[name]) for name in ("input_dirs", "target_dirs"))
    if len(inputs) != len(targets):
        raise UserError(f"--target_dirs has {len(targets)} folders, --input_dirs {len(inputs)}: one of each for a task")
    if not inputs and not config.clip_dirs:
        raise UserError("no task: give --input_dirs and --target_dirs, or --clip_dirs")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _tasks(config, codec: Codec) -> list[Task]:
    pairs = zip(_names(config.input_dirs), _names(config.target_dirs), strict=True)
    tasks = [analogy_task(input_dir, target_dir, config, codec) for input_dir, target_dir in pairs]
    return tasks + [clip_task(clip_dir, config, codec) for clip_dir in _names(config.clip_dirs)]


def analogy_task(input_dir: str, target_dir: str, config, codec: Codec) -> Task:
    """[image, annotation] of `n_shots` other examples, then the query."""
    sides = [
        images.stems(images.find(d, flag), d, flag)
        for d, flag in ((input_dir, "input_dirs"), (target_dir, "target_dirs"))
    ]
    stems = sorted(sides[0].keys() & sides[1].keys())
    if len(stems) <= config.n_shots:
        raise UserError(
            f"--target_dirs: {target_dir} has {len(stems)} examples of {input_dir}; {config.n_shots} shots need more"
        )
    pixels = [np.stack([images.load(side[stem], codec.config.resolution) for stem in stems]) for side in sides]
    inputs, targets = (codec.encode(side) for side in pixels)
    queries = np.arange(min(config.n_queries, len(stems)))
    shots = [prompts.supports(len(stems), config.n_shots, query, config.seed) for query in queries]
    return Task(
        name=os.path.basename(os.path.normpath(target_dir)),
        captions=["example", "answer"] * config.n_shots + ["query"],
        prompt_pictures=np.stack([_analogy_pictures(*pixels, s, q) for s, q in zip(shots, queries, strict=True)]),
        truth_pictures=pixels[1][queries],
        prompt_tokens=np.stack(
            [prompts.analogy(inputs[s], targets[s], inputs[q]) for s, q in zip(shots, queries, strict=True)]
        ),
        truth_tokens=targets[queries],
    )


def _analogy_pictures(inputs, targets, shots, query):
    pairs = np.stack([inputs[shots], targets[shots]], axis=1)
    return np.concatenate([pairs.reshape(-1, *inputs.shape[1:]), inputs[query][None]])


def clip_task(clip_dir: str, config, codec: Codec) -> Task:
    """`n_shots` frames of a clip, then the next is asked for."""
    clips = {}
    for path in images.find(clip_dir, "clip_dirs"):
        clips.setdefault(path.parent, []).append(path)
    long_enough = [frames for _, frames in sorted(clips.items()) if len(frames) > config.n_shots][: config.n_queries]
    if not long_enough:
        raise UserError(f"--clip_dirs={clip_dir}: no clip has more than n_shots={config.n_shots} frames")
    count = config.n_shots + 1
    pixels = np.stack([[images.load(f, codec.config.resolution) for f in frames[:count]] for frames in long_enough])
    tokens = codec.encode(pixels.reshape(-1, *pixels.shape[2:])).reshape(len(pixels), count, -1)
    return Task(
        name=os.path.basename(os.path.normpath(clip_dir)),
        captions=["frame"] * config.n_shots,
        prompt_pictures=pixels[:, :-1],
        truth_pictures=pixels[:, -1],
        prompt_tokens=np.stack([prompts.sequence(frames) for frames in tokens[:, :-1]]),
        truth_tokens=tokens[:, -1],
    )


def _batches(config, task: Task, what: str):
    starts = range(0, len(task.truth_tokens), config.batch_size)
    for start in tqdm(starts, desc=f"{task.name}: {what}", unit="batch"):
        yield slice(start, start + config.batch_size)


def _answers(config, codec: Codec, decoder: LLaMADecoder, params, task: Task) -> np.ndarray:
    """The model's pictures [Q, H, H, 3]."""
    tokens = [
        generate.generate(
            decoder,
            params,
            task.prompt_tokens[part],
            num_new_tokens=task.truth_tokens.shape[1],
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
            allowed_ids=codec.config.num_embeddings,
        )[:, 0]
        for part in _batches(config, task, "answering")
    ]
    return codec.decode(np.concatenate(tokens))


def _likelihoods(config, codec: Codec, model, params, task: Task, mesh) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihoods [Q, N] of the true answer's tokens, by the model and by the tokens' frequencies."""
    rows = np.concatenate([task.prompt_tokens, task.truth_tokens], axis=1)
    begin = task.prompt_tokens.shape[1]
    by_model = [
        log_likelihoods(model, params, rows[part], begin, mesh=mesh) for part in _batches(config, task, "measuring")
    ]
    return np.concatenate(by_model), metrics.unigram_log_likelihoods(task.truth_tokens, codec.config.num_embeddings)


def figures(task: Task, answers, by_model, by_frequency, codec: Codec) -> dict:
    """Means and standard errors over the queries of a task."""
    last = task.prompt_pictures[:, -2] if "answer" in task.captions else task.prompt_pictures[:, -1]
    values = {
        "perplexity": metrics.perplexity(by_model),
        "unigram_perplexity": metrics.perplexity(by_frequency),
        "mse": metrics.mse(answers, task.truth_pictures),
        "copy_mse": metrics.mse(last, task.truth_pictures),
        "tokenizer_mse": metrics.mse(codec.decode(task.truth_tokens), task.truth_pictures),
    }
    return {"queries": len(answers)} | {name: metrics.with_standard_error(value) for name, value in values.items()}


def _print_table(results: dict) -> None:
    names = ("perplexity", "unigram_perplexity", "mse", "copy_mse", "tokenizer_mse")
    print(f"{'task':20}" + "".join(f"{name:>20}" for name in names))
    for task, result in results.items():
        cells = (f"{result[name]['mean']:.4f} ±{result[name]['standard_error']:.4f}" for name in names)
        print(f"{task:20}" + "".join(f"{cell:>20}" for cell in cells))


def draw(rows: list[tuple[Task, np.ndarray]], rows_per_task: int):
    """The sheet: for each task some prompts with the model's answer, framed, and the truth."""
    width = max(len(task.captions) for task, _ in rows)
    blank = np.ones(rows[0][1].shape[1:], np.float32)
    drawn, names = [], []
    for task, answers in rows:
        for i in range(min(rows_per_task, len(answers))):
            padding = [blank] * (width - len(task.captions))
            drawn.append([*padding, *task.prompt_pictures[i], answers[i], task.truth_pictures[i]])
            names.append(task.name)
    longest = max((task.captions for task, _ in rows), key=len)
    return pictures.sheet(drawn, [*longest, "the model", "truth"], names, size=96, framed="the model")


if __name__ == "__main__":
    run(main, FLAGS)
