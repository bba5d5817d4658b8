"""Measures what a model learns from the examples of its prompt, on tasks of mappings.

All metrics of a task have the same queries: at every number of shots, and after right and after wrong examples.
Differences are computed for each query, so that their standard errors do not contain the variation of the queries.

Shapes: Q queries, n queries whose answers are generated, N tokens of an image, P images of a prompt, S the side.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from EasyLM.progress import progress
from evaluation.prompting import GenerationSettings, Prompter
from evaluation.tasks import metrics
from evaluation.tasks.baselines import baseline_answers
from evaluation.tasks.lookup import lookup_answers
from evaluation.tasks.mapping_tasks import MappingTask
from evaluation.tasks.metrics import HIGHER_IS_BETTER, ImageMetric

FULL_COUNTS = (0, 1, 3, 7)  # numbers of shots with answers and wrong examples; the largest number always has them
FIRST_TOKENS = 12  # of an answer: before it shows its own colours
WRONG = "wrong_examples"  # the model after wrong examples, as a source of answers
_TOKEN_METRICS = ("nats", "accuracy", "first_accuracy")
_Values = dict[str, dict[str, np.ndarray]]  # metric -> source -> values [Q] or [n]


@dataclasses.dataclass(frozen=True)
class InContextMeasurement:
    """Measures a model on tasks of mappings.

    Attributes:
      generation: how answers are sampled. `context_images` is replaced by the length of prompt and answer.
      batch_size: prompts per batch.
      image_metrics: computed for every answer.
      num_answers: n: answers are generated for the first n queries.
    """

    prompter: Prompter
    generation: GenerationSettings
    batch_size: int
    image_metrics: Mapping[str, ImageMetric]
    num_answers: int

    def curve(self, task: MappingTask, counts: Sequence[int]) -> tuple[list[dict[str, Any]], np.ndarray]:
        """Measures the task at each number of shots, in ascending order.

        Returns:
          The points of the curve, and the tokens [n,N] of the answers at the last point. A point has each metric by
          source, with standard errors, and the values of each query.
        """
        tokens_nN = self.prompter.encode(task.pixels)
        true_QN = tokens_nN[task.prompts.answer_Q]
        points = []
        full = [shots for shots in counts if shots in FULL_COUNTS or shots == counts[-1]]
        prompts = len(true_QN) * (len(counts) + np.count_nonzero(full))
        prompts += len(true_QN[: self.num_answers]) * (len(full) + np.count_nonzero(full))
        with progress(total=int(prompts), desc=task.name, unit="prompt") as bar:
            for shots in counts:
                layouts = {"model": task.prompts} | ({WRONG: task.wrong} if shots and shots in full else {})
                prompts_QPN = {source: tokens_nN[layout.images(shots)] for source, layout in layouts.items()}
                values = self._token_values(prompts_QPN, true_QN, bar)
                if shots in full:
                    answers_nN = {source: self._generate(prompts, bar) for source, prompts in prompts_QPN.items()}
                    values = self._add_image_values(values, task, shots, answers_nN, true_QN)
                points.append(
                    {
                        "shots": shots,
                        **jax.tree.map(metrics.with_standard_error, values),
                        "per_query": jax.tree.map(np.ndarray.tolist, values),
                    }
                )
        return points, answers_nN["model"]

    def _token_values(self, prompts_QPN: Mapping[str, np.ndarray], true_QN: np.ndarray, bar: tqdm) -> _Values:
        """Returns the token metrics of the model after right and after wrong examples."""
        values: _Values = {name: {} for name in ("perplexity", *_TOKEN_METRICS)}
        for source, prompts in prompts_QPN.items():
            scores = []
            for batch in self._batches(len(prompts)):
                scores.append(self.prompter.score(list(prompts[batch]), list(true_QN[batch, None])))
                bar.update(len(prompts[batch]))
            log_p_QN, is_right_QN = map(np.concatenate, zip(*scores))
            values["perplexity"][source] = metrics.perplexity(log_p_QN)
            values["nats"][source] = -log_p_QN.astype(np.float64).mean(1)
            values["accuracy"][source] = is_right_QN.mean(1)
            values["first_accuracy"][source] = is_right_QN[:, :FIRST_TOKENS].mean(1)
        return values

    def _generate(self, prompts_QPN: np.ndarray, bar: tqdm) -> np.ndarray:
        """Returns the tokens [n,N] of the model's answers to the first prompts."""
        generation = dataclasses.replace(self.generation, context_images=prompts_QPN.shape[1] + 1)
        answers = []
        prompts_nPN = prompts_QPN[: self.num_answers]
        for batch in self._batches(len(prompts_nPN)):
            answers.append(self.prompter.generate(list(prompts_nPN[batch]), generation)[:, 0, 0])
            bar.update(len(prompts_nPN[batch]))
        return np.concatenate(answers)

    def _add_image_values(
        self, values: _Values, task: MappingTask, shots: int, answers_nN: Mapping[str, np.ndarray], true_QN: np.ndarray
    ) -> _Values:
        """Returns values with the metrics of all answers, and the accuracy of the answers that need no model."""
        n = slice(self.num_answers)
        baselines = baseline_answers(task, shots)
        if task.keys_QPSS3 is not None:
            baselines["lookup"] = lookup_answers(task, shots)
        for source, answers_QSS3 in baselines.items():
            is_right_QN = self.prompter.encode(np.asarray(answers_QSS3, np.float32)) == true_QN
            values["accuracy"][source] = is_right_QN.mean(1)
            values["first_accuracy"][source] = is_right_QN[:, :FIRST_TOKENS].mean(1)
        answers = {
            **{source: self.prompter.decode(tokens_nN) for source, tokens_nN in answers_nN.items()},
            **{source: answers_QSS3[n] for source, answers_QSS3 in baselines.items()},
            "tokenizer": self.prompter.decode(true_QN[n]),
        }
        return values | {
            name: {source: np.asarray(metric(pixels, task.answers[n])) for source, pixels in answers.items()}
            for name, metric in self.image_metrics.items()
        }

    def _batches(self, count: int) -> list[slice]:
        return [slice(start, start + self.batch_size) for start in range(0, count, self.batch_size)]


def summary(task: MappingTask, curve: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns further values of a task for the JSON file: its family and split, and the `differences` of its curve."""
    return {"family": task.family, "split": task.split, "differences": differences(curve, task.metric)}


def differences(curve: Sequence[Mapping[str, Any]], metric: str) -> dict[str, dict[str, dict[str, float]]]:
    """Returns the gain from the examples: paired differences with standard errors. Positive: the examples help.

    `shots_1_to_3` and `shots_3_to_7` compare numbers of shots, `wrong_at_3` and `wrong_at_7` right with wrong examples,
    `copy_at_7` the answers with a copy of the query. Those whose numbers of shots are not in the curve are left out.

    Args:
      curve: of `InContextMeasurement`.
      metric: the task's metric; empty: mse.
    """
    values = {point["shots"]: point["per_query"] for point in curve}
    names = (*_TOKEN_METRICS, metric or "mse")
    # name -> (shots, source) that should be better, and that should be worse
    comparisons = {
        "shots_1_to_3": ((3, "model"), (1, "model")),
        "shots_3_to_7": ((7, "model"), (3, "model")),
        "wrong_at_3": ((3, "model"), (3, WRONG)),
        "wrong_at_7": ((7, "model"), (7, WRONG)),
        "copy_at_7": ((7, "model"), (7, "copy_query")),
    }
    result: dict[str, dict[str, dict[str, float]]] = {}
    for comparison, ((shots, source), (other_shots, other_source)) in comparisons.items():
        for name in names:
            better = values.get(shots, {}).get(name, {}).get(source)
            worse = values.get(other_shots, {}).get(name, {}).get(other_source)
            if better is not None and worse is not None:
                sign = 1 if name in HIGHER_IS_BETTER else -1
                difference = sign * (np.array(better) - np.array(worse))
                result.setdefault(comparison, {})[name] = metrics.with_standard_error(difference)
    return result
