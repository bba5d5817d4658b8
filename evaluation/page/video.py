"""Frames of a video that a visitor uploads, read in a process of its own."""

import os
import pathlib
import subprocess
import sys

from EasyLM.errors import UserError, check_installed

_SECONDS = 60.0
# On a machine of many cores, the stacks of numpy's threads alone could exceed the limit of memory.
_ENVIRONMENT = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_PROGRAM = "evaluation.page.video_frames"


def evenly_spaced_frames(video: str, count: int, size: int, folder: pathlib.Path) -> list[str]:
    """Writes frames of a video as PNG files of `size` pixels a side, and returns their paths in order.

    The frames are spread evenly from the first to the last. A video with fewer frames gives all of them. A decoder
    that crashes, hangs or runs out of memory ends its own process only.

    Raises:
      UserError: if PyAV is not installed, or the file cannot be read as a video.
    """
    check_installed("a video", "video", "av")
    command = [sys.executable, "-m", _PROGRAM, video, str(count), str(size), str(folder)]
    try:
        child = subprocess.run(
            command, env=os.environ | _ENVIRONMENT, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"the video takes longer than {_SECONDS:g} seconds to read: give a shorter one") from None
    if child.returncode == 2:
        raise UserError(child.stderr.strip())
    if child.returncode != 0:
        raise UserError("the video cannot be read: its decoder crashed or needs too much memory")
    return child.stdout.splitlines()
