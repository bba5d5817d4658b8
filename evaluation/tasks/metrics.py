"""Figures of answers: perplexity and its unigram baseline, and how far drawn pictures are from true ones.

Shapes: B pictures, H W pixels, N tokens of a picture, V codes, C colours of a palette. Pictures are in [0, 1].
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from EasyLM.errors import UserError
from EasyLM.storage import read_text_lines
from tokenizer.image_quality import mse, psnr, ssim
from tokenizer.synthetic import scenes

EDGE_TOLERANCE = 0.0075  # of the diagonal, as the Berkeley benchmark of boundaries has it


def nearest_colours(pictures_BHW3: np.ndarray, palette_C3: np.ndarray) -> np.ndarray:
    """The number of the palette's colour (bytes) that is nearest to each pixel: [B, H, W]."""
    distances_CBHW = [np.square(pictures_BHW3 - colour / 255).sum(-1) for colour in np.asarray(palette_C3)]
    return np.argmin(distances_CBHW, axis=0)


def mean_iou(pictures: np.ndarray, truths: np.ndarray, palette: Sequence) -> np.ndarray:
    """Intersection over union of segmentations drawn in a palette, mean over the truth's classes. Shape [B].

    Each pixel, of both, belongs to the class of the nearest colour. The palette's first colour is the background, which
    does not count. Where the truth has nothing else, the figure is 1 if the answer has nothing else either, and else 0.
    """
    drawn_BHW, true_BHW = (nearest_colours(x, np.array(palette)) for x in (pictures, truths))
    classes_C111 = np.arange(1, len(palette))[:, None, None, None]
    drawn_CBHW, true_CBHW = drawn_BHW == classes_C111, true_BHW == classes_C111
    shared_CB, either_CB = (x.sum(axis=(2, 3)) for x in (drawn_CBHW & true_CBHW, drawn_CBHW | true_CBHW))
    present_CB = true_CBHW.any(axis=(2, 3))
    ratios_CB = np.where(present_CB, shared_CB / np.maximum(either_CB, 1), 0)
    nothing_drawn_B = (drawn_BHW == 0).all(axis=(1, 2))
    return np.where(
        present_CB.any(axis=0), ratios_CB.sum(axis=0) / np.maximum(present_CB.sum(axis=0), 1), nothing_drawn_B
    )


def depth_abs_rel(pictures: np.ndarray, truths: np.ndarray, near: float, far: float) -> np.ndarray:
    """Mean of |d - d*| / d* over pixels, d the depth that brightness shows: white `near`, black `far`. Shape [B]."""
    drawn, true = (far - np.asarray(x, np.float64).mean(-1) * (far - near) for x in (pictures, truths))
    return (np.abs(drawn - true) / true).mean(axis=(1, 2))


def normal_degrees(pictures: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Mean angle, in degrees, between the normals n that colours (n + 1) / 2 show. Shape [B]."""
    drawn, true = (_unit(2 * np.asarray(x, np.float64) - 1) for x in (pictures, truths))
    return np.degrees(np.arccos(np.clip((drawn * true).sum(-1), -1, 1))).mean(axis=(1, 2))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def edge_f_score(pictures: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """F1 of edge pixels, those brighter than half. Shape [B].

    A pixel counts as found if the other picture has an edge within 0.75 percent of the diagonal: at this very pixel
    below 64 pixels a side, within 3 at 256. Without the Berkeley benchmark's one-to-one matching and thinning.
    """
    drawn_BHW, true_BHW = (np.asarray(x).mean(-1) > 0.5 for x in (pictures, truths))
    reach = round(EDGE_TOLERANCE * np.hypot(*drawn_BHW.shape[1:]))
    precision_B = _share(drawn_BHW & _grown(true_BHW, reach), drawn_BHW)
    recall_B = _share(true_BHW & _grown(drawn_BHW, reach), true_BHW)
    return 2 * precision_B * recall_B / np.maximum(precision_B + recall_B, 1e-12)


def _share(part_BHW: np.ndarray, whole_BHW: np.ndarray) -> np.ndarray:
    whole_B = whole_BHW.sum(axis=(1, 2))
    return np.where(whole_B > 0, part_BHW.sum(axis=(1, 2)) / np.maximum(whole_B, 1), 1.0)


def _grown(mask_BHW: np.ndarray, reach: int) -> np.ndarray:
    """True within `reach` pixels of a true pixel."""
    _, height, width = mask_BHW.shape
    padded = np.pad(mask_BHW, ((0, 0), (reach, reach), (reach, reach)))
    grown = np.zeros_like(mask_BHW)
    for y in range(-reach, reach + 1):
        for x in range(-reach, reach + 1):
            if np.hypot(y, x) <= reach:
                grown |= padded[:, reach + y : reach + y + height, reach + x : reach + x + width]
    return grown


MASK = ((0, 0, 0), (255, 255, 255))  # background and object of a picture that shows one class
PICTURE_FIGURES: dict[str, Callable] = {"mse": mse, "psnr": psnr, "ssim": ssim}  # of every task
# What a task may be judged by besides, in the rendered scenes' colours and depths: (pictures, truths) -> [B].
FIGURES: dict[str, Callable] = {
    "scene_iou": functools.partial(mean_iou, palette=(scenes.BACKGROUND, *scenes.PALETTE.values())),
    "mask_iou": functools.partial(mean_iou, palette=MASK),
    "depth_abs_rel": functools.partial(depth_abs_rel, near=scenes.NEAR, far=scenes.FAR),
    "normal_degrees": normal_degrees,
    "edge_f_score": edge_f_score,
}
HIGHER_IS_BETTER = frozenset({"psnr", "ssim", "scene_iou", "palette_iou", "mask_iou", "edge_f_score"})


def task_figures(palette: str, depth_range: str) -> dict[str, Callable]:
    """FIGURES, and those of a user's own palette (a file) and depths (`near,far`); empty: as they are.

    Raises:
      UserError: naming the flag, or the line of the file.
    """
    found = dict(FIGURES)
    if palette:
        found["palette_iou"] = functools.partial(mean_iou, palette=read_palette(palette))
    if depth_range:
        near, far = _depths(depth_range)
        found["depth_abs_rel"] = functools.partial(depth_abs_rel, near=near, far=far)
    return found


def read_palette(path: str) -> list[tuple[int, ...]]:
    """The colours of a file, `R G B` a line, the first the background. Empty lines do not count.

    Raises:
      UserError: naming FILE:LINE.
    """
    owners: dict[tuple[int, ...], int] = {}
    for number, line in read_text_lines(path):
        words = line.split()
        colour = tuple(int(word) for word in words if word.isdecimal())
        if not len(words) == len(colour) == 3 or max(colour) > 255:
            raise UserError(f"{path}:{number}: {line.strip()!r}: must be R G B, three integers from 0 to 255")
        if colour in owners:
            raise UserError(f"{path}:{number}: {line.strip()}: the colour of line {owners[colour]} already")
        owners[colour] = number
    if len(owners) < 2:
        raise UserError(f"--palette={path}: {len(owners)} colours: the background and at least one class are needed")
    return list(owners)


def _depths(text: str) -> tuple[float, float]:
    try:
        near, far = map(float, text.split(","))
    except ValueError:
        near = far = 0.0
    if not (0 < near < np.inf and 0 < far < np.inf and near != far):
        raise UserError(f"--depth_range={text}: must be near,far: two distances above 0 that differ, as 0.5,10")
    return near, far


def perplexity(log_likelihoods_BN: np.ndarray) -> np.ndarray:
    """exp(mean negative log-likelihood) of each example's tokens. Shape [B]."""
    return np.exp(-np.asarray(log_likelihoods_BN, np.float64).mean(axis=1))


def unigram_log_likelihoods(tokens_BN: np.ndarray, codes: int) -> np.ndarray:
    """Log-likelihood of each example's tokens under the token frequencies of all other examples. Shape [B, N].

    Add-one smoothing over `codes` ids. Leaving the example itself out keeps the baseline from knowing the answer.
    """
    counts_BV = np.stack([np.bincount(tokens, minlength=codes) for tokens in tokens_BN])
    others_BV = counts_BV.sum(axis=0)[None, :] - counts_BV + 1
    likelihoods_BV = others_BV / others_BV.sum(axis=1, keepdims=True)
    return np.log(np.take_along_axis(likelihoods_BV, tokens_BN, axis=1))


def with_standard_error(values: np.ndarray) -> dict[str, float]:
    """Mean over examples and its standard error."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "standard_error": float(error)}
