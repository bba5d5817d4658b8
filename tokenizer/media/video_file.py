"""A video as something that FFmpeg can open: a local file, or the bytes of a member of a container."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from EasyLM.errors import UserError, check_installed

MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # of a frame: the limit that Pillow has for image files
# Formats (FFmpeg's names) that hold their frames themselves. Playlists name further files, which can be pipes.
_FORMATS = (
    "asf,avi,av1,dv,flv,gif,gxf,h263,h264,hevc,ivf,m4v,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,rm,vc1,vvc,"
    "wtv,yuv4mpegpipe"
)


@dataclasses.dataclass(frozen=True)
class VideoFile:
    """A video. Equal ones have equal bytes.

    Attributes:
      name: what messages call it.
      version: changes when its bytes may have changed.
      open: opens its bytes for reading, with `seek`; raises UserError.
      path: its absolute path, if it is a local file; FFmpeg opens that faster.
    """

    name: str
    version: str
    open: Callable[[], BinaryIO] = dataclasses.field(compare=False)
    path: str | None = None


def local_file(path: str | os.PathLike) -> VideoFile:
    """Returns the video in a local file.

    Raises:
      UserError: naming the path, if it is not a file.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):  # a pipe could wait for ever
        raise UserError(f"{path}: no such file")
    stat = os.stat(path)
    # FFmpeg takes the part of a relative path before a colon for a protocol.
    return VideoFile(path, f"{stat.st_size} {stat.st_mtime_ns}", lambda: open(path, "rb"), os.path.abspath(path))


def import_av() -> ModuleType:
    """Imports PyAV. Raises UserError naming the extra if it is not installed."""
    check_installed("a video file", "video", "av")
    import av

    return av


def captured_errors() -> Any:
    """Returns a context that provides the list of FFmpeg's error messages (level, name, text) of this thread."""
    av_logging = import_av().logging
    if av_logging.get_level() is None:
        av_logging.set_level(av_logging.ERROR)
        av_logging.set_skip_repeated(False)
        # Outside of such contexts they are dropped, as they are if no level is set.
        logging.getLogger("libav").addHandler(logging.NullHandler())
        logging.getLogger("libav").propagate = False
    return av_logging.Capture()


@contextlib.contextmanager
def open_video(video: VideoFile) -> Iterator[tuple[Any, Any]]:
    """Opens a file as (container, video stream). Converts errors of PyAV inside the context to UserErrors."""
    with names_errors(video.name), open_container(video) as opened:
        yield opened


@contextlib.contextmanager
def names_errors(name: str) -> Iterator[None]:
    """Converts errors of PyAV inside the context to UserErrors that name a file."""
    try:
        yield
    except UserError:
        raise
    except (import_av().FFmpegError, ValueError, OverflowError) as error:
        error.args = error.args[:3]  # without FFmpeg's last message, which can be about another file
        raise UserError(f"{name}: not a readable video ({error})") from error


@contextlib.contextmanager
def open_container(video: VideoFile) -> Iterator[tuple[Any, Any]]:
    """Opens a file as (container, video stream). Lets errors of PyAV through.

    Raises:
      UserError: naming the file, if it has no video stream that can be decoded.
    """
    av = import_av()
    # Titles can have any encoding. Without this argument, PyAV 18 and older accept only UTF-8.
    arguments = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
    with contextlib.ExitStack() as stack:
        source = video.path or stack.enter_context(video.open())
        container = stack.enter_context(av.open(source, options={"format_whitelist": _FORMATS}, **arguments))
        is_cover = av.stream.Disposition.attached_pic
        stream = next((stream for stream in container.streams.video if not stream.disposition & is_cover), None)
        if stream is None:
            raise UserError(f"{video.name}: has no video stream")
        if stream.codec_context is None:
            raise UserError(f"{video.name}: its video stream has an unknown codec")
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise UserError(f"{video.name}: frames of {width}x{height} pixels, more than {MAX_PIXELS}")
        stream.codec_context.thread_count = 1  # a build reads videos in as many processes as there are cores
        if stream.codec_context.name == "mjpeg":
            # Otherwise the decoder fills the damaged part of a frame with other pixels, without an error.
            stream.codec_context.options = {"err_detect": "explode"}
        yield container, stream


def to_array(frame: Any, **arguments: Any) -> np.ndarray:
    """Converts a frame by `to_ndarray` of PyAV, in this thread alone.

    From version 17 on, PyAV otherwise starts a thread for each core and frame, which takes longer than small frames.
    """
    has_threads = int(import_av().__version__.partition(".")[0]) >= 17
    return frame.to_ndarray(**arguments, **({"threads": 1} if has_threads else {}))
