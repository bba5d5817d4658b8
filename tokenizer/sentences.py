"""Which pictures follow each other in a sentence: one pure function a kind.

An *item* is a tuple of pictures (here: their numbers) that stand or fall together: one picture, an image with its
label, a clip. A kind takes the readable items and a random generator and yields sentences, each a list of pictures.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from EasyLM.errors import UserError

Item = tuple[int, ...]
Sentence = list[int]


def images(items: Sequence[Item], rng: np.random.Generator, settings) -> Iterator[Sentence]:
    """One sentence a picture, in name order."""
    for item in items:
        yield list(item)


def paired(items: Sequence[Item], rng: np.random.Generator, settings) -> Iterator[Sentence]:
    """[image, label, image, label, ...] of `n_shots` pairs: `n_epochs` shuffles of all pairs, each cut into sentences.

    What is left over at the end of a shuffle, fewer than `n_shots` pairs, is another one each time.
    """
    if len(items) < settings.n_shots:
        raise UserError(f"--n_shots={settings.n_shots}: only {len(items)} pairs are there")
    for _ in range(settings.n_epochs):
        order = rng.permutation(len(items))
        for start in range(0, len(items) - settings.n_shots + 1, settings.n_shots):
            yield [picture for i in order[start : start + settings.n_shots] for picture in items[i]]


def frames(items: Sequence[Item], rng: np.random.Generator, settings) -> Iterator[Sentence]:
    """`n_frames` of a clip at a random stride of 1..`max_stride`: windows one behind the other, `n_epochs` times.

    A clip takes no stride that it is too short for; one with fewer than `n_frames` gives no sentence.
    """
    if all(len(clip) < settings.n_frames for clip in items):
        longest = max((len(clip) for clip in items), default=0)
        raise UserError(f"--n_frames={settings.n_frames}: the longest clip has {longest} frames")
    for _ in range(settings.n_epochs):
        for clip in items:
            if len(clip) >= settings.n_frames:
                yield from _windows(clip, rng, settings.n_frames, settings.max_stride)


def _windows(clip: Item, rng: np.random.Generator, n_frames: int, max_stride: int) -> Iterator[Sentence]:
    possible = (len(clip) - 1) // max(n_frames - 1, 1)
    stride = int(rng.integers(1, min(max_stride, possible) + 1)) if n_frames > 1 else 1
    span = (n_frames - 1) * stride + 1
    first = int(rng.integers(0, (len(clip) - span) % span + 1))
    for start in range(first, len(clip) - span + 1, span):
        yield list(clip[start : start + span : stride])


KINDS = {"images": images, "paired": paired, "frames": frames}
