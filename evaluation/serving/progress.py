"""Pictures on their way: what those who listen to a batch see while its tokens come.

Shapes: B prompts, C candidates, F pictures drawn, N tokens of an image, S the side in pixels, n tokens so far.
"""

import dataclasses
import math
import time
from collections.abc import Sequence

import numpy as np

from evaluation.prompting.prompter import Prompter
from evaluation.serving.batcher import AbandonedError, Job

_GRAY = 0.5  # what is not drawn yet
_SHARE = 2  # after pictures on the way, so many times as long goes into tokens alone


@dataclasses.dataclass(frozen=True)
class Partial:
    """Pictures [C,F,S,S,3] as far as they are drawn, the rest gray: `done` tokens of `total` of each candidate."""

    pictures: np.ndarray
    done: int
    total: int


class Progress:
    """The `progress` of `Prompter.answer` for a batch of jobs: tells those who listen, stops when nobody waits.

    A job's item is (prompt, settings); its listener takes a `Partial`.
    """

    def __init__(self, prompter: Prompter, jobs: Sequence[Job], prompts: int, frames: int):
        self._prompter, self._jobs, self._prompts, self._frames = prompter, jobs, prompts, frames
        self._finished = []  # tokens [B,C,n] of pictures from caches before the present one
        self._current = None  # those from the present one, so far
        self._not_before = 0.0

    def __call__(self, tokens: np.ndarray) -> None:
        """`tokens`: from the present cache so far, [B, C, n]; once the window moves, [B C, 1, n].

        Raises:
          AbandonedError: if all of the jobs are cancelled.
        """
        if all(job.future.cancelled() for job in self._jobs):
            raise AbandonedError("nobody waits for this batch any more")
        tokens_BCn = tokens.reshape(self._prompts, -1, tokens.shape[-1])
        if self._current is not None and tokens_BCn.shape[-1] <= self._current.shape[-1]:
            self._finished.append(self._current)
        self._current = tokens_BCn
        begin = time.monotonic()
        if begin < self._not_before:
            return
        tokens_BCn = np.concatenate([*self._finished, self._current], axis=-1)
        total = self._frames * self._prompter.tokens_per_image
        for tokens_Cn, job in zip(tokens_BCn, self._jobs, strict=False):  # the batch is filled up with copies
            if job.listener and not job.future.cancelled() and tokens_Cn.shape[-1] < total:
                own = tokens_Cn[: job.item[1].n_candidates]
                job.listener(Partial(draw_partial(self._prompter, own, self._frames), own.shape[-1], total))
        now = time.monotonic()
        self._not_before = now + _SHARE * (now - begin)


def draw_partial(prompter: Prompter, tokens_Cn: np.ndarray, frames: int) -> np.ndarray:
    """Pictures [C,F,S,S,3] of which the first n tokens are drawn; rows of tokens that are not whole are gray."""
    per_image = prompter.tokens_per_image
    columns = math.isqrt(per_image)
    candidates, done = tokens_Cn.shape
    begun = -(-done // per_image)
    tokens_CFN = np.pad(tokens_Cn, ((0, 0), (0, begun * per_image - done)), mode="edge").reshape(
        candidates, begun, per_image
    )
    drawn = prompter.decode(tokens_CFN)
    side = drawn.shape[2]
    rows = (done - (begun - 1) * per_image) // columns
    drawn[:, -1, rows * side // columns :] = _GRAY
    gray = np.full((candidates, frames - begun, *drawn.shape[2:]), _GRAY, np.float32)
    return np.concatenate([drawn, gray], axis=1)
