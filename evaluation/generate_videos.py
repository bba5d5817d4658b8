"""Continues videos: `python -m evaluation.generate_videos --checkpoint=C --input_files='D/*.mp4' --output_dir=O`.

Of each clip `n_context_frames` are the prompt, and `n_new_frames` are drawn. A clip `D/a/b.mp4` has a sheet
`O/a_b.mp4.png`, the candidates below each other, each after the prompt; their new frames lie in
`O/a_b.mp4/CANDIDATE/000.png`, ..., and with `--fps` as videos `O/a_b.mp4/CANDIDATE.mp4`, prompt and answer.
"""

import os
import pathlib

import numpy as np

from EasyLM.errors import UserError, check_installed
from EasyLM.flags import Flag, run
from evaluation.prompting.prompter import PROMPTER_FLAGS
from evaluation.runs import clips, lines, loops
from tokenizer.media import grids, images, video_writer

FLAGS = {
    **PROMPTER_FLAGS,
    **clips.CLIP_FLAGS,
    **lines.EXAMPLE_FLAGS,
    "output_dir": Flag("", "Folder to write into."),
    **loops.GENERATION_FLAGS,
    "n_context_frames": Flag(12, "Frames of the prompt."),
    "n_new_frames": Flag(4, "Frames to draw after them."),
    "n_candidates": Flag(8, "Different continuations of each clip."),
    "batch_size_factor": Flag(4, "Clips at a time on each device; changes no result."),
    "fps": Flag(0.0, "Write each continuation as a video of so many frames a second, too; 0: do not."),
}


def main(config) -> None:
    """Continues every clip, prints and writes the figures."""
    loops.check(config, "n_context_frames", "n_new_frames", "n_candidates", "batch_size_factor", "n_workers")
    if not config.output_dir:
        raise UserError("--output_dir is missing: the folder for the answers")
    if not 0 <= config.fps <= video_writer.MAX_FPS:
        raise UserError(f"--fps={config.fps}: must be 0 (no videos) to {video_writer.MAX_FPS}")
    if config.fps:
        check_installed("--fps", "video", "av")
    truths = config.n_new_frames if config.evaluate_mse else 0  # frames of the clip that the new ones are measured by

    def load(clip, side):
        frames = clips.load(clip, side, config.center_crop)
        return frames[: config.n_context_frames], frames[config.n_context_frames :] if truths else None

    def save(clip, prompt_PSS3, answers_CFSS3):
        base = _base(config, clip)
        rows = images.to_uint8(np.stack([np.concatenate([prompt_PSS3, answer]) for answer in answers_CFSS3]))
        pictures = {f"{base}.png": grids.tile(rows)}
        for candidate, row in enumerate(rows):
            for number, frame in enumerate(row[len(prompt_PSS3) :]):
                pictures[os.path.join(base, str(candidate), f"{number:03d}.png")] = frame
        for path, picture in pictures.items():
            images.save(path, picture)
        films = [os.path.join(base, f"{candidate}.mp4") for candidate in range(len(rows))] if config.fps else []
        for path, row in zip(films, rows, strict=False):
            video_writer.write(path, row, config.fps)
        return [*pictures, *films]

    cases = clips.find_clips(config, config.n_context_frames + truths)
    _check_places(config, cases)
    loops.draw(config, cases, load, lambda clip: (config.n_context_frames, truths), save, config.output_dir)


def _base(config, clip: clips.Clip) -> str:
    """The folder of a clip's new frames; its sheet lies beside it."""
    return os.path.join(config.output_dir, clip.name.replace(os.sep, "_"))


def _check_places(config, cases: list[clips.Clip]) -> None:
    """Raises UserError if two clips share a place, or one would be written into what is read."""
    owners, read = {}, {os.path.realpath(clip.path) for clip in cases}
    for clip in cases:
        base = _base(config, clip)
        other = owners.setdefault(base, clip)
        if other is not clip:
            raise UserError(
                f"{other.path} and {clip.path} would both be written to {os.path.basename(base)}: rename one, or "
                "continue them in two runs"
            )
        place = pathlib.Path(os.path.realpath(base))
        if inside := read.intersection(map(str, (place, *place.parents))):
            raise UserError(f"{base} would be written into the clip {min(inside)}: choose another --output_dir")


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
