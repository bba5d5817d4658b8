"""The loops of the evaluation programs: over many examples, in batches, going on where a stopped run ended.

Shapes: B examples, P pictures of a prompt, F that follow it, C candidates, N tokens of an image, S the side in pixels.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.models.generate import check_sampling, check_seed
from EasyLM.storage import check_output
from evaluation.prompting.prompter import Prompter
from evaluation.runs.lines import Example, Results, loaded_batches, progress_bar
from evaluation.tasks import metrics

GENERATION_FLAGS = {
    "n_new_frames": Flag(1, "Pictures to draw after each prompt."),
    "n_candidates": Flag(2, "Different answers to each prompt."),
    "context_frames": Flag(16, "The picture that is drawn and those before it that are seen."),
    "temperature": Flag(1.0, "Of the sampling; 0: the likeliest token."),
    "top_k": Flag(0, "Sample from so many likeliest tokens; 0: from all."),
    "top_p": Flag(1.0, "Sample from the likeliest tokens whose probabilities add up to this."),
    "seed": Flag(0, "Of the sampling."),
    "evaluate_mse": Flag(False, "Measure the answers against the true pictures."),
}
_PICTURES = 32  # that the tokenizer takes at a time, at most
UNFINISHED = "unfinished.jsonl"  # what a stopped run leaves behind


def check(config, *counts: str) -> None:
    """Raises UserError unless these flags, and, if there are any, sampling and seed, have values that can be."""
    for name in counts:
        if config[name] < 1:
            raise UserError(f"--{name}={config[name]}: must be at least 1")
    if config.max_examples < 0:
        raise UserError(f"--max_examples={config.max_examples}: must be at least 0 (all)")
    if "context_frames" in config and config.context_frames < 2:
        raise UserError(
            f"--context_frames={config.context_frames}: must be at least 2, the picture that is drawn and one before it"
        )
    if "temperature" in config:
        check_sampling(config.temperature, config.top_k, config.top_p)
    if "seed" in config:
        check_seed(config.seed)


def measure(config, cases: Sequence[Example], load: Callable, lengths: Callable) -> None:
    """Perplexity of what follows each example's prompt: prints and writes the figures.

    Args:
      config: values of PROMPTER_FLAGS, EXAMPLE_FLAGS and `batch_size`.
      load: (example, S) -> pixels of its prompt [P,S,S,3] and of its target [F,S,S,3].
      lengths: example -> (P, F).

    Raises:
      UserError: naming the flag, or the example that is too long for the model or cannot be read.
    """
    if config.output_json:
        check_output(config.output_json, "output_json")
    results = Results(config.output_json and f"{config.output_json}.{UNFINISHED}", config)
    prompter = _load(config, config.batch_size, cases, lengths)
    for case in cases:
        if sum(lengths(case)) > prompter.max_pictures:
            prompt, target = lengths(case)
            raise UserError(
                f"{case.name}: {prompt} pictures and {target} to measure: the model's longest sequence holds "
                f"{prompter.max_pictures}"
            )

    def score(batch, pixels):
        prompts_BPN, targets_BFN = (prompter.encode(np.stack(part)) for part in zip(*pixels, strict=True))
        perplexity_B = metrics.perplexity(prompter.log_likelihoods(prompts_BPN, targets_BFN))
        return [{"perplexity": perplexity, "tokens": targets_BFN[0].size} for perplexity in perplexity_B.tolist()]

    _each_batch(config, cases, results, prompter, config.batch_size, load, lengths, score)
    results.finish(cases, ["perplexity"], config.output_json)


def draw(config, cases: Sequence[Example], load: Callable, lengths: Callable, save: Callable, output_dir: str) -> None:
    """Draws what follows each example's prompt and saves it: prints and writes the figures.

    Args:
      config: values of PROMPTER_FLAGS, EXAMPLE_FLAGS, GENERATION_FLAGS and `batch_size_factor`.
      load: (example, S) -> pixels of its prompt [P,S,S,3] and of what truly follows [F,S,S,3], or None.
      lengths: example -> (P, F), F 0 where nothing is measured.
      save: (example, prompt [P,S,S,3], answers [C,F,S,S,3]) -> the paths that it has written.
      output_dir: where they lie, for the results of a stopped run.

    Raises:
      UserError: naming the flag, or the example that cannot be read.
    """
    if config.output_json:
        check_output(config.output_json, "output_json")
    results = Results(os.path.join(output_dir, unfinished_name(config)), config)
    prompter = _load(config, config.batch_size_factor, cases, lengths)
    settings = {name: config[name] for name in ("temperature", "top_k", "top_p", "seed")}

    def answer(batch, loaded):
        prompts_BPSS3 = [prompt for prompt, _ in loaded]
        answers_BCFSS3 = prompter.draw(
            prompter.answer(
                prompter.encode(np.stack(prompts_BPSS3)),
                new_pictures=config.n_new_frames,
                candidates=config.n_candidates,
                context_pictures=config.context_frames,
                **settings,
            )
        )
        for case, (prompt, truth), answers in zip(batch, loaded, answers_BCFSS3, strict=False):
            values = {"written": save(case, prompt, answers)}
            if truth is not None:
                errors_C = [float(metrics.mse(answer_FSS3, truth).mean()) for answer_FSS3 in answers]
                values |= {"mse": errors_C, "best_mse": min(errors_C)}
            yield values

    size = config.batch_size_factor * prompter.ways
    _each_batch(config, cases, results, prompter, size, load, lengths, answer)
    results.finish(cases, ["mse", "best_mse"] if config.evaluate_mse else [], config.output_json)
    print(f"{output_dir}: answers to {len(cases)} prompts")


def unfinished_name(config) -> str:
    """The file of a stopped run's results: each list of examples has its own, as several may draw into one folder."""
    listed = next(config[name] for name in ("input_file", "read_file_list", "input_files") if config.get(name))
    digest = hashlib.blake2b(os.path.realpath(listed).encode(), digest_size=4).hexdigest()
    return UNFINISHED.replace(".", f".{digest}.")


def _load(config, size: int, cases, lengths) -> Prompter:
    """The prompter of the flags. Its tokenizer takes no more pictures at a time than a batch has."""
    return Prompter.load(config, min(_PICTURES, size * max(max(lengths(case)) for case in cases)))


def _each_batch(config, cases, results, prompter, size, load, lengths, work) -> None:
    """Adds `work(examples, what load gives)` to the results of the examples that have none."""
    missing = results.missing(cases)
    load = partial(load, side=prompter.codec.config.resolution)
    size = -(-size // prompter.ways) * prompter.ways  # so that no device computes copies
    with progress_bar(len(cases) - len(missing), len(cases)) as bar:
        for batch, loaded in loaded_batches(missing, size, load, config.n_workers, lengths):
            for case, values in zip(batch, work(batch, loaded), strict=False):
                results.add(case, values)
                bar.update()
