"""Hard cuts: frames that differ suddenly from the frame before.

The change between two frames is the distance of their colour histograms, from 0 to 1. A cut is a change of at least
MIN_CHANGE that is at least twice as large as every other change within 3 frames. In a fade or a dissolve, and while
the camera moves fast, neighbouring changes are similar. A flash has two large changes, its beginning and its end.
Therefore none of these is a cut. Two cuts within 3 frames are both missed, for the same reason.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from tokenizer.media.video_file import to_array

MIN_CHANGE = 0.2
_NEIGHBOURS, _RATIO = 3, 2.0
_SIDE, _LEVELS = 32, 8


def find_cuts(numbered_frames: Iterable[tuple[int, Any]]) -> list[int]:
    """Returns the numbers of the frames that follow a cut.

    Args:
      numbered_frames: (number, frame of PyAV) in the order in which they are shown.
    """
    numbers, changes, before = [], [], None
    for number, frame in numbered_frames:
        histogram = colour_histogram(to_array(frame, format="rgb24", width=_SIDE, height=_SIDE))
        if before is not None:
            numbers.append(number)
            changes.append(0.5 * float(np.abs(histogram - before).sum(axis=-1).mean()))
        before = histogram
    return [numbers[i] for i in cut_positions(np.array(changes))]


def colour_histogram(pixels_SS3: np.ndarray) -> np.ndarray:
    """Returns the shares of 8 levels of each channel in each quarter of an image, float [2,2,3,8].

    A value between two levels counts for both, in proportion to its distance from them. Thus a slow change of light
    changes the shares slowly.
    """
    levels = pixels_SS3[..., None] * np.float32((_LEVELS - 1) / 255)
    shares = np.maximum(0, 1 - np.abs(levels - np.arange(_LEVELS, dtype=np.float32)))
    half = _SIDE // 2
    return shares.reshape(2, half, 2, half, 3, _LEVELS).mean(axis=(1, 3))


def cut_positions(changes: np.ndarray) -> list[int]:
    """Returns the positions of the changes [n] that are cuts."""
    if not len(changes):
        return []
    padded = np.pad(changes, _NEIGHBOURS)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * _NEIGHBOURS + 1)
    others = np.delete(windows, _NEIGHBOURS, axis=1).max(axis=1, initial=0)
    return np.flatnonzero((changes >= MIN_CHANGE) & (changes >= _RATIO * others)).tolist()
