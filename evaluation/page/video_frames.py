"""The process that reads a video: `python -m evaluation.page.video_frames VIDEO COUNT SIZE FOLDER`. See `video`.

Imports no JAX, so that it starts fast. Its memory is limited, because a small file can hold huge frames.
"""

import pathlib
import sys

import numpy as np

from EasyLM.errors import UserError
from evaluation.page.pictures import save_enlarged
from tokenizer.media import images, videos

_MAX_BYTES = 4 * 2**30  # of the address space


def save_frames(video: str, count: int, size: int, folder: pathlib.Path) -> list[str]:
    """Writes at most `count` frames, spread evenly over a video, and returns their paths in order.

    Raises:
      UserError: if the file cannot be read as a video.
    """
    try:
        times = videos.timestamps(video)
        numbers = np.unique(np.linspace(0, len(times) - 1, count).round().astype(int))
        frames = images.to_uint8(videos.read(video, times[numbers], size))
    except UserError as error:
        raise UserError(str(error).replace(video, pathlib.Path(video).name)) from None
    return [save_enlarged(frame, folder, "frame") for frame in frames]


def main(video: str, count: str, size: str, folder: str) -> int:
    """Prints the paths of the frames. Returns the exit code: 2 after an error that is printed for the visitor."""
    _limit_memory()
    try:
        print(*save_frames(video, int(count), int(size), pathlib.Path(folder)), sep="\n")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _limit_memory() -> None:
    """Limits the address space of this process, where the operating system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
