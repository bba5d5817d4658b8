"""What the service and the page share: one prompter behind a queue, requests checked before they wait.

Shapes: B requests of a batch, P pictures of a prompt, F pictures drawn, C candidates, N tokens of an image, S the side
in pixels.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from EasyLM.errors import UserError
from EasyLM.flags import Flag, to_dataclass
from EasyLM.models import generate
from evaluation.prompting import PROMPTER_FLAGS, GenerationSettings, Prompter, PrompterSettings
from evaluation.serving.batcher import Batcher, Job
from evaluation.serving.progress import Partial, Progress
from evaluation.tasks import metrics

ENGINE_FLAGS = {
    **PROMPTER_FLAGS,
    "max_batch": Flag(8, "Requests that are computed at a time: a power of two; changes no result."),
    "batch_window_ms": Flag(5, "How long a request waits for others to join it while the device is idle."),
    "pictures_at_a_time": Flag(8, "Pictures that the tokenizer computes at a time, always; changes no result."),
    "max_queue": Flag(64, "Requests that may wait; more are refused."),
    "max_new_pictures": Flag(64, "The most n_candidates times n_new_frames that a request may ask for."),
    "warm_up": Flag(
        "7",
        "Comma list of prompt lengths, in pictures, that are compiled before the first request: drawing with the "
        "settings of a request that gives none (the page: its own at the start), and perplexity of one target. Other "
        "lengths, other numbers of candidates or new pictures, temperature 0, top_k and top_p are compiled when the "
        "first request with them comes.",
    ),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How pictures are drawn; see `Prompter.answer`."""

    n_new_frames: int = 1
    n_candidates: int = 1
    context_frames: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Pictures [P,S,S,3] in [0, 1], or the tokens [P,N] that stand for them."""

    pictures: np.ndarray | None = None
    tokens: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens if self.pictures is None else self.pictures)


@dataclasses.dataclass(frozen=True)
class Answer:
    """Pictures [C,F,S,S,3] and their tokens [C,F,N]; of `batch` requests computed together."""

    pictures: np.ndarray
    tokens: np.ndarray
    batch: int = 1


class Engine:
    """Draws, measures and tokenizes for many callers at once. What a request gets does not depend on the others."""

    def __init__(self, prompter: Prompter, config):
        """Starts the worker. `config` has the values of ENGINE_FLAGS.

        Raises:
          UserError: naming the flag that is out of its range.
        """
        for name in ("max_batch", "pictures_at_a_time", "max_queue", "max_new_pictures"):
            if config[name] < 1:
                raise UserError(f"--{name}={config[name]}: must be at least 1")
        if config.max_batch & (config.max_batch - 1):
            raise UserError(f"--max_batch={config.max_batch}: must be a power of two")
        if config.batch_window_ms < 0:
            raise UserError(f"--batch_window_ms={config.batch_window_ms}: must be at least 0")
        self._prompter, self._config = prompter, config
        self._warm_up_lengths = _lengths(config.warm_up, prompter.max_images - 1)
        self._warm = threading.Event()
        self.fault = ""  # why warming up failed
        self._batcher = Batcher(
            self._run,
            max_batch=config.max_batch,
            max_waiting=config.max_queue,
            window_seconds=config.batch_window_ms / 1000,
        )

    @classmethod
    def load(cls, config) -> "Engine":
        """The engine of the flags ENGINE_FLAGS.

        Raises:
          UserError: naming the flag or the file that is wrong.
        """
        return cls(Prompter.load(to_dataclass(PrompterSettings, config), config.pictures_at_a_time), config)

    @property
    def resolution(self) -> int:
        """The side in pixels that pictures must have."""
        return self._prompter.codec.config.resolution

    @property
    def tokens_per_image(self) -> int:
        return self._prompter.tokens_per_image

    @property
    def max_pictures(self) -> int:
        """Pictures that a prompt may have: one fewer than the model's longest sequence holds."""
        return self._prompter.max_images - 1

    @property
    def state(self) -> str:
        """`warming up`, `ready`, `failed` (to warm up: requests are tried all the same) or `stopping`."""
        if self._batcher.closed:
            return "stopping"
        if self.fault:
            return "failed"
        return "ready" if self._warm.is_set() else "warming up"

    def close(self, timeout: float | None = None) -> bool:
        """Takes no more requests and finishes those taken; False, and they are cancelled, if that takes too long."""
        return self._batcher.close(timeout)

    def warm_up(self, settings: Settings) -> Future:
        """Compiles what a first request would wait for: others that come meanwhile wait behind it.

        That is, for each prompt length of `--warm_up` and each size of a batch, drawing with such settings, and the
        perplexity of one target. Of the sampling only what is in use matters: another temperature above 0 is no other
        program, nor another top_k or top_p where `settings` has one.
        """
        future = self._batcher.submit(("warm_up",), settings)
        future.add_done_callback(self._warmed_up)
        return future

    def _warmed_up(self, future: Future) -> None:
        if future.cancelled():  # the service stops
            return
        if error := future.exception():
            logging.error("warming up failed", exc_info=error)
            self.fault = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            self._warm.set()

    def generate(
        self, prompt: Prompt, settings: Settings, listener: Callable[[Partial], None] | None = None
    ) -> "Future[Answer]":
        """The pictures that follow a prompt. `listener` is called in the worker's thread while they are drawn.

        Raises:
          UserError: naming the setting that is out of its range, or what is wrong with the prompt.
          QueueFullError, ClosedError: see `Batcher.submit`.
        """
        self._check(prompt)
        generate.check_sampling(settings.temperature, settings.top_k, settings.top_p)
        for name in ("n_candidates", "n_new_frames"):
            if getattr(settings, name) < 1:
                raise UserError(f"{name}={getattr(settings, name)}: must be at least 1")
        if settings.n_candidates * settings.n_new_frames > self._config.max_new_pictures:
            raise UserError(
                f"n_candidates={settings.n_candidates}, n_new_frames={settings.n_new_frames}: at most "
                f"{self._config.max_new_pictures} pictures are drawn for a request"
            )
        generate.check_seed(settings.seed)
        if settings.context_frames < 2:
            raise UserError(f"context_frames={settings.context_frames}: must be at least 2")
        # Each draws by its own seed, and a candidate by its number: neither keeps requests apart.
        alike = dataclasses.replace(settings, seed=0, n_candidates=_power_of_two(settings.n_candidates))
        return self._batcher.submit(("generate", len(prompt), alike), (prompt, settings), listener)

    def log_likelihoods(self, prompt: Prompt, target: Prompt) -> "Future[np.ndarray]":
        """log p, in nats, of each token of the target's pictures after the prompt: [P of the target, N].

        Raises: as `generate`.
        """
        self._check(prompt)
        self._check(target)
        if len(prompt) + len(target) > self._prompter.max_images:
            raise UserError(
                f"{len(prompt)} pictures and {len(target)} targets: the model's longest sequence holds "
                f"{self._prompter.max_images}"
            )
        return self._batcher.submit(("log_likelihoods", len(prompt), len(target)), (prompt, target))

    def tokenize(self, prompt: Prompt) -> "Future[np.ndarray]":
        """The tokens of pictures: [P,N]. Raises: as `generate`."""
        self._check(prompt)
        return self._batcher.submit(("tokenize",), prompt)

    def _check(self, prompt: Prompt) -> None:
        if len(prompt) == 0:
            raise UserError("a prompt without pictures: give at least one")
        if len(prompt) > self.max_pictures:
            raise UserError(f"{len(prompt)} pictures: this model takes at most {self.max_pictures}")
        if prompt.tokens is not None:
            codes = self._prompter.codec.config.num_embeddings
            if prompt.tokens.ndim != 2 or prompt.tokens.shape[1] != self.tokens_per_image:
                raise UserError(f"tokens: each picture has {self.tokens_per_image}")
            if prompt.tokens.min() < 0 or prompt.tokens.max() >= codes:
                wrong = prompt.tokens[(prompt.tokens < 0) | (prompt.tokens >= codes)][0]
                raise UserError(f"token id {wrong}: must be from 0 to {codes - 1}, the tokenizer's codes")

    # From here on: in the worker's thread.

    def _run(self, jobs: Sequence[Job]) -> Sequence:
        return {
            "generate": self._generate,
            "log_likelihoods": self._log_likelihoods,
            "tokenize": self._tokenize,
            "warm_up": self._warm_up,
        }[jobs[0].key[0]](jobs)

    def _generate(self, jobs: Sequence[Job]) -> list[Answer]:
        _, _, alike = jobs[0].key
        prompts = _filled_up(self._tokens([job.item[0] for job in jobs]))
        seeds = _filled_up([job.item[1].seed for job in jobs])
        tokens_BCFN = self._prompter.generate(
            prompts,
            GenerationSettings.from_user(dataclasses.asdict(alike)),
            seeds=seeds,
            progress=Progress(self._prompter, jobs, len(prompts), alike.n_new_frames),
        )
        drawn = [tokens_BCFN[i, : job.item[1].n_candidates] for i, job in enumerate(jobs)]
        pictures = self._draw(drawn)
        return [Answer(*both, batch=len(jobs)) for both in zip(pictures, drawn, strict=True)]

    def _log_likelihoods(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        tokens = self._tokens([prompt for job in jobs for prompt in job.item])
        prompts, targets = _filled_up(tokens[::2]), _filled_up(tokens[1::2])
        return list(
            self._prompter.log_likelihoods(prompts, targets).reshape(len(prompts), *targets[0].shape)[: len(jobs)]
        )

    def _tokenize(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        return self._tokens([job.item for job in jobs])

    def _warm_up(self, jobs: Sequence[Job]) -> list[None]:
        for job in jobs:
            for length in self._warm_up_lengths:
                prompt = Prompt(pictures=np.zeros((length, self.resolution, self.resolution, 3), np.float32))
                alike = dataclasses.replace(job.item, n_candidates=_power_of_two(job.item.n_candidates))
                for exponent in range(self._config.max_batch.bit_length()):
                    if self._batcher.closed:  # requests behind this one wait to be finished, compiled or not
                        return [None] * len(jobs)
                    begin = time.monotonic()
                    self._generate([Job(("generate", length, alike), (prompt, job.item))] * 2**exponent)
                    self._log_likelihoods([Job(None, (prompt, Prompt(prompt.pictures[:1])))] * 2**exponent)
                    seconds = time.monotonic() - begin
                    logging.info("ready for %d requests of %d pictures (%.1f s)", 2**exponent, length, seconds)
        return [None] * len(jobs)

    def _tokens(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        """Tokens [P,N] of each prompt; all pictures go through the tokenizer together."""
        pictures = [prompt.pictures for prompt in prompts if prompt.tokens is None]
        encoded = self._prompter.encode(np.concatenate(pictures)) if pictures else []
        tokens, begin = [], 0
        for prompt in prompts:
            if prompt.tokens is None:
                tokens.append(encoded[begin : begin + len(prompt)])
                begin += len(prompt)
            else:
                tokens.append(prompt.tokens)
        return tokens

    def _draw(self, tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pictures of several [C,F,N], C may differ; all go through the tokenizer together."""
        pictures = self._prompter.decode(np.concatenate(tokens))
        return np.split(pictures, np.cumsum([len(part) for part in tokens])[:-1])


def perplexity(log_likelihoods: np.ndarray) -> float:
    """Of one example's tokens."""
    return float(metrics.perplexity(log_likelihoods.reshape(1, -1))[0])


def _filled_up(rows: list) -> list:
    """The rows, the last one repeated up to a power of two: few sizes are compiled, and no row's result changes."""
    return rows + [rows[-1]] * (_power_of_two(len(rows)) - len(rows))


def _power_of_two(count: int) -> int:
    """The smallest that is at least `count`."""
    return 1 << (count - 1).bit_length()


def _lengths(text: str, most: int) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--warm_up={text}: give numbers of pictures, as 3,7") from None
    for length in lengths:
        if length < 1:
            raise UserError(f"--warm_up={text}: {length} pictures: must be at least 1")
    return [min(length, most) for length in lengths]
