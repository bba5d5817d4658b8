"""The engine that the HTTP service and the page share: one prompter behind a queue.

It validates requests against the model before they enter the queue.
Shapes: see `evaluation.prompting`.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future

import numpy as np

from EasyLM.errors import UserError, first_line
from EasyLM.flags import Flag
from evaluation.prompting import PROMPTER_FLAGS, GenerationSettings, LargestBatch, Prompter, PrompterSettings
from evaluation.serving.batch_worker import (
    Answer,
    BatchWorker,
    GenerateItem,
    Item,
    LikelihoodItem,
    Prompt,
    Reconstruction,
    ReconstructItem,
    TokenizeItem,
)
from evaluation.serving.batcher import Batcher, ClosedError
from evaluation.serving.progress import Preview
from evaluation.serving.workload import Workload, check_num_new_images, check_prompt_length
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
    "max_client_pictures": Flag(
        128,
        "Largest number of new images in the open requests of one client (an IP address); more requests get status "
        "429. An open request counts at most as many images as the new request, so that small requests are accepted "
        "beside a large one.",
        least=1,
    ),
    "warm_up": Flag(
        "7",
        "Comma list of prompt lengths, in images, to compile first: generation with default settings (the page: its "
        "initial settings) and, by the service, perplexity of one target; single requests, then batches. Other "
        "lengths, other numbers of candidates or new images are compiled at their first request, which does not delay "
        "others on one device. All values of temperature, top_k, top_p and seed share a program.",
    ),
}
# Requests for at most this many images do not wait for larger ones. The page asks for 4 at first.
_SHORT_COST = 4
SERVICE_ITEMS = (GenerateItem, LikelihoodItem, TokenizeItem)
PAGE_ITEMS = (ReconstructItem, GenerateItem)  # visitors see the reconstruction first


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
    max_client_pictures: int
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
        """Starts the worker threads."""
        self._prompter, self._settings = prompter, settings
        self._workload = Workload(settings.max_client_pictures)
        self._warm = threading.Event()
        self.warm_up_error = ""  # empty: warming up has not failed
        self._batcher = Batcher(
            BatchWorker(prompter),
            max_batch=settings.max_batch,
            max_waiting=settings.max_queue,
            window_seconds=settings.batch_window_ms / 1000,
            short_cost=_SHORT_COST,
            max_batch_cost=settings.max_new_pictures,
        )
        self._warm_up_thread: threading.Thread | None = None

    @classmethod
    def load(cls, prompter: PrompterSettings, settings: EngineSettings) -> "Engine":
        """Loads tokenizer and model, and starts the worker threads.

        Raises:
          UserError: naming the flag or the file that is wrong.
        """
        largest = LargestBatch()  # a single prompt: less than --max_batch of them can still be served
        return cls(Prompter.load(prompter, settings.pictures_at_a_time, largest), settings)

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
        is_finished = self._batcher.close(timeout)
        if self._warm_up_thread:
            self._warm_up_thread.join(1)  # it ends at once: its job is finished or cancelled
        return is_finished

    def warm_up(self, settings: GenerationSettings, kinds: Sequence[type[Item]] = SERVICE_ITEMS) -> Future:
        """Compiles the programs of common requests, in another thread than those whose program is compiled.

        For each batch size and each prompt length of `--warm_up`, compiles programs of these kinds in their order:
        generation with these settings, perplexity of one target. A program serves all values of temperature, top_k,
        top_p and seed.
        """
        future: Future = Future()
        future.add_done_callback(self._on_warmed_up)
        self._warm_up_thread = threading.Thread(target=self._compile_all, args=(settings, kinds, future), daemon=True)
        self._warm_up_thread.start()
        return future

    def _compile_all(self, settings: GenerationSettings, kinds: Sequence[type[Item]], future: Future) -> None:
        try:
            for exponent in range(self._settings.max_batch.bit_length()):
                for length in self._settings.warm_up_lengths:
                    begin = time.monotonic()
                    items = self._warm_up_items(min(length, self.max_prompt_images), settings)
                    for item in map(items.__getitem__, kinds):
                        key = "warm up", item.program, exponent
                        options = {"program": item.program, "copies": 2**exponent, "rehearsal": True}
                        self._batcher.submit(key, item, **options).result()
                    seconds = time.monotonic() - begin
                    logging.info("ready for %d requests of %d images (%.1f s)", 2**exponent, length, seconds)
        except (ClosedError, CancelledError):  # the service stops
            future.cancel()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    def _warm_up_items(self, length: int, settings: GenerationSettings) -> dict[type[Item], Item]:
        prompt, target = (
            Prompt(images=np.zeros((count, self.resolution, self.resolution, 3), np.float32)) for count in (length, 1)
        )
        generate, likelihood = GenerateItem(prompt, self._within_the_model(settings)), LikelihoodItem(prompt, target)
        return {type(item): item for item in (generate, likelihood, TokenizeItem(prompt), ReconstructItem(prompt))}

    def _on_warmed_up(self, future: Future) -> None:
        if future.cancelled():  # the service stops
            return
        if error := future.exception():
            logging.error("warming up failed", exc_info=error)
            self.warm_up_error = first_line(error)
        else:
            self._warm.set()

    def generate(
        self,
        prompt: Prompt,
        settings: GenerationSettings,
        listener: Callable[[Preview], None] | None = None,
        client: str = "",
    ) -> "Future[Answer]":
        """Generates the images that follow a prompt.

        Args:
          prompt: at least one image.
          settings: how to generate.
          listener: receives previews, in a worker thread.
          client: who asks. The queue is fair between clients.

        Raises:
          UserError: for a prompt that is too long or has invalid tokens, or for too many new images.
          QueueFullError, ClosedError: see `Batcher.submit`.
        """
        self._check_prompt(prompt)
        check_num_new_images(settings, self._settings.max_new_pictures)
        return self._submit(GenerateItem(prompt, self._within_the_model(settings)), client, listener)

    def log_likelihoods(self, prompt: Prompt, target: Prompt, client: str = "") -> "Future[np.ndarray]":
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
        return self._submit(LikelihoodItem(prompt, target), client)

    def tokenize(self, prompt: Prompt, client: str = "") -> "Future[np.ndarray]":
        """Returns the tokens of a prompt's images: [P,N]. Raises: as `generate`."""
        self._check_prompt(prompt)
        return self._submit(TokenizeItem(prompt), client)

    def reconstruct(self, prompt: Prompt, client: str = "") -> "Future[Reconstruction]":
        """Encodes the images of a prompt and decodes their tokens. Raises: as `generate`."""
        self._check_prompt(prompt)
        return self._submit(ReconstructItem(prompt), client)

    @contextlib.contextmanager
    def admitted(self, client: str, settings: GenerationSettings | None = None) -> Iterator[None]:
        """Counts a request of a client as outstanding work until the context ends; see `Workload.admitted`.

        `settings`: those of generation; None: the request generates nothing.
        """
        cost = settings.num_candidates * settings.num_new_images if settings else 1
        with self._workload.admitted(client, cost):
            yield

    def check_length(self, num_images: int) -> None:
        """Raises UserError if a prompt with this many images is too long. Cheap: call it before decoding them."""
        check_prompt_length(num_images, self.max_prompt_images)

    def _submit(self, item: Item, client: str, listener: Callable[[Preview], None] | None = None) -> Future:
        options = {"program": item.program, "cost": item.cost, "client": client}
        return self._batcher.submit(item.key, item, listener, **options)

    def _within_the_model(self, settings: GenerationSettings) -> GenerationSettings:
        """Settings of the same answer whose window is not longer than the model's: they share batches and programs."""
        window = max(min(settings.context_images, self._prompter.max_images), 2)
        return dataclasses.replace(settings, context_images=window)

    def _check_prompt(self, prompt: Prompt) -> None:
        self.check_length(len(prompt))
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
