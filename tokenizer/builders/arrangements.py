"""The order of the images in a sentence: one pure function per kind.

Each takes the rows of an example, a random generator and the settings, and yields sentences.
"""

from collections.abc import Callable, Iterator

import numpy as np

from EasyLM.errors import UserError
from tokenizer.builders import views
from tokenizer.builders.image_ref import ImageRef
from tokenizer.builders.settings import SentenceSettings

Row = tuple[ImageRef, ...]
Images = list[ImageRef]  # of a sentence, in order
_TIME_ROUNDING = 2e-3  # seconds
Arrangement = Callable[[list[Row], np.random.Generator, SentenceSettings], Iterator[Images]]


class UnsuitableClipError(UserError):
    """A clip has no window, as it is too short. The caller adds the clip's name to the message."""


def row_by_row(rows: list[Row], rng: np.random.Generator, settings: SentenceSettings) -> Iterator[Images]:
    """Yields all images of all rows: for pairs [image, label, image, label, ...]."""
    yield [image for row in rows for image in row]


def coloured_labels(rows: list[Row], rng: np.random.Generator, settings: SentenceSettings) -> Iterator[Images]:
    """Yields [image, label, ...] with label ids as colours of a palette."""
    yield [ref for image, label in rows for ref in (image, label._replace(view="palette", argument=""))]


def shuffled_tasks(rows: list[Row], rng: np.random.Generator, settings: SentenceSettings) -> Iterator[Images]:
    """Yields all images, those of each row in the same order of tasks, drawn once per sentence."""
    tasks = rng.permutation(len(rows[0]))
    yield [row[task] for row in rows for task in tasks]


def colorization(rows: list[Row], rng: np.random.Generator, settings: SentenceSettings) -> Iterator[Images]:
    """Yields [gray, colour, gray, colour, ...]."""
    yield [ref for (colour,) in rows for ref in (colour._replace(view="gray"), colour)]


def inpainting(rows: list[Row], rng: np.random.Generator, settings: SentenceSettings) -> Iterator[Images]:
    """Yields [masked, image, ...]. A mask is a hole with probability `hole_mask_ratio`, otherwise patches."""
    sentence = []
    for (image,) in rows:
        view = "hole" if rng.random() < settings.hole_mask_ratio else "patches"
        sentence += [image._replace(view=view, argument=str(rng.integers(2**53))), image]
    yield sentence


def frames(rows: list[Row], rng: np.random.Generator, settings: SentenceSettings) -> Iterator[Images]:
    """Yields consecutive windows of `n_frames` of a clip, at one random stride in 1..`max_stride`."""
    for window in _random_windows(rows, rng, settings):
        yield [image for row in window for image in row]


def video(rows: list[Row], rng: np.random.Generator, settings: SentenceSettings) -> Iterator[Images]:
    """Yields consecutive windows of `n_frames` of a video at each of the steps that suit it.

    The steps are `frame_seconds` or, without them, the `strides`. A video is too short for some of them, and its frames
    may be further apart than some of the `frame_seconds`.
    """
    if settings.frame_seconds:
        clips = [(clip, 1) for clip in _clips_by_time(rows, rng, settings)]
    else:
        clips = [(rows, stride) for stride in settings.strides]
        _check_length(rows, settings.n_frames, min(settings.strides))
    for clip, stride in clips:
        for window in _windows(clip, rng, settings.n_frames, stride):
            yield [image for row in window for image in row]


def _clips_by_time(rows: list[Row], rng: np.random.Generator, settings: SentenceSettings) -> list[list[Row]]:
    """Returns the clip of each of the `frame_seconds`, without those that are below the distance of the frames.

    Raises:
      UnsuitableClipError: if no clip has a window.
    """
    clips, errors = [], []
    for step in settings.frame_seconds:
        try:
            clips.append((step, _every(step, rows, rng)))
        except UnsuitableClipError as error:
            errors.append(error)
    if not clips:
        raise errors[0]
    step, longest = min(clips, key=lambda clip: clip[0])
    _check_length(longest, settings.n_frames, 1, f", {step:g} s apart")
    return [clip for _, clip in clips]


def _every(step: float, rows: list[Row], rng: np.random.Generator) -> list[Row]:
    """Returns the frames shown at times that are `step` seconds apart.

    The random start of the first does not reduce their number. Time stamps may be rounded, often to a millisecond.

    Raises:
      UnsuitableClipError: if all frames are further apart.
    """
    times = np.array([image.seconds for image, *_ in rows])
    rounding = min(_TIME_ROUNDING, step / 4)
    shortest = np.diff(times).min(initial=np.inf)
    if len(times) > 1 and step < shortest - rounding:
        raise UnsuitableClipError(f"its frames are {shortest:g} s apart, more than frame_seconds={step:g}")
    count = int((times[-1] - times[0] + rounding) // step) + 1
    latest_start = times[-1] - (count - 1) * step + rounding
    start = times[rng.integers(np.searchsorted(times, latest_start, side="right"))]
    numbers = np.searchsorted(times, start + np.arange(count) * step + rounding, side="right") - 1
    return [rows[number] for number in numbers.tolist()]


def multi_sequence(rows: list[Row], rng: np.random.Generator, settings: SentenceSettings) -> Iterator[Images]:
    """Yields each window of aligned clips twice: [x1..xn, y1..yn], then interleaved [x1, y1, x2, y2, ...]."""
    for window in _random_windows(rows, rng, settings):
        yield [row[task] for task in range(len(window[0])) for row in window]
        yield [image for row in window for image in row]


def co3d(rows: list[Row], rng: np.random.Generator, settings: SentenceSettings) -> Iterator[Images]:
    """Yields [image, mask, depth, image, mask, depth, ...] of windows of a sequence."""
    for window in _random_windows(rows, rng, settings):
        yield [ref for image, mask, depth, valid in window for ref in (image, mask, _co3d_depth(depth, valid))]


def _co3d_depth(depth: ImageRef, valid: ImageRef) -> ImageRef:
    """Returns a depth map with its view. Names the mask of its valid points if it is elsewhere, as in another tar."""
    is_beside = valid.path == views.co3d_depth_mask(depth.path)
    return depth._replace(view="co3d_depth", argument="" if is_beside else valid.path)


def _random_windows(rows: list[Row], rng: np.random.Generator, settings: SentenceSettings) -> Iterator[list[Row]]:
    """Yields windows at a random stride for which the clip is long enough."""
    _check_length(rows, settings.n_frames, 1)
    longest_stride = (len(rows) - 1) // max(settings.n_frames - 1, 1)
    stride = int(rng.integers(1, max(1, min(settings.max_stride, longest_stride)) + 1))
    return _windows(rows, rng, settings.n_frames, stride)


def _check_length(rows: list[Row], n_frames: int, stride: int, distance: str = "") -> None:
    span = _span(n_frames, stride)
    if len(rows) < span:
        raise UnsuitableClipError(f"too short: {len(rows)} frames{distance}, {span} needed")


def _span(n_frames: int, stride: int) -> int:
    """Returns the number of frames from the first to the last frame of a window."""
    return (n_frames - 1) * stride + 1


def _windows(rows: list[Row], rng: np.random.Generator, n_frames: int, stride: int) -> Iterator[list[Row]]:
    """Yields as many consecutive windows as fit. The random start of the first does not reduce their number."""
    span = _span(n_frames, stride)
    first = int(rng.integers(0, len(rows) % span + 1)) if len(rows) >= span else 0
    for start in range(first, len(rows) - span + 1, span):
        yield rows[start : start + span : stride]
