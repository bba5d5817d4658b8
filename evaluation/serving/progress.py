"""Previews: the images of a request before all its tokens are generated.

Shapes: see `evaluation.prompting`.
"""

import dataclasses
import math
import time
from collections.abc import Sequence

import numpy as np

from evaluation.prompting import Prompter
from evaluation.serving.batcher import AbandonedError, Job

_GRAY = 0.5  # value of pixels that are not generated yet
_PAUSE_FACTOR = 2  # pause after previews, in multiples of their duration: previews take at most a third of the time


@dataclasses.dataclass(frozen=True)
class Preview:
    """Images [C,F,S,S,3] with the pixels that are not generated yet in gray.

    `done` of `total` tokens of each candidate are generated.
    """

    images: np.ndarray
    done: int
    total: int


class PreviewReporter:
    """The `progress` callback of `Prompter.generate` for a batch of jobs.

    Sends previews to the listeners of the jobs, and stops the batch when all its jobs are cancelled.
    `job.item.settings` are the `GenerationSettings` of a job.
    """

    def __init__(self, prompter: Prompter, jobs: Sequence[Job], num_prompts: int, num_new_images: int):
        """Reports to `jobs`. `num_prompts` includes the copies that pad the batch."""
        self._prompter, self._jobs = prompter, jobs
        self._num_prompts, self._num_new_images = num_prompts, num_new_images
        self._finished: list[np.ndarray] = []  # tokens [B,C,n] from earlier caches
        self._current: np.ndarray | None = None  # tokens [B,C,n] from the current cache
        self._next_preview = 0.0

    def __call__(self, tokens: np.ndarray) -> None:
        """Receives the tokens of the current cache: [B, C, n], or [B C, 1, n] once the window moves.

        Raises:
          AbandonedError: if all jobs are cancelled.
        """
        if all(job.future.cancelled() for job in self._jobs):
            raise AbandonedError("all jobs of this batch are cancelled")
        tokens_BCn = tokens.reshape(self._num_prompts, -1, tokens.shape[-1])
        if self._current is not None and tokens_BCn.shape[-1] <= self._current.shape[-1]:
            self._finished.append(self._current)
        self._current = tokens_BCn
        begin = time.monotonic()
        if begin < self._next_preview:
            return
        self._send_previews(np.concatenate([*self._finished, self._current], axis=-1))
        now = time.monotonic()
        self._next_preview = now + _PAUSE_FACTOR * (now - begin)

    def _send_previews(self, tokens_BCn: np.ndarray) -> None:
        total = self._num_new_images * self._prompter.tokens_per_image
        for tokens_Cn, job in zip(tokens_BCn, self._jobs, strict=False):  # padding has no job
            if job.listener and not job.future.cancelled() and tokens_Cn.shape[-1] < total:
                tokens_Cn = tokens_Cn[: job.item.settings.num_candidates]
                preview = render_preview(self._prompter, tokens_Cn, self._num_new_images)
                job.listener(Preview(preview, tokens_Cn.shape[-1], total))


def render_preview(prompter: Prompter, tokens_Cn: np.ndarray, num_new_images: int) -> np.ndarray:
    """Decodes the first n tokens of F images to [C,F,S,S,3]. Rows with missing tokens are gray."""
    tokens_per_image = prompter.tokens_per_image
    columns = math.isqrt(tokens_per_image)
    num_candidates, done = tokens_Cn.shape
    num_begun = -(-done // tokens_per_image)
    padding = num_begun * tokens_per_image - done
    tokens_CFN = np.pad(tokens_Cn, ((0, 0), (0, padding)), mode="edge").reshape(num_candidates, num_begun, -1)
    begun = prompter.decode(tokens_CFN)
    side = begun.shape[2]
    complete_rows = (done - (num_begun - 1) * tokens_per_image) // columns
    begun[:, -1, complete_rows * side // columns :] = _GRAY
    gray = np.full((num_candidates, num_new_images - num_begun, *begun.shape[2:]), _GRAY, np.float32)
    return np.concatenate([begun, gray], axis=1)
