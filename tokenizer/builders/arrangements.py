"""Which pictures follow each other in a sentence: one pure function a kind.

A *row* is a tuple of pictures of one thing: an image, or an image with its annotations, in the order of the folders.
An *item* is one row, or the rows of a clip in order of time, or of a class (collect.py). A group of rows makes an
*example* (groups.py); a kind's function takes the rows of an example and a random generator, and yields sentences.
"""

from collections.abc import Callable, Iterator

import numpy as np

from EasyLM.errors import UserError
from tokenizer.builders.image_ref import Picture

Row = tuple[Picture, ...]
Sentence = list[Picture]
Order = Callable[[list[Row], np.random.Generator, object], Iterator[Sentence]]


class TooShortError(UserError):
    """A clip that has no window. Its message lacks the name, which the caller knows."""


def in_turn(rows: list[Row], rng: np.random.Generator, settings) -> Iterator[Sentence]:
    """Every picture of every row: [image, label, image, label, ...] of pairs."""
    yield [picture for row in rows for picture in row]


def coloured_labels(rows: list[Row], rng: np.random.Generator, settings) -> Iterator[Sentence]:
    """[image, label, ...] with the label's ids as colours of a fixed palette."""
    yield [picture for image, label in rows for picture in (image, label._replace(view="palette"))]


def shuffled_tasks(rows: list[Row], rng: np.random.Generator, settings) -> Iterator[Sentence]:
    """All pictures of one row after those of the other, in an order that is drawn once for the sentence."""
    tasks = rng.permutation(len(rows[0]))
    yield [row[task] for row in rows for task in tasks]


def colorization(rows: list[Row], rng: np.random.Generator, settings) -> Iterator[Sentence]:
    """[gray, colour, gray, colour, ...]"""
    yield [picture for (colour,) in rows for picture in (colour._replace(view="gray"), colour)]


def inpainting(rows: list[Row], rng: np.random.Generator, settings) -> Iterator[Sentence]:
    """[masked, image, masked, image, ...]; masked is a hole with probability `hole_mask_ratio`, else patches."""
    sentence = []
    for (whole,) in rows:
        view = "hole" if rng.random() < settings.hole_mask_ratio else "patches"
        sentence += [whole._replace(view=view, key=int(rng.integers(2**53))), whole]
    yield sentence


def frames(rows: list[Row], rng: np.random.Generator, settings) -> Iterator[Sentence]:
    """`n_frames` of a clip, at one random stride of 1..`max_stride`: windows one behind the other."""
    for window in _random_windows(rows, rng, settings):
        yield [picture for row in window for picture in row]


def video(rows: list[Row], rng: np.random.Generator, settings) -> Iterator[Sentence]:
    """`n_frames` of a video at each of the `strides`, in windows one behind the other; too long a stride gives none."""
    _check_length(rows, settings.n_frames, min(settings.strides))
    for stride in settings.strides:
        for window in _windows(rows, rng, settings.n_frames, stride):
            yield [picture for row in window for picture in row]


def multi_sequence(rows: list[Row], rng: np.random.Generator, settings) -> Iterator[Sentence]:
    """Windows of aligned clips, each sequence by sequence [x1..xn, y1..yn], and interleaved [x1, y1, x2, y2, ...]."""
    for window in _random_windows(rows, rng, settings):
        yield [row[task] for task in range(len(window[0])) for row in window]
        yield [picture for row in window for picture in row]


def co3d(rows: list[Row], rng: np.random.Generator, settings) -> Iterator[Sentence]:
    """[image, mask, depth, image, mask, depth, ...] of windows of a sequence."""
    for window in _random_windows(rows, rng, settings):
        yield [p for image, mask, depth, _ in window for p in (image, mask, depth._replace(view="co3d_depth"))]


def _random_windows(rows: list[Row], rng: np.random.Generator, settings) -> Iterator[list[Row]]:
    """Windows at a random stride, none that the clip is too short for."""
    _check_length(rows, settings.n_frames, 1)
    possible = (len(rows) - 1) // max(settings.n_frames - 1, 1)
    stride = int(rng.integers(1, max(1, min(settings.max_stride, possible)) + 1))
    return _windows(rows, rng, settings.n_frames, stride)


def _check_length(rows: list[Row], n_frames: int, stride: int) -> None:
    needed = (n_frames - 1) * stride + 1
    if len(rows) < needed:
        raise TooShortError(f"too short: {len(rows)} frames, {needed} needed")


def _windows(rows: list[Row], rng: np.random.Generator, n_frames: int, stride: int) -> Iterator[list[Row]]:
    """All windows that fit behind each other; where the first begins is random, as far as that loses none."""
    span = (n_frames - 1) * stride + 1
    first = int(rng.integers(0, len(rows) % span + 1)) if len(rows) >= span else 0
    for start in range(first, len(rows) - span + 1, span):
        yield rows[start : start + span : stride]
