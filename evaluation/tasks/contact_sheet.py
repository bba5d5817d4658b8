"""Sheets of pictures with captions, for people to look at."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokenizer.media import images

GAP, CAPTION, MARGIN = 4, 20, 116  # pixels between pictures; height of a line of text; width of the names
PAPER, INK, FRAME = (255, 255, 255), (40, 40, 40), (216, 60, 40)


@dataclasses.dataclass(frozen=True)
class Row:
    """Pictures [H,W,3] in [0, 1] side by side, with a name and a caption for each."""

    name: str
    captions: Sequence[str]
    pictures: Sequence[np.ndarray]


def sheet(rows: Sequence[Row], size: int, framed: str = "") -> Image.Image:
    """Rows below each other, their ends aligned; a picture captioned `framed` gets a coloured frame.

    A row's name and captions are written where they differ from those of the row above. Pictures are drawn `size`
    pixels wide, enlarged pixel by pixel so that nothing is hidden.
    """
    font = ImageFont.load_default(size=14)
    step, columns = size + GAP, max(len(row.pictures) for row in rows)
    titled = [i == 0 or _title(row) != _title(rows[i - 1]) for i, row in enumerate(rows)]
    height = len(rows) * step + sum(titled) * (CAPTION + GAP) + GAP
    paper = Image.new("RGB", (MARGIN + columns * step + GAP, height), PAPER)
    draw = ImageDraw.Draw(paper)
    top = GAP
    for row, new in zip(rows, titled, strict=True):
        assert len(row.captions) == len(row.pictures)
        top += (CAPTION + GAP) * new
        if new:
            draw.text((GAP, top + size // 2), row.name, INK, font, anchor="lm")
        left = MARGIN + (columns - len(row.pictures)) * step
        for caption, picture in zip(row.captions, row.pictures, strict=True):
            if new:
                draw.text((left + size // 2, top - CAPTION // 2), caption, INK, font, anchor="mm")
            if caption == framed:
                draw.rectangle((left - 3, top - 3, left + size + 2, top + size + 2), FRAME)
            paper.paste(_image(picture, size), (left, top))
            left += step
        top += step
    return paper


def _title(row: Row) -> tuple:
    return row.name, *row.captions


def _image(picture: np.ndarray, size: int) -> Image.Image:
    pixels = images.to_uint8(np.asarray(picture, np.float32))
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
