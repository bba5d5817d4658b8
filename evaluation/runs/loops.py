"""The loops of the evaluation commands: over all examples, in batches. A stopped run resumes.

Shapes: see `evaluation.prompting`.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from EasyLM.errors import UserError
from EasyLM.flags import Flag, to_dataclass
from EasyLM.progress import progress
from EasyLM.storage import check_output
from evaluation.prompting.prompter import Prompter, PrompterSettings
from evaluation.prompting.settings import GenerationSettings, LargestBatch
from evaluation.runs.example import Example
from evaluation.runs.prefetch import loaded_batches
from evaluation.runs.results import UNFINISHED, Results, open_results, unfinished_name
from evaluation.tasks import metrics

GENERATION_FLAGS = {
    "n_new_frames": Flag(1, "Images to generate after each prompt.", least=1),
    "n_candidates": Flag(2, "Samples for each prompt.", least=1),
    "context_frames": Flag(16, "Images that the model attends to, the generated one included.", least=2),
    "temperature": Flag(1.0, "Sampling temperature; 0: take the most likely token.", least=0),
    "top_k": Flag(0, "Sample from the k most likely tokens; 0: from all.", least=0),
    "top_p": Flag(1.0, "Sample from the most likely tokens that together have this probability.", above=0, most=1),
    "seed": Flag(0, "Seed of the sampling.", least=0, most=2**31 - 1),
    "evaluate_mse": Flag(False, "Report the mean squared error of the samples against the target images."),
}
_MAX_CODEC_BATCH = 32  # images per batch of the tokenizer


@dataclasses.dataclass(frozen=True)
class EvaluationRun:
    """The inputs of both loops.

    Attributes:
      examples: the examples, in the order of the results.
      load: (example, side in pixels) -> the images of its prompt [P,S,S,3] and of its target [F,S,S,3], or None.
      lengths: example -> (P, F); F is 0 without a target.
      prompter: the tokenizer and the model.
      batch_size: examples per batch: over all devices in `measure`, on each device in `generate`.
      num_workers: threads that load images.
      output_json: file for the metrics; empty: print only.
      settings: values of all flags. A stopped run resumes only if the flags that change results are equal.
    """

    examples: Sequence[Any]
    load: Callable[[Any, int], tuple[np.ndarray, np.ndarray | None]]
    lengths: Callable[[Any], tuple[int, int]]
    prompter: PrompterSettings
    batch_size: int
    num_workers: int
    output_json: str
    settings: Mapping[str, Any]

    @property
    def lists(self) -> list[str]:
        """The files that list the examples. Empty names: none."""
        return [self.settings.get(name, "") for name in ("input_file", "read_file_list")]

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], batch_size: int, examples: Sequence[Example], load: Callable, lengths: Callable
    ) -> "EvaluationRun":
        """Creates a run from values of PROMPTER_FLAGS and EXAMPLE_FLAGS."""
        prompter = to_dataclass(PrompterSettings, config)
        return cls(
            examples, load, lengths, prompter, batch_size, config["n_workers"], config["output_json"], dict(config)
        )


def measure(run: EvaluationRun) -> None:
    """Measures the perplexity of each example's target. Prints and writes the metrics.

    Raises:
      UserError: naming the flag, or the example that exceeds the model's longest sequence or cannot be read.
    """
    if run.output_json:
        check_output(run.output_json, "output_json", run.lists)
    with open_results(run.output_json and f"{run.output_json}.{UNFINISHED}", run.settings) as results:
        longest = max(sum(run.lengths(example)) for example in run.examples)
        prompter = _load_prompter(run, LargestBatch(run.batch_size, longest, None))
        for example in run.examples:
            num_context, num_target = run.lengths(example)
            if num_context + num_target > prompter.max_images:
                raise UserError(
                    f"{example.name}: {num_context} images and {num_target} targets: the model's longest sequence "
                    f"holds {prompter.max_images}"
                )

        def score(batch: list, loaded: list) -> Iterable[dict]:
            prompts_BPN, targets_BFN = (prompter.encode(np.stack(images)) for images in zip(*loaded, strict=True))
            perplexity_B = metrics.perplexity(prompter.log_likelihoods(prompts_BPN, targets_BFN))
            return [{"perplexity": perplexity, "tokens": targets_BFN[0].size} for perplexity in perplexity_B.tolist()]

        _for_each_batch(run, results, prompter, run.batch_size, score)
        results.finish(run.examples, ["perplexity"], run.output_json)


def generate(
    run: EvaluationRun,
    settings: GenerationSettings,
    save: Callable[[Any, np.ndarray, np.ndarray], list[str]],
    *,
    output_dir: str,
    list_path: str,
    evaluate_mse: bool,
) -> None:
    """Generates the images that follow each prompt and saves them. Prints and writes the metrics.

    Args:
      run: the examples and the model.
      settings: how to generate.
      save: (example, prompt [P,S,S,3], samples [C,F,S,S,3]) -> the paths of the files that it wrote.
      output_dir: folder of these files, and of unfinished results.
      list_path: file or glob that lists the examples; see `unfinished_name`.
      evaluate_mse: report the mean squared error of the samples.

    Raises:
      UserError: naming the flag, or the example that cannot be read.
    """
    if run.output_json:
        check_output(run.output_json, "output_json", run.lists)
    with open_results(os.path.join(output_dir, unfinished_name(list_path)), run.settings) as results:
        longest = max(run.lengths(example)[0] for example in run.examples)
        prompter = _load_prompter(run, LargestBatch(run.batch_size, longest, settings, on_each_device=True))

        def answer(batch: list, loaded: list) -> Iterable[dict]:
            prompts_BPN = prompter.encode(np.stack([prompt for prompt, _ in loaded]))
            samples_BCFSS3 = prompter.decode(prompter.generate(prompts_BPN, settings))
            for example, (prompt, target), samples in zip(batch, loaded, samples_BCFSS3, strict=False):
                values: dict[str, Any] = {"written": save(example, prompt, samples)}
                if target is not None:
                    mse_C = [float(metrics.mse(sample_FSS3, target).mean()) for sample_FSS3 in samples]
                    values |= {"mse": mse_C, "best_mse": min(mse_C)}
                yield values

        _for_each_batch(run, results, prompter, run.batch_size * prompter.batch_shards, answer)
        results.finish(run.examples, ["mse", "best_mse"] if evaluate_mse else [], run.output_json)
    print(f"{output_dir}: wrote the images of {len(run.examples)} prompts")


def _load_prompter(run: EvaluationRun, largest: LargestBatch) -> Prompter:
    """Loads the prompter. The batch size of its tokenizer is at most the number of images that a batch needs."""
    longest = max(max(run.lengths(example)) for example in run.examples)
    return Prompter.load(run.prompter, min(_MAX_CODEC_BATCH, run.batch_size * longest), largest)


def _for_each_batch(
    run: EvaluationRun, results: Results, prompter: Prompter, batch_size: int, compute: Callable
) -> None:
    """Adds the results of `compute(examples, loaded values)` for all examples that have none."""
    missing = results.missing(run.examples)
    side = prompter.codec.resolution

    def load(example: Example) -> tuple[np.ndarray, np.ndarray | None]:
        return run.load(example, side)

    # Rounded up to a multiple of the shards: padding would waste the remaining shards.
    batch_size = -(-batch_size // prompter.batch_shards) * prompter.batch_shards
    with progress(total=len(run.examples), initial=len(run.examples) - len(missing), unit="example") as bar:
        for batch, loaded in loaded_batches(missing, batch_size, load, run.num_workers, run.lengths):
            for example, values in zip(batch, compute(batch, loaded), strict=False):
                results.add(example, values)
                bar.update()
