"""Draws answers to prompts: `python -m evaluation.batch_generation --checkpoint=C --input_file=J --output_base_dir=O`.

A line of J is `{"input": [paths], "output": path}`, with `--evaluate_mse` also `"target": [paths]`, one for each new
picture. The file at `output` has the candidates below each other, their new pictures side by side (after the input, if
`--include_input`); with several candidates each also has a file of its own: `answer.png` has `answer_0.png`, ...
"""

import os
import re

import numpy as np
from PIL import Image

from EasyLM.errors import UserError
from EasyLM.flags import Flag, run
from evaluation.prompting.prompter import PROMPTER_FLAGS
from evaluation.runs import loops
from evaluation.runs.lines import EXAMPLE_FLAGS, LINE_FLAGS, Line, read_lines
from tokenizer.media import grids, images

FLAGS = {
    **PROMPTER_FLAGS,
    **LINE_FLAGS,
    "json_output_key": Flag("output", "Key of a line's path for the answer."),
    **EXAMPLE_FLAGS,
    "output_base_dir": Flag("", "Folder that the answers' paths are relative to."),
    **loops.GENERATION_FLAGS,
    "batch_size_factor": Flag(4, "Examples at a time on each device; changes no result."),
    "resize_output": Flag(
        "", "Size of each picture: original (the last input's), WIDTHxHEIGHT; empty: the tokenizer's."
    ),
    "include_input": Flag(False, "Put the prompt before the answer."),
}


def main(config) -> None:
    """Draws the answer to every line, prints and writes the figures."""
    loops.check(config, "n_new_frames", "n_candidates", "batch_size_factor", "n_workers")
    if not config.output_base_dir:
        raise UserError("--output_base_dir is missing: the folder for the answers")
    size = parse_size(config.resize_output)
    lines = read_lines(config, target="optional" if config.evaluate_mse else "left out", output=True)
    _check_lines(config, lines)

    def load(line, side):
        prompt, truth = ([images.load(path, side) for path in paths] for paths in (line.inputs, line.targets))
        return np.stack(prompt), np.stack(truth) if truth else None

    def save(line, prompt_PSS3, answers_CFSS3):
        rows = list(answers_CFSS3)
        if config.include_input:
            rows = [np.concatenate([prompt_PSS3, row]) for row in rows]
        rows = resized(images.to_uint8(np.stack(rows)), _shown_size(line.inputs[-1]) if size == "original" else size)
        paths = _paths(config, line)
        for path, part in zip(paths, [rows, *rows[:, None]], strict=False):
            images.save(path, grids.tile(part))
        return paths

    loops.draw(config, lines, load, lambda line: (len(line.inputs), len(line.targets)), save, config.output_base_dir)


def parse_size(text: str) -> tuple[int, int] | str | None:
    """(width, height), or "original", or None for empty."""
    if text in ("", "original"):
        return text or None
    found = re.fullmatch(r"([1-9]\d*)[x,]([1-9]\d*)", text)
    if not found:
        raise UserError(f"--resize_output={text}: choose original, or a size as 640x480; empty: the tokenizer's")
    return int(found[1]), int(found[2])


def _shown_size(path: str) -> tuple[int, int]:
    with Image.open(path) as image:
        return images.upright(image).size


def _paths(config, line: Line) -> list[str]:
    """The files of a line's answer: all candidates together, then each, if there are several."""
    path = os.path.join(config.output_base_dir, line.output)
    stem, ending = os.path.splitext(path)
    numbered = [f"{stem}_{number}{ending}" for number in range(config.n_candidates)]
    return [path, *numbered] if config.n_candidates > 1 else [path]


def _check_lines(config, lines: list[Line]) -> None:
    readers = {os.path.realpath(path): line.name for line in lines for path in (*line.inputs, *line.truths)}
    owners = {}
    for line in lines:
        images.check_extension(line.output, f"{line.name}: {line.output}")
        for path in _paths(config, line):
            real = os.path.realpath(path)
            if real in readers:
                raise UserError(
                    f"{line.name}: {path} would replace a picture that {readers[real]} names: choose another "
                    "--output_base_dir"
                )
            if owners.setdefault(real, line.name) != line.name:
                raise UserError(f"{line.name}: {path} is a file of {owners[real]} already")
        if line.targets and len(line.targets) != config.n_new_frames:
            raise UserError(
                f"{line.name}: {len(line.targets)} pictures in {config.json_target_key!r}, "
                f"--n_new_frames={config.n_new_frames}"
            )
    if config.evaluate_mse and not any(line.targets for line in lines):
        raise UserError(f"--evaluate_mse: no line of {config.input_file} has {config.json_target_key!r}")


def resized(pictures: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Bytes [rows,columns,S,S,3] -> [rows,columns,height,width,3] (bicubic)."""
    if size is None:
        return pictures
    flat = pictures.reshape(-1, *pictures.shape[2:])
    flat = np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in flat])
    return flat.reshape(*pictures.shape[:2], *flat.shape[1:])


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
