"""Output files of generated images. No output may overwrite an input or another output.

Shapes: see `evaluation.prompting`; R rows and K columns of a sheet, H W pixels.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from EasyLM.errors import UserError
from evaluation.runs.clips import Clip
from evaluation.runs.lines import Line
from tokenizer.media import grids, images, video_writer


@dataclasses.dataclass(frozen=True)
class LineOutputs:
    """The image files of a line: one sheet of all candidates, and one file for each if there are several.

    Attributes:
      base_dir: folder that the lines' output paths are relative to.
      num_candidates: samples of each line.
      size: (width, height) of each image; "original": the size of the last input; None: the tokenizer's resolution.
      include_input: put the prompt before each sample.
    """

    base_dir: str
    num_candidates: int
    size: tuple[int, int] | str | None = None
    include_input: bool = False

    def paths(self, line: Line) -> list[str]:
        path = os.path.join(self.base_dir, line.output)
        stem, ending = os.path.splitext(path)
        numbered = [f"{stem}_{number}{ending}" for number in range(self.num_candidates)]
        return [path, *numbered] if self.num_candidates > 1 else [path]

    def check(self, lines: Sequence[Line]) -> None:
        """Raises UserError, naming the line, if an output would overwrite an image of any line or another output."""
        readers = {os.path.realpath(path): line.name for line in lines for path in (*line.inputs, *line.named_targets)}
        owners: dict[str, str] = {}
        for line in lines:
            images.check_extension(line.output, f"{line.name}: {line.output}")
            for path in self.paths(line):
                real = os.path.realpath(path)
                if real in readers:
                    raise UserError(
                        f"{line.name}: {path} would overwrite an image of {readers[real]}: choose another output folder"
                    )
                if owners.setdefault(real, line.name) != line.name:
                    raise UserError(f"{line.name}: {path} is already an output of {owners[real]}")

    def save(self, line: Line, prompt_PSS3: np.ndarray, samples_CFSS3: np.ndarray) -> list[str]:
        """Writes the samples of a line; returns the paths."""
        rows = list(samples_CFSS3)
        if self.include_input:
            rows = [np.concatenate([prompt_PSS3, row]) for row in rows]
        size = _displayed_size(line.inputs[-1]) if isinstance(self.size, str) else self.size
        sheet = _resized(images.to_uint8(np.stack(rows)), size)
        paths = self.paths(line)
        for path, part in zip(paths, [sheet, *sheet[:, None]], strict=False):
            images.save(path, grids.tile(part))
        return paths


@dataclasses.dataclass(frozen=True)
class ClipOutputs:
    """The files of a clip: a sheet, a folder of frames for each candidate, and videos if `fps` is not 0."""

    output_dir: str
    fps: float = 0.0

    def base(self, clip: Clip) -> str:
        """Returns the folder of a clip's generated frames. The sheet has this name with `.png`."""
        return os.path.join(self.output_dir, clip.name.replace(os.sep, "_"))

    def check(self, clips: Sequence[Clip]) -> None:
        """Raises UserError if two clips have the same outputs, or an output would be inside a clip."""
        owners: dict[str, Clip] = {}
        clip_paths = {os.path.realpath(clip.path) for clip in clips}
        for clip in clips:
            base = self.base(clip)
            for path in (base, f"{base}.png"):
                other = owners.setdefault(path, clip)
                if other is not clip:
                    raise UserError(
                        f"{other.path} and {clip.path} would both be written to {os.path.basename(path)}: rename one, "
                        "or process them in two runs"
                    )
            real = pathlib.Path(os.path.realpath(base))
            if inside := clip_paths.intersection(map(str, (real, *real.parents))):
                raise UserError(f"{base} would be written into the clip {min(inside)}: choose another output folder")

    def save(self, clip: Clip, prompt_PSS3: np.ndarray, samples_CFSS3: np.ndarray) -> list[str]:
        """Writes the samples of a clip; returns the paths."""
        base = self.base(clip)
        rows = images.to_uint8(np.stack([np.concatenate([prompt_PSS3, sample]) for sample in samples_CFSS3]))
        image_files = {f"{base}.png": grids.tile(rows)}
        for candidate, row in enumerate(rows):
            for number, frame in enumerate(row[len(prompt_PSS3) :]):
                image_files[os.path.join(base, str(candidate), f"{number:03d}.png")] = frame
        for path, image in image_files.items():
            images.save(path, image)
        video_paths = [os.path.join(base, f"{candidate}.mp4") for candidate in range(len(rows))] if self.fps else []
        for path, row in zip(video_paths, rows, strict=False):
            video_writer.write(path, row, self.fps)
        return [*image_files, *video_paths]


def parse_size(text: str) -> tuple[int, int] | str | None:
    """Returns (width, height), "original", or None for empty text.

    Raises:
      UserError: with the valid forms.
    """
    if text in ("", "original"):
        return text or None
    match = re.fullmatch(r"([1-9]\d*)[x,]([1-9]\d*)", text)
    if not match:
        raise UserError("choose original or a size such as 640x480; empty: the tokenizer's resolution")
    return int(match[1]), int(match[2])


def _displayed_size(path: str) -> tuple[int, int]:
    with images.open_image(path) as image:
        return images.upright(image).size


def _resized(sheet_RKSS3: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 [R,K,S,S,3] -> [R,K,H,W,3], bicubic. None: unchanged."""
    if size is None:
        return sheet_RKSS3
    flat = sheet_RKSS3.reshape(-1, *sheet_RKSS3.shape[2:])
    flat = np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in flat])
    return flat.reshape(*sheet_RKSS3.shape[:2], *flat.shape[1:])
