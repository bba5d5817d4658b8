"""Clips: video files or folders of frames, and the selection of frames that an evaluation uses.

Shapes: see `evaluation.runs`.
"""

import dataclasses
import glob
import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from EasyLM.errors import UserError
from EasyLM.flags import Flag, Required
from EasyLM.progress import progress
from EasyLM.storage import read_text_lines
from tokenizer.media import images, videos
from tokenizer.media.folders import natural_key

CLIP_FLAGS = {
    "input_files": Flag(
        "",
        "Glob of video files, or, with --frame_input, of folders of frames.",
        required=Required("unless --read_file_list is given", lambda config: not config.read_file_list),
    ),
    "read_file_list": Flag("", "Alternative to --input_files: a text file with one path per line."),
    "frame_input": Flag(False, "Clips are folders of frames, ordered by the numbers in their names."),
    "stride": Flag(
        8, "Distance between used frames, in frames. Short clips use the largest stride that fits.", least=1
    ),
    "random_start": Flag(
        True, "Start at a random frame that depends on the seed and the clip's name; else at frame 0."
    ),
    "center_crop": Flag(1.0, "Fraction of width and height that the centre crop keeps; 1: no crop.", above=0, most=1),
    "shuffle": Flag(False, "Shuffle the clips by the seed, before --max_examples applies."),
    "skip_short_clips": Flag(False, "Skip clips with too few frames and print their number; else they are an error."),
    "seed": Flag(0, "Seed of the random start and of the shuffle.", least=0, most=2**31 - 1),
}


@dataclasses.dataclass(frozen=True)
class ClipSettings:
    """Values of CLIP_FLAGS, `max_examples` and `n_workers`."""

    input_files: str
    read_file_list: str
    frame_input: bool
    stride: int
    random_start: bool
    center_crop: float
    shuffle: bool
    skip_short_clips: bool
    seed: int
    max_examples: int
    n_workers: int

    @property
    def list_path(self) -> str:
        """The file or the glob that lists the clips."""
        return self.read_file_list or self.input_files


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip and its used frames.

    Attributes:
      name: path relative to the folder that all clips share.
      path: the video file or the folder.
      frames: paths of images, or times in seconds of a video.
    """

    name: str
    path: str
    frames: tuple

    @property
    def files(self) -> tuple[str, ...]:
        return self.frames if os.path.isdir(self.path) else (self.path,)

    @property
    def parameters(self) -> tuple:
        return self.frames


def find_clips(settings: ClipSettings, num_frames: int) -> list[Clip]:
    """Returns the clips of the settings with `num_frames` used frames each.

    Raises:
      UserError: naming the flag, the line of the file list, or the clip that is broken or too short.
    """
    paths, root = _list_file(settings) if settings.read_file_list else _match_glob(settings)
    if settings.shuffle:
        paths = [paths[i] for i in np.random.default_rng(settings.seed).permutation(len(paths))]
    paths = paths[: settings.max_examples or None]

    def open_clip(path: str) -> Clip | None:
        return _open_clip(settings, path, os.path.relpath(path, root), num_frames)

    with ThreadPoolExecutor(settings.n_workers) as pool:  # counting the frames of a video requires reading it
        bar = progress(pool.map(open_clip, paths), total=len(paths), desc="reading clips", unit="clip")
        clips = [clip for clip in bar if clip is not None]
    if len(clips) < len(paths):
        print(f"{len(paths) - len(clips)} of {len(paths)} clips have fewer than {num_frames} frames and are skipped")
    if not clips:
        raise UserError(f"no clip has {num_frames} frames")
    return clips


def _match_glob(settings: ClipSettings) -> tuple[list[str], str]:
    """Returns the clips that match the glob, and their common folder."""
    pattern = settings.input_files
    paths = [path for path in sorted(glob.glob(pattern, recursive=True)) if _is_clip(settings, path)]
    if not paths:
        raise UserError(f"--input_files={pattern}: matches no {_clip_noun(settings)}")
    fixed = re.split(r"[*?\[]", pattern)[0]
    return paths, os.path.dirname(fixed.rstrip("/") if fixed == pattern else fixed) or "."


def _list_file(settings: ClipSettings) -> tuple[list[str], str]:
    """Returns the clips of the file list, and their common folder."""
    file_list = settings.read_file_list
    if settings.input_files:
        raise UserError("--input_files and --read_file_list: give one of the two")
    paths: list[str] = []
    for number, line in read_text_lines(file_list):
        path = line.strip()
        if not _is_clip(settings, path):
            raise UserError(f"{file_list}:{number}: {path} is not a {_clip_noun(settings)}")
        if path in paths:
            raise UserError(f"{file_list}:{number}: {path} is listed twice")
        paths.append(path)
    if not paths:
        raise UserError(f"--read_file_list={file_list}: lists no clips")
    return paths, os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])


def _is_clip(settings: ClipSettings, path: str) -> bool:
    if settings.frame_input:
        return os.path.isdir(path)
    return os.path.isfile(path) and path.lower().endswith(videos.VIDEO_EXTENSIONS)


def _clip_noun(settings: ClipSettings) -> str:
    if settings.frame_input:
        return "folder"
    return f"video file ({', '.join(videos.VIDEO_EXTENSIONS)}; folders of frames need --frame_input)"


def _open_clip(settings: ClipSettings, path: str, name: str, num_frames: int) -> Clip | None:
    """Returns the clip with its used frames, or None if it is too short and skipped."""
    frames = _frames_of_folder(path) if settings.frame_input else videos.timestamps(path).tolist()
    if len(frames) < num_frames and settings.skip_short_clips:
        return None
    if len(frames) < num_frames:
        raise UserError(f"{path}: {len(frames)} frames, {num_frames} are needed (--skip_short_clips skips it)")
    stride = min(settings.stride, (len(frames) - 1) // max(num_frames - 1, 1))
    num_starts = len(frames) - (num_frames - 1) * stride
    rng = np.random.default_rng([settings.seed, zlib.crc32(name.encode())])
    start = int(rng.integers(num_starts)) if settings.random_start else 0
    return Clip(name, path, tuple(frames[start + i * stride] for i in range(num_frames)))


def _frames_of_folder(path: str) -> list[str]:
    names = [
        name for name in sorted(os.listdir(path)) if name.lower().endswith(images.IMAGE_EXTENSIONS) and name[0] != "."
    ]
    names.sort(key=lambda name: natural_key(os.path.splitext(name)[0]))
    return [os.path.join(path, name) for name in names]


def load(clip: Clip, side: int, center_crop: float) -> np.ndarray:
    """Returns the used frames of a clip, [T,S,S,3] in [0, 1]. The crop is exact to half a pixel.

    Raises:
      UserError: naming the file that is broken.
    """
    full_side = round(side / center_crop)  # resize before the crop, for images and videos alike
    if os.path.isdir(clip.path):
        frames = np.stack([images.load(path, full_side) for path in clip.frames])
    else:
        frames = videos.read(clip.path, clip.frames, full_side)
    margin = (full_side - side) // 2
    return frames[:, margin : margin + side, margin : margin + side]
