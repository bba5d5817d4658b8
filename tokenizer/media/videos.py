"""Video files: when each frame is shown, the frames of chosen times as pixels, and frames to a file to look at.

Shapes: n frames of a video, k chosen ones, S the side in pixels. Pixels are float32 in [0, 1], RGB, channels last.

A time here is seconds on the video's own clock, which need not begin at 0. A frame is shown from its time until that of
the next one, so rates may vary. Needs the extra `video` (PyAV).
"""

import contextlib
import dataclasses
import fractions
import functools
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from EasyLM.errors import UserError
from EasyLM.storage import atomic_path
from tokenizer.media import images

EXTENSIONS = (
    *(".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv", ".ogv"),
    *(".3gp", ".3g2", ".m2ts", ".vob", ".asf", ".f4v", ".mxf", ".mpe", ".m2v", ".qt", ".ogm", ".dv", ".y4m"),
)
WRITTEN = (".mp4", ".gif")
MOST_FPS = 1000  # that are written
# One packet is one shown frame, at the packet's time: the frames are known without decoding. (Not so of VP8, for one,
# which has packets that are never shown.)
_ONE_FRAME_A_PACKET = {"h264", "hevc", "vp9", "av1", "mpeg4", "mjpeg", "mpeg1video", "mpeg2video", "prores", "ffv1"}
# Formats (as FFmpeg calls them) that hold the places of their frames. Others are searched, and a frame found that way
# may bear another time than when the file is read from its beginning: those are read from there.
_ENTERED_ANYWHERE = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi"}
_MISSING_SECONDS = 0.2  # of what a file's head promises; less may be rounding
_KEPT_CLOCKS = 16  # a builder asks for the times of a video, then for its frames, perhaps several times


@dataclasses.dataclass(frozen=True)
class _Clock:
    """The frames of a file, in ticks of the stream."""

    ticks: np.ndarray  # int64 [n], ascending
    keys: np.ndarray  # int64, ascending: from these frames on, decoding can begin; the first frame at least
    counted: bool  # no time of a frame can be trusted: frame i is ticks[i]
    tick: fractions.Fraction  # seconds


def timestamps(path) -> np.ndarray:
    """The time in seconds of every frame, float64 [n], ascending.

    Raises:
      UserError: naming the path, if the file is missing, broken or cut off, or has no frame.
    """
    clock = _clock(path)
    return clock.ticks * float(clock.tick)


def read(path, seconds: Sequence[float], size: int | None = None) -> np.ndarray:
    """The frames shown at times of any order, [k,size,size,3]; size None: as large as they are, [k,height,width,3].

    The frame of a time is the last one that begins by then. The camera's rotation is applied, then frames are resized
    as `images.load` does it. What lies between two of the times is skipped where the file can be entered further on.

    Raises:
      UserError: naming the path, if `timestamps` does, a time is before the first frame or after the last one has been
        shown, or a frame cannot be decoded.
    """
    clock, times = _clock(path), timestamps(path)
    numbers = np.searchsorted(times, seconds, side="right") - 1
    # How long the last frame is shown is not known; as long as the longest of the others, so much is.
    end = times[-1] + (np.diff(times).max() if len(times) > 1 else 1.0)
    for number, second in zip(numbers, seconds):
        if number < 0 or not second <= end:
            raise UserError(f"{path}: no frame is shown at {second:g} s (its frames: {times[0]:g} to {times[-1]:g} s)")
    decoded = {}
    with _opened(path) as (container, stream):
        for number, frame in _chosen(container, stream, clock, np.unique(numbers).tolist()):
            if frame.is_corrupt:
                raise UserError(f"{path}: the frame at {times[number]:g} s is damaged")
            decoded[number] = _pixels(frame, size)
    missing = [number for number in numbers.tolist() if number not in decoded]
    if missing:
        raise UserError(f"{path}: the frame at {times[missing[0]]:g} s cannot be decoded")
    return np.stack([decoded[number] for number in numbers.tolist()])


def write(path, frames: np.ndarray, fps: float) -> None:
    """Writes bytes [n,height,width,3] as a video (.mp4) or an endless animation (.gif), atomically.

    A video's odd height or width grows by a repeated row or column.

    Raises:
      UserError: naming the path, if its ending is another one, or fps is not positive.
    """
    path = pathlib.Path(path)
    if path.suffix.lower() not in WRITTEN:
        raise UserError(f"{path}: {path.suffix!r} cannot be written: choose one of {', '.join(WRITTEN)}")
    if not 0 < fps <= MOST_FPS:
        raise UserError(f"{path}: {fps} frames a second: must be above 0, at most {MOST_FPS}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        (_write_gif if path.suffix.lower() == ".gif" else _write_mp4)(temporary, frames, fps)


def _import_av():
    try:
        import av
    except ImportError:
        raise UserError("video files need the package av: pip install -e '.[video]'") from None
    return av


@contextlib.contextmanager
def _opened(path) -> Iterator[tuple]:
    """(container, its video stream); what goes wrong with the file in here becomes a UserError with its path."""
    av = _import_av()
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    # Titles may be in any encoding: up to version 18 PyAV refuses such a file unless told otherwise.
    any_title = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
    try:
        with av.open(os.fspath(path), **any_title) as container:
            if not container.streams.video:
                raise UserError(f"{path}: has no video stream")
            if container.streams.video[0].codec_context is None:
                raise UserError(f"{path}: its video stream is of an unknown codec")
            yield container, container.streams.video[0]
    except UserError:
        raise
    except (av.FFmpegError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not a readable video ({error})") from error


def _clock(path) -> _Clock:
    """The clock of a file as it now is."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: no such file" if isinstance(error, FileNotFoundError) else str(error)) from None
    return _read_clock(os.fspath(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(_KEPT_CLOCKS)
def _read_clock(path: str, size: int, modified: int) -> _Clock:
    """By the packets' times where those are exact, which costs reading the file; else by decoding it."""
    with _opened(path) as (container, stream):
        form, rate, tick = container.format.name, stream.average_rate, stream.time_base
        # An AVI file holds no times: with frames that are decoded in another order they are guesses.
        counted = form == "avi" and bool(stream.codec_context.has_b_frames) and bool(rate)
        facts = _packets(path, container, stream)
        ticks = [tick for tick, _ in facts]
        keys = [tick for tick, is_key in facts if is_key and tick is not None]
        exact = stream.codec_context.name in _ONE_FRAME_A_PACKET and None not in ticks
    if counted or not exact:
        with _opened(path) as (container, stream):
            ticks = [frame.pts for frame in container.decode(stream)]
    if form not in _ENTERED_ANYWHERE:
        keys = []
    if counted:
        ticks, keys, tick = range(len(ticks)), [], 1 / rate
    ticks_n = np.unique(np.array([t for t in ticks if t is not None], np.int64))
    if not len(ticks_n):
        raise UserError(f"{path}: its video stream has no frame")
    return _Clock(ticks_n, np.union1d(ticks_n[:1], np.array(keys, np.int64)), counted, tick)


def _packets(path: str, container, stream) -> list[tuple]:
    """(tick or None, whether decoding can begin here) of each packet that is shown; UserError if some are cut off."""
    # No packet is kept: together they are the file.
    facts, found, end = [], 0, 0.0
    for packet in container.demux():
        if packet.dts is None and not packet.size:
            continue  # PyAV's own mark of the end
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index == stream.index:
            found += 1
            if packet.size and not packet.is_discard:
                facts.append((packet.pts, packet.is_keyframe))
    if found < stream.frames:
        raise UserError(f"{path}: is cut off: {found} of {stream.frames} frames are there")
    promised = (container.duration or 0) / 1e6 if container.format.name == "matroska,webm" else 0.0
    if end < promised - _MISSING_SECONDS:
        raise UserError(f"{path}: is cut off: {end:.1f} of {promised:.1f} seconds are there")
    return facts


def _chosen(container, stream, clock: _Clock, numbers: list[int]) -> Iterator[tuple]:
    """Yields (number, frame) for ascending frame numbers; leaves out those that the decoder does not give."""
    frames, entered_at, last = _frames(container, stream, clock, None), None, None  # (tick, frame) that came last
    for number in numbers:
        wanted = clock.ticks[number]
        key = clock.keys[np.searchsorted(clock.keys, wanted, side="right") - 1]
        if not clock.counted and key > (clock.ticks[0] if last is None else last[0]):
            frames, entered_at, last = _frames(container, stream, clock, key), key, None
        while last is None or last[0] < wanted:
            found = next(frames, None)
            astray = found is None or (last is None and (found[0] > wanted or not found[1].key_frame))
            if entered_at is not None and astray:
                # Some formats find their places only roughly.
                frames, entered_at, last = _frames(container, stream, clock, clock.ticks[0]), None, None
            elif found is None:
                return
            else:
                last = found
        if last[0] == wanted:
            yield number, last[1]


def _frames(container, stream, clock: _Clock, key: int | None) -> Iterator[tuple]:
    """Yields (tick, frame), from the place where decoding can begin for `key` on; None: from where the file is."""
    if key is not None:
        container.seek(int(key), stream=stream)
    for i, frame in enumerate(container.decode(stream)):
        tick = int(clock.ticks[min(i, len(clock.ticks) - 1)]) if clock.counted else frame.pts
        if tick is not None:
            yield tick, frame


def _pixels(frame, size: int | None) -> np.ndarray:
    image = frame.to_image()
    # Counterclockwise, and of what lies on the sensor: PIL turns the same way.
    turns = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    turn = round(frame.rotation / 90) % 4 * 90
    upright = image.transpose(turns[turn]) if turn else image
    return images.to_pixels(upright, size)


def _write_mp4(path: str, frames: np.ndarray, fps: float) -> None:
    av = _import_av()
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    padded = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with av.open(path, "w", format="mp4") as container:
        rate = fractions.Fraction(fps).limit_denominator(1001)
        stream = container.add_stream(codec, rate=rate, options={"crf": "16"} if codec == "libx264" else {"q": "2"})
        stream.height, stream.width, stream.pix_fmt = *padded.shape[1:3], "yuv420p"  # what every player shows
        for picture in padded:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _write_gif(path: str, frames: np.ndarray, fps: float) -> None:
    first, *others = [Image.fromarray(picture) for picture in frames]
    first.save(path, format="GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
