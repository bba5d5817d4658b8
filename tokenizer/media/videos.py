"""Video files: the time of each frame, and the frames shown at given times. Needs the extra `video` (PyAV).

A time is in seconds on the video's own clock, which need not begin at 0. A frame is shown from its time to that of the
next frame; frame rates can vary.
"""

import os
from collections.abc import Iterator, Sequence

import numpy as np

from EasyLM.errors import UserError
from tokenizer.media import images, video_cuts, video_frames
from tokenizer.media.video_clock import read_clock
from tokenizer.media.video_decoder import open_decoder
from tokenizer.media.video_file import VideoFile, local_file

VIDEO_EXTENSIONS = (
    *(".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv", ".ogv"),
    *(".3gp", ".3g2", ".m2ts", ".vob", ".asf", ".f4v", ".mxf", ".mpe", ".m2v", ".qt", ".ogm", ".dv", ".y4m"),
)


def timestamps(video: str | os.PathLike | VideoFile) -> np.ndarray:
    """Returns the time in seconds of every frame, float64 [n], ascending.

    Raises:
      UserError: naming the file, if it is missing, broken or truncated, or has no frame.
    """
    return read_clock(_video_file(video)).seconds


def scenes(video: str | os.PathLike | VideoFile) -> list[np.ndarray]:
    """Returns the times of the frames of each scene, from one hard cut to the next. Decodes the whole file.

    Raises:
      UserError: as `timestamps`.
    """
    video = _video_file(video)
    clock = read_clock(video)
    with open_decoder(video, clock, 0) as decoder:
        every_frame = ((number, frame) for number, frame, _ in decoder.frames(range(len(clock.ticks))))
        return np.split(clock.seconds, video_cuts.find_cuts(every_frame))


def read(
    video: str | os.PathLike | VideoFile, seconds: Sequence[float] | np.ndarray, size: int | None = None
) -> np.ndarray:
    """Reads the frames shown at times in any order, as `frames`: float32 [k,size,size,3] in [0, 1].

    Raises:
      UserError: as `frames`, or if with size None the sizes differ.
    """
    video = _video_file(video)
    by_position = dict(frames(video, seconds, size))
    sizes = sorted({pixels.shape[1::-1] for pixels in by_position.values()})
    if len(sizes) > 1:
        raise UserError(f"{video.name}: its frames have different sizes: {', '.join(f'{w}x{h}' for w, h in sizes)}")
    return images.to_float32(np.stack([by_position[position] for position in range(len(seconds))]))


def frames(
    video: str | os.PathLike | VideoFile, seconds: Sequence[float] | np.ndarray, size: int | None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (position in `seconds`, pixels uint8 [size,size,3]) of the frame shown at each time, in order of time.

    With size None, frames have the size at which they are shown.

    The frame shown at a time is the last one whose own time is not later. Applies the orientation in the metadata,
    converts the colours to sRGB, and resizes as `images.read`. Seeks over unneeded frames where the format allows it.
    Otherwise decoding continues where the last call for this file ended, if its times were earlier.

    Raises:
      UserError: naming the file, if `timestamps` raises, a time is before the first frame or after the end of the
        last one, a frame cannot be decoded, or its colours are not supported.
    """
    video = _video_file(video)
    clock = read_clock(video)
    positions: dict[int, list[int]] = {}  # of each frame
    for position, number in enumerate(_shown_frames(video.name, clock.seconds, seconds).tolist()):
        positions.setdefault(number, []).append(position)
    with open_decoder(video, clock, min(positions)) as decoder:
        for number, frame, is_damaged in decoder.frames(sorted(positions)):
            if is_damaged:
                time = clock.seconds[number]
                raise UserError(f"{video.name}: the frame at {time:g} s, or one that it depends on, is damaged")
            pixels = video_frames.to_bytes(frame, size, decoder.pixel_aspect)
            for position in positions.pop(number):
                yield position, pixels
    if positions:
        raise UserError(f"{video.name}: the frame at {clock.seconds[min(positions)]:g} s cannot be decoded")


def _video_file(video: str | os.PathLike | VideoFile) -> VideoFile:
    return video if isinstance(video, VideoFile) else local_file(video)


def _shown_frames(name: str, times: np.ndarray, seconds: Sequence[float] | np.ndarray) -> np.ndarray:
    """Returns the number of the frame shown at each time."""
    numbers = np.searchsorted(times, seconds, side="right") - 1
    # The duration of the last frame is unknown; assume the longest duration of the other frames.
    end = times[-1] + (np.diff(times).max() if len(times) > 1 else 1.0)
    for number, second in zip(numbers, seconds):
        if number < 0 or not second <= end:
            raise UserError(f"{name}: no frame is shown at {second:g} s (its frames: {times[0]:g} to {times[-1]:g} s)")
    return numbers
