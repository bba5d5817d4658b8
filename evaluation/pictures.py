"""Sheets of pictures with captions, for people to look at."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP, CAPTION = 4, 18  # pixels between pictures; height of a line of text
PAPER, INK, FRAME = (255, 255, 255), (40, 40, 40), (216, 60, 40)


def sheet(
    rows: list[list[np.ndarray]], columns: list[str], names: list[str], size: int, framed: str = ""
) -> Image.Image:
    """Rows of pictures under column captions, a name above each row; columns captioned `framed` get a coloured frame.

    Pictures are [H, W, 3] in [0, 1] and drawn `size` pixels wide, enlarged pixel by pixel so that nothing is hidden.
    """
    assert all(len(row) == len(columns) for row in rows) and len(names) == len(rows)
    font = ImageFont.load_default(size=13)
    step = size + GAP
    height = CAPTION + len(rows) * (step + CAPTION)
    paper = Image.new("RGB", (len(columns) * step + GAP, height + GAP), PAPER)
    draw = ImageDraw.Draw(paper)
    for x, caption in enumerate(columns):
        draw.text((GAP + x * step + size // 2, CAPTION // 2), caption, INK, font, anchor="mm")
    for y, (row, name) in enumerate(zip(rows, names, strict=True)):
        top = CAPTION + y * (step + CAPTION)
        draw.text((GAP, top + CAPTION // 2), name, INK, font, anchor="lm")
        for x, picture in enumerate(row):
            left = GAP + x * step
            if columns[x] == framed:
                draw.rectangle((left - 3, top + CAPTION - 3, left + size + 2, top + CAPTION + size + 2), FRAME)
            paper.paste(_image(picture, size), (left, top + CAPTION))
    return paper


def _image(picture: np.ndarray, size: int) -> Image.Image:
    pixels = (np.clip(np.asarray(picture, np.float32), 0, 1) * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
