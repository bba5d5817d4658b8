"""The engine that the HTTP service and the page share: one prompter behind a queue.

It validates requests against the model before they enter the queue.
Shapes: see `evaluation.prompting`.
"""

import dataclasses
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from EasyLM.errors import UserError
from EasyLM.flags import Flag
from evaluation.prompting import PROMPTER_FLAGS, GenerationSettings, Prompter, PrompterSettings
from evaluation.serving.batch_worker import (
    Answer,
    BatchWorker,
    GenerateItem,
    LikelihoodItem,
    Prompt,
    TokenizeItem,
    WarmUpItem,
)
from evaluation.serving.batcher import Batcher
from evaluation.serving.progress import Preview
from evaluation.tasks import metrics

ENGINE_FLAGS = {
    **PROMPTER_FLAGS,
    "max_batch": Flag(8, "Requests computed in one batch: a power of two. Does not change results.", least=1),
    "batch_window_ms": Flag(
        5, "Longest wait for requests to join a batch while the device is idle, in milliseconds.", least=0
    ),
    "pictures_at_a_time": Flag(8, "Batch size of the tokenizer. Does not change results.", least=1),
    "max_queue": Flag(64, "Largest number of waiting requests; more are refused.", least=1),
    "max_new_pictures": Flag(64, "Largest n_candidates times n_new_frames of a request.", least=1),
    "warm_up": Flag(
        "7",
        "Comma list of prompt lengths, in images, to compile before the first request: generation with default "
        "settings (the page: its initial settings) and perplexity of one target. Other lengths, other numbers of "
        "candidates or new images, temperature 0, top_k and top_p are compiled at their first request.",
    ),
}


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """Values of ENGINE_FLAGS, without those of the prompter.

    Raises:
      UserError: naming the flag.
    """

    max_batch: int
    batch_window_ms: int
    pictures_at_a_time: int
    max_queue: int
    max_new_pictures: int
    warm_up: str

    def __post_init__(self) -> None:
        if self.max_batch & (self.max_batch - 1):
            raise UserError(f"--max_batch={self.max_batch}: must be a power of two")
        if not all(length >= 1 for length in self.warm_up_lengths):
            raise UserError(f"--warm_up={self.warm_up}: each length must be at least 1")

    @property
    def warm_up_lengths(self) -> tuple[int, ...]:
        """The prompt lengths to compile, in images."""
        try:
            return tuple(int(part) for part in self.warm_up.split(",") if part.strip())
        except ValueError:
            raise UserError(
                f"--warm_up={self.warm_up}: must be a comma list of numbers of images, such as 3,7"
            ) from None


class Engine:
    """Generates, measures and tokenizes for many callers. The result of a request does not depend on the others."""

    def __init__(self, prompter: Prompter, settings: EngineSettings):
        """Starts the worker thread."""
        self._prompter, self._settings = prompter, settings
        self._warm = threading.Event()
        self.warm_up_error = ""  # empty: warming up has not failed
        self._batcher = Batcher(
            BatchWorker(prompter),
            max_batch=settings.max_batch,
            max_waiting=settings.max_queue,
            window_seconds=settings.batch_window_ms / 1000,
        )

    @classmethod
    def load(cls, prompter: PrompterSettings, settings: EngineSettings) -> "Engine":
        """Loads tokenizer and model, and starts the worker thread.

        Raises:
          UserError: naming the flag or the file that is wrong.
        """
        return cls(Prompter.load(prompter, settings.pictures_at_a_time), settings)

    @property
    def resolution(self) -> int:
        """Side, in pixels, of the images of a prompt."""
        return self._prompter.codec.resolution

    @property
    def tokens_per_image(self) -> int:
        return self._prompter.tokens_per_image

    @property
    def max_prompt_images(self) -> int:
        """Images of the longest prompt: one fewer than the model's longest sequence holds."""
        return self._prompter.max_images - 1

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return self._batcher.num_waiting

    @property
    def state(self) -> str:
        """`warming up`, `ready`, `failed` or `stopping`. Requests are computed even if warming up failed."""
        if self._batcher.closed:
            return "stopping"
        if self.warm_up_error:
            return "failed"
        return "ready" if self._warm.is_set() else "warming up"

    def close(self, timeout: float | None = None) -> bool:
        """Stops accepting requests and waits for the accepted ones; see `Batcher.close`."""
        return self._batcher.close(timeout)

    def warm_up(self, settings: GenerationSettings) -> Future:
        """Compiles the programs of common requests. Requests that arrive meanwhile wait.

        For each prompt length of `--warm_up` and each batch size, compiles generation with these settings and the
        perplexity of one target. A program serves all values of temperature above 0, top_k and top_p. Enabling or
        disabling one of them needs another program.
        """
        lengths = tuple(min(length, self.max_prompt_images) for length in self._settings.warm_up_lengths)
        item = WarmUpItem(settings, lengths, self._settings.max_batch, lambda: self._batcher.closed)
        future = self._batcher.submit(item.key, item)
        future.add_done_callback(self._on_warmed_up)
        return future

    def _on_warmed_up(self, future: Future) -> None:
        if future.cancelled():  # the service stops
            return
        if error := future.exception():
            logging.error("warming up failed", exc_info=error)
            self.warm_up_error = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            self._warm.set()

    def generate(
        self, prompt: Prompt, settings: GenerationSettings, listener: Callable[[Preview], None] | None = None
    ) -> "Future[Answer]":
        """Generates the images that follow a prompt.

        Args:
          prompt: at least one image.
          settings: how to generate.
          listener: receives previews, in the worker thread.

        Raises:
          UserError: for a prompt that is too long or has invalid tokens, or for too many new images.
          QueueFullError, ClosedError: see `Batcher.submit`.
        """
        self._check_prompt(prompt)
        if settings.num_candidates * settings.num_new_images > self._settings.max_new_pictures:
            raise UserError(
                f"n_candidates={settings.num_candidates}, n_new_frames={settings.num_new_images}: at most "
                f"{self._settings.max_new_pictures} new images per request"
            )
        item = GenerateItem(prompt, settings)
        return self._batcher.submit(item.key, item, listener)

    def log_likelihoods(self, prompt: Prompt, target: Prompt) -> "Future[np.ndarray]":
        """Returns log p, in nats, of each token of the target after the prompt: [P of the target, N].

        Raises: as `generate`.
        """
        self._check_prompt(prompt)
        self._check_prompt(target)
        if len(prompt) + len(target) > self._prompter.max_images:
            raise UserError(
                f"{len(prompt)} images and {len(target)} targets: the model's longest sequence holds "
                f"{self._prompter.max_images}"
            )
        item = LikelihoodItem(prompt, target)
        return self._batcher.submit(item.key, item)

    def tokenize(self, prompt: Prompt) -> "Future[np.ndarray]":
        """Returns the tokens of a prompt's images: [P,N]. Raises: as `generate`."""
        self._check_prompt(prompt)
        item = TokenizeItem(prompt)
        return self._batcher.submit(item.key, item)

    def _check_prompt(self, prompt: Prompt) -> None:
        if len(prompt) > self.max_prompt_images:
            raise UserError(f"{len(prompt)} images: a prompt has at most {self.max_prompt_images} for this model")
        if prompt.tokens is not None:
            num_codes = self._prompter.codec.num_codes
            if prompt.tokens.shape[1] != self.tokens_per_image:
                raise UserError(f"tokens: each image has {self.tokens_per_image} tokens")
            if prompt.tokens.min() < 0 or prompt.tokens.max() >= num_codes:
                wrong = prompt.tokens[(prompt.tokens < 0) | (prompt.tokens >= num_codes)][0]
                raise UserError(f"token id {wrong}: must be 0..{num_codes - 1}, the codes of the tokenizer")


def perplexity(log_likelihoods: np.ndarray) -> float:
    """Returns the perplexity over all tokens of one request."""
    return float(metrics.perplexity(log_likelihoods.reshape(1, -1))[0])
