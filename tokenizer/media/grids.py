"""Several images as one."""

import einops
import numpy as np


def grid(pixels_nHW3: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """Arranges images, uint8 [n,height,width,3], in rows of `columns`, `gap` white pixels apart: uint8 [H,W,3]."""
    count, height, width, _ = pixels_nHW3.shape
    rows = -(-count // columns)
    cells = np.full((rows * columns, height + gap, width + gap, 3), 255, np.uint8)
    cells[:count, :height, :width] = pixels_nHW3
    canvas = einops.rearrange(cells, "(row column) h w c -> (row h) (column w) c", row=rows)
    return canvas[: rows * (height + gap) - gap, : columns * (width + gap) - gap]


def tile(pixels_RCHW3: np.ndarray) -> np.ndarray:
    """Arranges images, uint8 [rows,columns,height,width,3], edge to edge: uint8 [rows*height,columns*width,3]."""
    return einops.rearrange(pixels_RCHW3, "row column h w c -> (row h) (column w) c")
