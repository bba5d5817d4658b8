"""Measures a model's answers to a task at several numbers of shots.

Shapes: Q queries, P images of a prompt, N tokens of an image, S the side in pixels.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from EasyLM.progress import progress
from evaluation.prompting import GenerationSettings, Prompter
from evaluation.tasks import metrics
from evaluation.tasks.baselines import baseline_answers
from evaluation.tasks.metrics import ImageMetric
from evaluation.tasks.tasks import Task
from tokenizer.image_quality import FeatureStatistics, frechet_distance, inception, warn_if_few


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Measures a model on tasks.

    Attributes:
      generation: how answers are sampled. `context_images` is replaced by the length of prompt and answer.
      batch_size: prompts per batch of the model, and images per batch of a metric.
      image_metrics: computed for every answer.
      network: the network of FID; None: no FID.
    """

    prompter: Prompter
    generation: GenerationSettings
    batch_size: int
    image_metrics: Mapping[str, ImageMetric]
    network: inception.Inception | None = None

    def curve(self, task: Task, counts: Sequence[int]) -> tuple[list[dict[str, Any]], np.ndarray]:
        """Measures the task at each number of shots (or context frames), in ascending order.

        Returns:
          The points of the curve, and the tokens [Q,N] of the answers at the last point. A point has the metrics of
          the model, of the baselines and of the tokenizer, with standard errors, and the model's metrics per query.
        """
        tokens_nN = self.prompter.encode(task.pixels)
        true_tokens_QN = tokens_nN[task.prompts.answer_Q]
        reconstructions = self.prompter.decode(true_tokens_QN)
        if self.network:
            warn_if_few(task.name, len(true_tokens_QN))
        unigram_QN = metrics.unigram_log_likelihoods(true_tokens_QN, self.prompter.codec.num_codes)
        points = []
        fewest_QN: np.ndarray | None = None  # log-likelihoods at the fewest shots
        for shots in counts:
            prompts_QPN = tokens_nN[task.prompts.images(shots)]
            answers_QN, likelihoods_QN = self._answer(prompts_QPN, true_tokens_QN, f"{task.name}: {shots}")
            fewest_QN = likelihoods_QN if fewest_QN is None else fewest_QN
            token_metrics = {
                "perplexity": metrics.perplexity(likelihoods_QN),
                "unigram_perplexity": metrics.perplexity(unigram_QN),
                "nats_gained": np.mean(likelihoods_QN - fewest_QN, axis=1),
            }
            answers = {
                "model": self.prompter.decode(answers_QN),
                **baseline_answers(task, shots),
                "tokenizer": reconstructions,
            }
            points.append({"shots": shots, **self._point(task, token_metrics, answers)})
        return points, answers_QN

    def _answer(
        self, prompts_QPN: np.ndarray, true_tokens_QN: np.ndarray, description: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens of the model's answers and the log-likelihoods of the true tokens, both [Q, N]."""
        generation = dataclasses.replace(self.generation, context_images=prompts_QPN.shape[1] + 1)
        answers, likelihoods = [], []
        for start in progress(range(0, len(prompts_QPN), self.batch_size), desc=description, unit="batch"):
            batch = slice(start, start + self.batch_size)
            prompts, targets = list(prompts_QPN[batch]), list(true_tokens_QN[batch, None])
            answers_BCFN = self.prompter.generate(prompts, generation)
            answers.append(answers_BCFN[:, 0, 0])
            likelihoods.append(self.prompter.log_likelihoods(prompts, targets))
        return np.concatenate(answers), np.concatenate(likelihoods)

    def _point(
        self, task: Task, token_metrics: dict[str, np.ndarray], answers: dict[str, np.ndarray]
    ) -> dict[str, Any]:
        """Returns a point of the curve: means with standard errors, FID, and the metrics per query."""
        image_metrics = {
            name: {source: self._in_batches(metric, pixels, task.answers) for source, pixels in answers.items()}
            for name, metric in self.image_metrics.items()
        }
        values = {**token_metrics, **image_metrics}
        return {
            **jax.tree.map(metrics.with_standard_error, values),
            **({"fid": self._fid(answers, task.answers)} if self.network else {}),
            "per_query": jax.tree.map(np.ndarray.tolist, values),
        }

    def _in_batches(self, metric: ImageMetric, images: np.ndarray, truths: np.ndarray) -> np.ndarray:
        """Returns a metric of each image [Q]. Batches bound memory: a metric may need 100 times that of its images."""
        batches = (slice(start, start + self.batch_size) for start in range(0, len(images), self.batch_size))
        return np.concatenate([np.asarray(metric(images[batch], truths[batch])) for batch in batches])

    def _fid(self, answers: Mapping[str, np.ndarray], truths: np.ndarray) -> dict[str, float]:
        """Returns the FID of each source's answers against the true answers, all [Q,S,S,3]."""
        assert self.network is not None
        true_statistics = FeatureStatistics.of(self.network(truths))
        return {
            source: frechet_distance(FeatureStatistics.of(self.network(pixels)), true_statistics)
            for source, pixels in answers.items()
        }
