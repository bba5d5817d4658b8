"""Clips to evaluate on: video files or folders of frames, and which of their frames are taken.

Shapes: T frames taken, S the side in pixels.
"""

import dataclasses
import glob
import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.storage import read_text_lines
from tokenizer.media import images, videos
from tokenizer.media.folders import natural_key

CLIP_FLAGS = {
    "input_files": Flag("", "Glob of video files, or, with --frame_input, of folders of frames."),
    "read_file_list": Flag("", "Instead: a text file with one such path a line."),
    "frame_input": Flag(False, "Clips are folders of frames, in the order of the numbers in their names."),
    "stride": Flag(8, "Take every so-manieth frame; of a clip that is too short for it, the largest stride that fits."),
    "random_start": Flag(
        True, "Begin anywhere in the clip (a function of the seed and the clip's name), not at its start."
    ),
    "center_crop": Flag(1.0, "Cut this share of width and height out of the middle."),
    "shuffle": Flag(False, "Take the clips in another order (a function of the seed): matters with --max_examples."),
    "skip_short_clips": Flag(False, "Leave out clips that have too few frames, and say how many."),
    "seed": Flag(0, "Of all that is random."),
}


@dataclasses.dataclass(frozen=True)
class Clip:
    """The frames of a clip that are taken."""

    name: str  # its path within the folder that all clips share
    path: str
    frames: tuple  # paths of pictures, or times in seconds of a video

    @property
    def files(self) -> tuple[str, ...]:
        return self.frames if os.path.isdir(self.path) else (self.path,)

    @property
    def facts(self) -> tuple:
        return self.frames


def find_clips(config, count: int) -> list[Clip]:
    """The clips of the flags CLIP_FLAGS, `count` frames chosen of each.

    Raises:
      UserError: naming the flag, the line of the file list, or the clip that is broken or too short.
    """
    if config.stride < 1:
        raise UserError(f"--stride={config.stride}: must be at least 1")
    if not 0 < config.center_crop <= 1:
        raise UserError(f"--center_crop={config.center_crop}: must be above 0 and at most 1 (all)")
    paths, root = _listed(config) if config.read_file_list else _matching(config)
    if config.shuffle:
        paths = [paths[i] for i in np.random.default_rng(config.seed).permutation(len(paths))]
    paths = paths[: config.max_examples or None]
    with ThreadPoolExecutor(config.n_workers) as pool:  # the frames of a video are known only when it has been read
        found = pool.map(lambda path: _clip(config, path, os.path.relpath(path, root), count), paths)
        chosen = [clip for clip in tqdm(found, total=len(paths), desc="looking", unit="clip") if clip is not None]
    if len(chosen) < len(paths):
        print(f"{len(paths) - len(chosen)} of {len(paths)} clips have fewer than {count} frames and are left out")
    if not chosen:
        raise UserError(f"no clip has {count} frames")
    return chosen


def _matching(config) -> tuple[list[str], str]:
    if not config.input_files:
        raise UserError("--input_files is missing: a glob of clips (or give --read_file_list)")
    paths = [path for path in sorted(glob.glob(config.input_files, recursive=True)) if _is_clip(config, path)]
    if not paths:
        raise UserError(f"--input_files={config.input_files}: matches no {_what(config)}")
    fixed = re.split(r"[*?\[]", config.input_files)[0]
    return paths, os.path.dirname(fixed.rstrip("/") if fixed == config.input_files else fixed) or "."


def _listed(config) -> tuple[list[str], str]:
    if config.input_files:
        raise UserError("--input_files and --read_file_list: give one of the two")
    paths = []
    for number, line in read_text_lines(config.read_file_list):
        path = line.strip()
        if not _is_clip(config, path):
            raise UserError(f"{config.read_file_list}:{number}: {path} is no {_what(config)}")
        if path in paths:
            raise UserError(f"{config.read_file_list}:{number}: {path} is there twice")
        paths.append(path)
    if not paths:
        raise UserError(f"--read_file_list={config.read_file_list}: no clip there")
    return paths, os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])


def _is_clip(config, path: str) -> bool:
    return (
        os.path.isdir(path)
        if config.frame_input
        else os.path.isfile(path) and path.lower().endswith(videos.VIDEO_EXTENSIONS)
    )


def _what(config) -> str:
    if config.frame_input:
        return "folder"
    return f"video file ({', '.join(videos.VIDEO_EXTENSIONS)}; folders of frames need --frame_input)"


def _clip(config, path: str, name: str, count: int) -> Clip | None:
    if config.frame_input:
        names = [name for name in sorted(os.listdir(path)) if name[0] != "."]
        names = [name for name in names if name.lower().endswith(images.IMAGE_EXTENSIONS)]
        names.sort(key=lambda name: natural_key(os.path.splitext(name)[0]))
        frames = [os.path.join(path, name) for name in names]
    else:
        frames = videos.timestamps(path).tolist()
    if len(frames) < count and config.skip_short_clips:
        return None
    if len(frames) < count:
        raise UserError(f"{path}: {len(frames)} frames, {count} are needed (--skip_short_clips leaves it out)")
    stride = min(config.stride, (len(frames) - 1) // max(count - 1, 1))
    starts = len(frames) - (count - 1) * stride
    rng = np.random.default_rng([config.seed, zlib.crc32(name.encode())])
    start = int(rng.integers(starts)) if config.random_start else 0
    return Clip(name, path, tuple(frames[start + i * stride] for i in range(count)))


def load(clip: Clip, side: int, center_crop: float) -> np.ndarray:
    """The frames of a clip, [T,S,S,3] in [0, 1]. The crop is exact to half a pixel.

    Raises:
      UserError: naming the file that is broken.
    """
    whole = round(side / center_crop)  # resized and cut is the same as cut and resized, for pictures and videos alike
    if os.path.isdir(clip.path):
        pixels = np.stack([images.load(path, whole) for path in clip.frames])
    else:
        pixels = videos.read(clip.path, clip.frames, whole)
    margin = (whole - side) // 2
    return pixels[:, margin : margin + side, margin : margin + side]
