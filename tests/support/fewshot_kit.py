"""Helpers of few-shot tests: folders of pairs and of clips."""

import pathlib

from tokenizer_kit import write_image

from evaluation.tasks.tasks import TaskSource, folder_pairs


def write_pairs(root: pathlib.Path, count: int = 5) -> TaskSource:
    """Writes the folders `image` and `other`; returns the task of both."""
    for i in range(count):
        write_image(root / "image" / f"{i}.png", seed=i)
        write_image(root / "other" / f"{i}.png", seed=100 + i)
    return folder_pairs(str(root / "image"), str(root / "other"), "")


def pair_flags(root: pathlib.Path) -> dict[str, str]:
    """Returns the flags that name the folders of `write_pairs`."""
    return {"input_dirs": f"{root}/image", "target_dirs": f"{root}/other"}


def write_clips(root: pathlib.Path, count: int = 4, frames: int = 3) -> None:
    """Writes folders of frames below `clips`."""
    for i in range(count):
        for frame in range(frames):
            write_image(root / "clips" / str(i) / f"{frame}.png", seed=50 * i + frame)
