"""Several images as one."""

from collections.abc import Sequence

import einops
import numpy as np
from PIL import Image, ImageDraw, ImageFont


def grid(pixels_nHW3: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """Arranges images, uint8 [n,height,width,3], in rows of `columns`, `gap` white pixels apart: uint8 [H,W,3]."""
    count, height, width, _ = pixels_nHW3.shape
    rows = -(-count // columns)
    cells = np.full((rows * columns, height + gap, width + gap, 3), 255, np.uint8)
    cells[:count, :height, :width] = pixels_nHW3
    canvas = einops.rearrange(cells, "(row column) h w c -> (row h) (column w) c", row=rows)
    return canvas[: rows * (height + gap) - gap, : columns * (width + gap) - gap]


def labelled_rows(
    rows: Sequence[tuple[str, np.ndarray]], side: int, label_width: int = 128, gap: int = 4
) -> np.ndarray:
    """Arranges rows of images below each other, each with its label on the left: uint8 [H,W,3].

    Args:
      rows: (label, images) of each row, uint8 [n,S,S,3]. Images are resized to `side` without interpolation.
    """
    longest = max(len(pixels_nSS3) for _, pixels_nSS3 in rows)
    parts = []
    for label, pixels_nSS3 in rows:
        cells = np.full((longest, side, side, 3), 255, np.uint8)
        for i, pixels_SS3 in enumerate(pixels_nSS3):
            cells[i] = np.asarray(Image.fromarray(pixels_SS3).resize((side, side), Image.Resampling.NEAREST))
        parts.append(np.concatenate([_label(label, label_width, side), grid(cells, longest, gap)], axis=1))
    return grid(np.stack(parts), 1, gap)


def _label(text: str, width: int, height: int) -> np.ndarray:
    canvas = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(canvas).text((2, height // 2), text, fill="black", font=ImageFont.load_default(14), anchor="lm")
    return np.asarray(canvas)


def tile(pixels_RCHW3: np.ndarray) -> np.ndarray:
    """Arranges images, uint8 [rows,columns,height,width,3], edge to edge: uint8 [rows*height,columns*width,3]."""
    return einops.rearrange(pixels_RCHW3, "row column h w c -> (row h) (column w) c")
