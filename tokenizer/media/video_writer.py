"""Frames to a video (.mp4) or an animation (.gif). MP4 needs the extra `video` (PyAV)."""

import fractions
import os
import pathlib

import numpy as np
from PIL import Image

from EasyLM.errors import UserError
from EasyLM.storage import atomic_path
from tokenizer.media.video_file import import_av

WRITABLE_EXTENSIONS = (".mp4", ".gif")
MAX_FPS = 1000


def write(path: str | os.PathLike, frames_nHW3: np.ndarray, fps: float) -> None:
    """Atomically writes frames, uint8 [n,height,width,3], as a video or an endless animation; creates its folder.

    An odd height or width of a video is padded by repeating the last row or column.

    Raises:
      UserError: naming the path, if it has another extension, or fps is out of range.
    """
    path = pathlib.Path(path)
    if path.suffix.lower() not in WRITABLE_EXTENSIONS:
        choices = ", ".join(WRITABLE_EXTENSIONS)
        raise UserError(f"{path}: {path.suffix!r} cannot be written: choose one of {choices}")
    if not 0 < fps <= MAX_FPS:
        raise UserError(f"{path}: {fps} frames per second: must be above 0, at most {MAX_FPS}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        (_write_gif if path.suffix.lower() == ".gif" else _write_mp4)(temporary, frames_nHW3, fps)


def _write_mp4(path: str, frames_nHW3: np.ndarray, fps: float) -> None:
    av = import_av()
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    _, height, width, _ = frames_nHW3.shape
    padded_nHW3 = np.pad(frames_nHW3, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(os.path.abspath(path), "w", format="mp4") as container:  # a colon is no protocol
        rate = fractions.Fraction(fps).limit_denominator(1001)
        stream = container.add_stream(codec, rate=rate, options={"crf": "16"} if codec == "libx264" else {"q": "2"})
        stream.height, stream.width, stream.pix_fmt = *padded_nHW3.shape[1:3], "yuv420p"  # every player supports it
        for pixels in padded_nHW3:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def _write_gif(path: str, frames_nHW3: np.ndarray, fps: float) -> None:
    first, *others = [Image.fromarray(pixels) for pixels in frames_nHW3]
    first.save(path, format="GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
