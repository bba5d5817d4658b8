"""Files of the page: the example prompts, and the answers that visitors download.

Shapes: see `evaluation.prompting`.
"""

import pathlib
import tempfile
from collections.abc import Sequence

import numpy as np

from evaluation.serving.page_examples import Example
from tokenizer.media import grids, images

_MIN_SIDE = 256  # pixels; smaller images are enlarged


def enlarged(image: np.ndarray) -> np.ndarray:
    """Repeats the pixels of an image until its side is at least `_MIN_SIDE`."""
    factor = -(-_MIN_SIDE // len(image))
    return image.repeat(factor, 0).repeat(factor, 1)


def save_answer(images_CFSS3: np.ndarray, folder: pathlib.Path) -> pathlib.Path:
    """Writes one PNG file, not enlarged: a row per candidate, a column per new image."""
    pixels = images.to_uint8(images_CFSS3.reshape(-1, *images_CFSS3.shape[2:]))
    with tempfile.NamedTemporaryFile(dir=folder, prefix="answer_", suffix=".png", delete=False) as file:
        file.write(images.png_bytes(grids.grid(pixels, images_CFSS3.shape[1])))
    return pathlib.Path(file.name)


def save_example(example: Example, folder: pathlib.Path, name: str) -> list[str]:
    """Writes the images of an example, enlarged, and returns their paths."""
    paths = [folder / f"{name}_{i}.png" for i in range(len(example.images))]
    for path, image in zip(paths, example.images, strict=True):
        images.save(path, enlarged(image))
    return [str(path) for path in paths]


def save_example_sheets(
    examples: Sequence[Example], order: Sequence[int], folder: pathlib.Path, name: str
) -> list[tuple[str, str]]:
    """Writes a sheet per example: its images in two rows, in this order. Returns (path, caption) of each sheet."""
    sheets = []
    for i, example in enumerate(examples):
        path = folder / f"{name}_{i}.png"
        cells = np.stack([enlarged(example.images[k]) for k in order])
        images.save(path, grids.grid(cells, -(-len(order) // 2), gap=16))
        sheets.append((str(path), example.name))
    return sheets
