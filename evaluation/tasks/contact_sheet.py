"""A contact sheet: rows of captioned images as one image."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokenizer.media import images

GAP, CAPTION, MARGIN = 4, 20, 116  # pixels between images; height of a line of text; least width of the names
PAPER, INK, FRAME = (255, 255, 255), (40, 40, 40), (216, 60, 40)


@dataclasses.dataclass(frozen=True)
class Row:
    """Images [H,W,3] in [0, 1] side by side, with a name and a caption for each image."""

    name: str
    captions: Sequence[str]
    images: Sequence[np.ndarray]


def contact_sheet(rows: Sequence[Row], size: int, framed: str = "") -> Image.Image:
    """Draws rows below each other, aligned at the right.

    A row's name and captions are drawn if they differ from those of the row above.

    Args:
      size: side of an image on the sheet, in pixels. Images are resized without interpolation (nearest neighbour).
      framed: caption of the images that are drawn with a coloured frame.
    """
    font = ImageFont.load_default(size=14)
    margin = max(MARGIN, *(round(font.getlength(row.name)) + 2 * GAP for row in rows))
    step, columns = size + GAP, max(len(row.images) for row in rows)
    is_titled = [i == 0 or _title(row) != _title(rows[i - 1]) for i, row in enumerate(rows)]
    height = len(rows) * step + sum(is_titled) * (CAPTION + GAP) + GAP
    paper = Image.new("RGB", (margin + columns * step + GAP, height), PAPER)
    draw = ImageDraw.Draw(paper)
    top = GAP
    for row, titled in zip(rows, is_titled, strict=True):
        assert len(row.captions) == len(row.images)
        if titled:
            top += CAPTION + GAP
            draw.text((GAP, top + size // 2), row.name, INK, font, anchor="lm")
        left = margin + (columns - len(row.images)) * step
        for caption, pixels in zip(row.captions, row.images, strict=True):
            if titled:
                draw.text((left + size // 2, top - CAPTION // 2), caption, INK, font, anchor="mm")
            if caption == framed:
                draw.rectangle((left - 3, top - 3, left + size + 2, top + size + 2), FRAME)
            paper.paste(_resize(pixels, size), (left, top))
            left += step
        top += step
    return paper


def _title(row: Row) -> tuple[str, ...]:
    return row.name, *row.captions


def _resize(pixels: np.ndarray, size: int) -> Image.Image:
    image = Image.fromarray(images.to_uint8(np.asarray(pixels, np.float32)))
    return image.resize((size, size), Image.Resampling.NEAREST)
