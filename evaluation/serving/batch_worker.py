"""Computes batches of generation, likelihood, tokenization and reconstruction requests, in the engine's worker thread.

Shapes: see `evaluation.prompting`.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from evaluation.prompting import GenerationSettings, Prompter
from evaluation.serving.batcher import Job, power_of_two
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
class Reconstruction:
    """The tokens [P,N] of a prompt, and the images [P,S,S,3] that the tokenizer decodes from them."""

    tokens: np.ndarray
    images: np.ndarray


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

    @property
    def program(self) -> Hashable:
        """What is compiled. The values of temperature, top_k and top_p are inputs of the program."""
        settings = self.batch_settings
        return (
            "generate",
            len(self.prompt),
            settings.num_candidates,
            settings.num_new_images,
            settings.context_images,
        )

    @property
    def cost(self) -> int:
        """The number of images that are computed."""
        return self.batch_settings.num_candidates * self.settings.num_new_images


@dataclasses.dataclass(frozen=True, eq=False)
class LikelihoodItem:
    """A likelihood request. Its result is log p, in nats, of each target token: [P of the target, N]."""

    prompt: Prompt
    target: Prompt
    cost: int = 1

    @property
    def key(self) -> Hashable:
        return "log_likelihoods", len(self.prompt), len(self.target)

    @property
    def program(self) -> Hashable:
        return self.key


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizeItem:
    """A tokenization request. Its result is the tokens [P,N] of the prompt."""

    prompt: Prompt
    key: Hashable = "tokenize"
    program: Hashable = "tokenize"
    cost: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class ReconstructItem:
    """A request to encode and decode images. Its result is a `Reconstruction`."""

    prompt: Prompt
    key: Hashable = "reconstruct"
    program: Hashable = "reconstruct"
    cost: int = 1


Item = GenerateItem | LikelihoodItem | TokenizeItem | ReconstructItem


class Turns:
    """A lock that threads acquire in the order of their requests."""

    def __init__(self) -> None:
        self._changed, self._num_asked, self._num_served = threading.Condition(), 0, 0

    def __enter__(self) -> None:
        with self._changed:
            ticket = self._num_asked
            self._num_asked += 1
            self._changed.wait_for(lambda: ticket == self._num_served)

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._num_served += 1
            self._changed.notify_all()


class BatchWorker:
    """Computes batches with one prompter, in several threads at the same time."""

    def __init__(self, prompter: Prompter):
        self._prompter = prompter
        # On several devices, two programs at the same time could start their collectives in different orders and wait
        # for each other for ever. There, batches take turns; a batch that is compiled keeps its turn meanwhile.
        self._turns = contextlib.nullcontext() if prompter.mesh.size == 1 else Turns()

    def __call__(self, jobs: Sequence[Job]) -> Sequence:
        """Returns the results of jobs with equal keys, in order."""
        items = [job.item for job in jobs]
        with self._turns:
            match items[0]:
                case GenerateItem():
                    return self._generate(jobs)
                case LikelihoodItem():
                    return self._log_likelihoods(items)
                case TokenizeItem():
                    return self._tokens([item.prompt for item in items])
                case ReconstructItem():
                    return self._reconstruct([item.prompt for item in items])
        raise TypeError(f"unknown item: {items[0]!r}")

    def _generate(self, jobs: Sequence[Job]) -> list[Answer]:
        items: list[GenerateItem] = [job.item for job in jobs]
        prompts = _padded(self._tokens([item.prompt for item in items]))
        settings = items[0].batch_settings
        tokens_BCFN = self._prompter.generate(
            prompts,
            settings,
            seeds=_padded([item.settings.seed for item in items]),
            progress=self._progress(PreviewReporter(self._prompter, jobs, len(prompts), settings.num_new_images)),
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

    def _reconstruct(self, prompts: Sequence[Prompt]) -> list[Reconstruction]:
        tokens = self._tokens(prompts)
        images = self._prompter.decode(np.concatenate(tokens))  # all prompts in one call
        split_images = np.split(images, np.cumsum([len(prompt) for prompt in prompts])[:-1])
        return [Reconstruction(*pair) for pair in zip(tokens, split_images, strict=True)]

    def _progress(self, report: PreviewReporter) -> Callable[[np.ndarray], None]:
        def report_and_pass_on(tokens: np.ndarray) -> None:
            report(tokens)
            self._turns.__exit__(None, None, None)  # other batches run
            self._turns.__enter__()

        return report_and_pass_on

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


def _padded(rows: list) -> list:
    """Repeats the last row up to a power of two, so that few batch sizes are compiled. Results do not change."""
    return rows + [rows[-1]] * (power_of_two(len(rows)) - len(rows))
