"""Video files: the time of each frame, and the frames shown at given times. Needs the extra `video` (PyAV).

A time is in seconds on the video's own clock, which need not begin at 0. A frame is shown from its time to that of the
next frame; frame rates can vary.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from EasyLM.errors import UserError
from tokenizer.media import video_frames
from tokenizer.media.video_clock import VideoClock, open_video, read_clock

VIDEO_EXTENSIONS = (
    *(".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv", ".ogv"),
    *(".3gp", ".3g2", ".m2ts", ".vob", ".asf", ".f4v", ".mxf", ".mpe", ".m2v", ".qt", ".ogm", ".dv", ".y4m"),
)


def timestamps(path: str | os.PathLike) -> np.ndarray:
    """Returns the time in seconds of every frame, float64 [n], ascending.

    Raises:
      UserError: naming the path, if the file is missing, broken or truncated, or has no frame.
    """
    clock = read_clock(path)
    return clock.ticks * float(clock.tick_seconds)


def read(path: str | os.PathLike, seconds: Sequence[float] | np.ndarray, size: int | None = None) -> np.ndarray:
    """Reads the frames shown at times in any order: float32 [k,size,size,3]. With size None they keep their size.

    The frame shown at a time is the last one whose own time is not later. Applies the orientation in the metadata,
    converts the colours to sRGB, and resizes as `images.load`. Seeks over unneeded frames where the format allows it.

    Raises:
      UserError: naming the path, if `timestamps` raises, a time is before the first frame or after the end of the
        last one, a frame cannot be decoded, its colours are not supported, or with size None the sizes differ.
    """
    clock, times = read_clock(path), timestamps(path)
    numbers = np.searchsorted(times, seconds, side="right") - 1
    # The duration of the last frame is unknown; assume the longest duration of the other frames.
    end = times[-1] + (np.diff(times).max() if len(times) > 1 else 1.0)
    for number, second in zip(numbers, seconds):
        if number < 0 or not second <= end:
            raise UserError(f"{path}: no frame is shown at {second:g} s (its frames: {times[0]:g} to {times[-1]:g} s)")
    decoded = {}
    with open_video(path) as (container, stream):
        for number, frame, is_damaged in _decode_selected(container, stream, clock, np.unique(numbers).tolist()):
            if is_damaged:
                raise UserError(f"{path}: the frame at {times[number]:g} s, or one that it depends on, is damaged")
            decoded[number] = video_frames.to_pixels(frame, size)
    missing = [number for number in numbers.tolist() if number not in decoded]
    if missing:
        raise UserError(f"{path}: the frame at {times[missing[0]]:g} s cannot be decoded")
    sizes = sorted({pixels.shape[1::-1] for pixels in decoded.values()})
    if len(sizes) > 1:
        raise UserError(f"{path}: its frames have different sizes: {', '.join(f'{w}x{h}' for w, h in sizes)}")
    return np.stack([decoded[number] for number in numbers.tolist()])


def _decode_selected(
    container: Any, stream: Any, clock: VideoClock, numbers: list[int]
) -> Iterator[tuple[int, Any, bool]]:
    """Yields (number, frame, whether it is damaged), ascending. Omits frames that the decoder does not return."""
    frames = _decode_from(container, stream, clock, None)
    seek_point, latest = None, None  # latest: what `_decode_from` yielded last
    for number in numbers:
        target = clock.ticks[number]
        nearest = clock.seek_points[np.searchsorted(clock.seek_points, target, side="right") - 1]
        if not clock.by_index and nearest > (clock.ticks[0] if latest is None else latest[0]):
            frames, seek_point, latest = _decode_from(container, stream, clock, nearest), nearest, None
        while latest is None or latest[0] < target:
            decoded = next(frames, None)
            missed = decoded is None or (latest is None and (decoded[0] > target or not decoded[1].key_frame))
            if seek_point is not None and missed:
                # Some formats seek only approximately: decode from the beginning instead.
                frames, seek_point, latest = _decode_from(container, stream, clock, clock.ticks[0]), None, None
            elif decoded is None:
                return
            else:
                latest = decoded
        if latest[0] == target:
            yield number, *latest[1:]


def _decode_from(
    container: Any, stream: Any, clock: VideoClock, seek_point: int | None
) -> Iterator[tuple[int, Any, bool]]:
    """Yields (tick, frame, whether it is damaged) from a seek point on. None: from the current position in the file.

    A decoder marks only the damaged frame itself. Those after it, up to the next key frame, are predicted from it.
    """
    if seek_point is not None:
        container.seek(int(seek_point), stream=stream)
    is_damaged = False
    for i, frame in enumerate(container.decode(stream)):
        is_damaged = frame.is_corrupt or (is_damaged and not frame.key_frame)
        tick = int(clock.ticks[min(i, len(clock.ticks) - 1)]) if clock.by_index else frame.pts
        if tick is not None:
            yield tick, frame, is_damaged
