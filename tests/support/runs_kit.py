"""Helpers of the tests of evaluation runs: JSONL files, folders of frames, and settings."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from tokenizer_kit import write_image

from EasyLM import flags
from evaluation.runs import EXAMPLE_FLAGS, clips

LENGTHS = (2, 3, 2, 2)  # images of the prompt of each line


def write_lines(path: pathlib.Path, *values: Mapping[str, Any]) -> None:
    """Writes a JSONL file with an empty line after each line."""
    path.write_text("".join(json.dumps(value, separators=(",", ":")) + "\n\n" for value in values))


def write_line_examples(directory: pathlib.Path) -> dict[str, str]:
    """Writes four examples with images, targets and outputs. Returns the flags that name them."""
    for i in range(8):
        write_image(directory / "in" / f"{i}.png", i)
    Image.fromarray(np.zeros((30, 50, 3), np.uint8)).save(directory / "in" / "wide.png")
    inputs = [[f"{(i + j) % 8}.png" for j in range(count)] for i, count in enumerate(LENGTHS)]
    inputs[3][-1] = "wide.png"
    write_lines(
        directory / "lines.jsonl",
        *({"input": paths, "target": [f"{i + 4}.png"], "output": f"d/{i}.png"} for i, paths in enumerate(inputs)),
    )
    return {"input_file": str(directory / "lines.jsonl"), "input_base_dir": str(directory / "in")}


def write_clip(directory: pathlib.Path, count: int) -> None:
    """Writes frames whose colour encodes their number. Alphabetical order differs from their order."""
    directory.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((24, 40, 3), 10 * i, np.uint8)).save(directory / f"f{i}.png")


def clip_settings(**values: Any) -> clips.ClipSettings:
    """The default settings, updated by `values`."""
    config = flags.defaults({**clips.CLIP_FLAGS, **EXAMPLE_FLAGS})
    config.update(values)
    return flags.to_dataclass(clips.ClipSettings, config)


def frame_numbers(clip: clips.Clip) -> list[int]:
    """Returns the numbers of the used frames of a `write_clip` folder."""
    return [int(os.path.basename(path)[1:-4]) for path in clip.frames]


def read_json(path: str | pathlib.Path) -> dict:
    return json.loads(pathlib.Path(path).read_text())
