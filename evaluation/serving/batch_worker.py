"""Computes batches of generation, likelihood and tokenization requests, in the engine's worker thread.

Shapes: see `evaluation.prompting`.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from evaluation.prompting import GenerationSettings, Prompter
from evaluation.serving.batcher import Job
from evaluation.serving.progress import PreviewReporter


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """Images [P,S,S,3] in [0, 1], or their tokens [P,N]. Exactly one of the two is set."""

    images: np.ndarray | None = None
    tokens: np.ndarray | None = None

    def __len__(self) -> int:
        values = self.tokens if self.images is None else self.images
        return 0 if values is None else len(values)


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """Generated images [C,F,S,S,3] and their tokens [C,F,N]. `batch`: size of the request's batch."""

    images: np.ndarray
    tokens: np.ndarray
    batch: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class GenerateItem:
    """A generation request. Its result is an `Answer`."""

    prompt: Prompt
    settings: GenerationSettings

    @property
    def batch_settings(self) -> GenerationSettings:
        """Settings of the whole batch. Each item has its own seed and uses its first `num_candidates` samples."""
        return dataclasses.replace(self.settings, seed=0, num_candidates=power_of_two(self.settings.num_candidates))

    @property
    def key(self) -> Hashable:
        return "generate", len(self.prompt), self.batch_settings


@dataclasses.dataclass(frozen=True, eq=False)
class LikelihoodItem:
    """A likelihood request. Its result is log p, in nats, of each target token: [P of the target, N]."""

    prompt: Prompt
    target: Prompt

    @property
    def key(self) -> Hashable:
        return "log_likelihoods", len(self.prompt), len(self.target)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizeItem:
    """A tokenization request. Its result is the tokens [P,N] of the prompt."""

    prompt: Prompt
    key: Hashable = "tokenize"


@dataclasses.dataclass(frozen=True, eq=False)
class WarmUpItem:
    """A request to compile generation with these settings, and likelihoods of one target, for each prompt length."""

    settings: GenerationSettings
    prompt_lengths: tuple[int, ...]
    max_batch: int
    is_cancelled: Callable[[], bool]
    key: Hashable = "warm_up"


class BatchWorker:
    """Computes batches with one prompter. All methods run in the batcher's thread."""

    def __init__(self, prompter: Prompter):
        self._prompter = prompter

    def __call__(self, jobs: Sequence[Job]) -> Sequence:
        """Returns the results of jobs with equal keys, in order."""
        items = [job.item for job in jobs]
        match items[0]:
            case GenerateItem():
                return self._generate(jobs)
            case LikelihoodItem():
                return self._log_likelihoods(items)
            case TokenizeItem():
                return self._tokens([item.prompt for item in items])
            case WarmUpItem():
                for item in items:
                    self._warm_up(item)
                return [None] * len(items)
        raise TypeError(f"unknown item: {items[0]!r}")

    def _generate(self, jobs: Sequence[Job]) -> list[Answer]:
        items: list[GenerateItem] = [job.item for job in jobs]
        prompts = _padded(self._tokens([item.prompt for item in items]))
        settings = items[0].batch_settings
        tokens_BCFN = self._prompter.generate(
            prompts,
            settings,
            seeds=_padded([item.settings.seed for item in items]),
            progress=PreviewReporter(self._prompter, jobs, len(prompts), settings.num_new_images),
        )
        tokens = [tokens_CFN[: item.settings.num_candidates] for tokens_CFN, item in zip(tokens_BCFN, items)]
        images = self._prompter.decode(np.concatenate(tokens))  # all candidates in one call
        split_images = np.split(images, np.cumsum([len(tokens_CFN) for tokens_CFN in tokens])[:-1])
        return [Answer(*pair, batch=len(jobs)) for pair in zip(split_images, tokens, strict=True)]

    def _log_likelihoods(self, items: Sequence[LikelihoodItem]) -> list[np.ndarray]:
        tokens = self._tokens([prompt for item in items for prompt in (item.prompt, item.target)])
        prompts, targets = _padded(tokens[::2]), _padded(tokens[1::2])
        log_p = self._prompter.log_likelihoods(prompts, targets)
        return list(log_p.reshape(len(prompts), *targets[0].shape)[: len(items)])

    def _warm_up(self, item: WarmUpItem) -> None:
        side = self._prompter.codec.resolution
        for length in item.prompt_lengths:
            prompt = Prompt(images=np.zeros((length, side, side, 3), np.float32))
            generation = GenerateItem(prompt, item.settings)
            likelihood = LikelihoodItem(prompt, Prompt(images=np.zeros((1, side, side, 3), np.float32)))
            for exponent in range(item.max_batch.bit_length()):
                if item.is_cancelled():  # do not delay waiting requests while the service stops
                    return
                begin = time.monotonic()
                self._generate([Job(generation.key, generation)] * 2**exponent)
                self._log_likelihoods([likelihood] * 2**exponent)
                seconds = time.monotonic() - begin
                logging.info("ready for %d requests of %d images (%.1f s)", 2**exponent, length, seconds)

    def _tokens(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        """Returns the tokens [P,N] of each prompt. Encodes all images in one call."""
        images = [prompt.images for prompt in prompts if prompt.images is not None]
        encoded = self._prompter.encode(np.concatenate(images)) if images else np.empty((0, 0), np.int32)
        tokens, begin = [], 0
        for prompt in prompts:
            if prompt.tokens is None:
                tokens.append(encoded[begin : begin + len(prompt)])
                begin += len(prompt)
            else:
                tokens.append(prompt.tokens)
        return tokens


def power_of_two(count: int) -> int:
    """Returns the smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


def _padded(rows: list) -> list:
    """Repeats the last row up to a power of two, so that few batch sizes are compiled. Results do not change."""
    return rows + [rows[-1]] * (power_of_two(len(rows)) - len(rows))
