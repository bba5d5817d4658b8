"""Metrics of answers: errors of generated images, perplexity, and its unigram baseline.

Shapes: B images, H W pixels, N tokens of an image, V codes, C colours of a palette. Images are in [0, 1].
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from EasyLM.errors import UserError
from EasyLM.storage import read_text_lines
from tokenizer.image_quality import mse, psnr, ssim
from tokenizer.synthetic import scenes

ImageMetric = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (images, true images), both [B,H,W,3] -> [B]
Colour = tuple[int, int, int]  # bytes

EDGE_TOLERANCE = 0.0075  # fraction of the image's diagonal, as in the Berkeley boundary benchmark


def nearest_colours(images_BHW3: np.ndarray, palette_C3: np.ndarray) -> np.ndarray:
    """Returns the index of the palette colour (bytes) nearest to each pixel: [B, H, W]."""
    distances_CBHW = [np.square(images_BHW3 - colour / 255).sum(-1) for colour in np.asarray(palette_C3)]
    return np.argmin(distances_CBHW, axis=0)


def mean_iou(images_BHW3: np.ndarray, truths_BHW3: np.ndarray, palette: Sequence[Colour]) -> np.ndarray:
    """Intersection over union of segmentations, averaged over the classes of the truth. Shape [B].

    Each pixel belongs to the class of the nearest palette colour. The first colour is the background, which is not
    averaged. If the truth is background only, the value is 1 if the image is background only, else 0.
    """
    predicted_BHW, true_BHW = (nearest_colours(x, np.array(palette)) for x in (images_BHW3, truths_BHW3))
    classes_C111 = np.arange(1, len(palette))[:, None, None, None]
    predicted_CBHW, true_CBHW = predicted_BHW == classes_C111, true_BHW == classes_C111
    intersection_CB = (predicted_CBHW & true_CBHW).sum(axis=(2, 3))
    union_CB = (predicted_CBHW | true_CBHW).sum(axis=(2, 3))
    present_CB = true_CBHW.any(axis=(2, 3))
    iou_CB = np.where(present_CB, intersection_CB / np.maximum(union_CB, 1), 0)
    only_background_B = (predicted_BHW == 0).all(axis=(1, 2))
    mean_B = iou_CB.sum(axis=0) / np.maximum(present_CB.sum(axis=0), 1)
    return np.where(present_CB.any(axis=0), mean_B, only_background_B)


def colour_iou(images_BHW3: np.ndarray, truths_BHW3: np.ndarray) -> np.ndarray:
    """Intersection over union, averaged over the main colours of the truth. Shape [B].

    Main colours cover at least 1/128 of the truth, half a tile of a mosaic. Each pixel of the truth and of the image
    belongs to the nearest main colour.
    """
    values = []
    for image_HW3, truth_HW3 in zip(np.asarray(images_BHW3), np.asarray(truths_BHW3), strict=True):
        pixels = np.round(truth_HW3.reshape(-1, 3) * 255).astype(int)
        colours, counts = np.unique(pixels, axis=0, return_counts=True)
        colours = colours[counts >= min(len(pixels) / 128, counts.max())]
        predicted, true = (nearest_colours(x[None], colours)[0] for x in (image_HW3, truth_HW3))
        masks = [(predicted == colour, true == colour) for colour in range(len(colours))]
        values.append(np.mean([(a & b).sum() / (a | b).sum() for a, b in masks]))
    return np.array(values)


def depth_abs_rel(images_BHW3: np.ndarray, truths_BHW3: np.ndarray, near: float, far: float) -> np.ndarray:
    """Mean of |d - d*| / d* over pixels; depth d is `near` for white and `far` for black. Shape [B]."""
    predicted, true = (far - np.asarray(x, np.float64).mean(-1) * (far - near) for x in (images_BHW3, truths_BHW3))
    return (np.abs(predicted - true) / true).mean(axis=(1, 2))


def normal_degrees(images_BHW3: np.ndarray, truths_BHW3: np.ndarray) -> np.ndarray:
    """Mean angle in degrees between normals. A normal n has the colour (n + 1) / 2. Shape [B]."""
    predicted, true = (_normalize(2 * np.asarray(x, np.float64) - 1) for x in (images_BHW3, truths_BHW3))
    return np.degrees(np.arccos(np.clip((predicted * true).sum(-1), -1, 1))).mean(axis=(1, 2))


def _normalize(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def edge_f_score(images_BHW3: np.ndarray, truths_BHW3: np.ndarray) -> np.ndarray:
    """F1 score of edge pixels, which are brighter than 0.5. Shape [B].

    An edge pixel matches if the other image has an edge pixel within `EDGE_TOLERANCE`. This is 0 pixels for sides
    below 64 pixels, and 3 pixels for sides of 256. Unlike the Berkeley benchmark, matches are not one-to-one and edges
    are not thinned.
    """
    predicted_BHW, true_BHW = (np.asarray(x).mean(-1) > 0.5 for x in (images_BHW3, truths_BHW3))
    radius = round(EDGE_TOLERANCE * np.hypot(*predicted_BHW.shape[1:]))
    precision_B = _fraction(predicted_BHW & _dilate(true_BHW, radius), predicted_BHW)
    recall_B = _fraction(true_BHW & _dilate(predicted_BHW, radius), true_BHW)
    return 2 * precision_B * recall_B / np.maximum(precision_B + recall_B, 1e-12)


def _fraction(part_BHW: np.ndarray, whole_BHW: np.ndarray) -> np.ndarray:
    """Returns the fraction of true pixels of `whole_BHW` that are true in `part_BHW`; 1 if it has none."""
    whole_B = whole_BHW.sum(axis=(1, 2))
    return np.where(whole_B > 0, part_BHW.sum(axis=(1, 2)) / np.maximum(whole_B, 1), 1.0)


def _dilate(mask_BHW: np.ndarray, radius: int) -> np.ndarray:
    """True within `radius` pixels of a true pixel."""
    _, height, width = mask_BHW.shape
    padded = np.pad(mask_BHW, ((0, 0), (radius, radius), (radius, radius)))
    dilated = np.zeros_like(mask_BHW)
    for y in range(-radius, radius + 1):
        for x in range(-radius, radius + 1):
            if np.hypot(y, x) <= radius:
                dilated |= padded[:, radius + y : radius + y + height, radius + x : radius + x + width]
    return dilated


MASK_PALETTE: tuple[Colour, ...] = ((0, 0, 0), (255, 255, 255))  # background and one class
SCENE_PALETTE: tuple[Colour, ...] = (scenes.BACKGROUND, *scenes.PALETTE.values())
IMAGE_METRICS: dict[str, ImageMetric] = {"mse": mse, "psnr": psnr, "ssim": ssim}  # computed for every task
# Additional metrics of single tasks, with the colours and depths of rendered scenes.
TASK_METRICS: dict[str, ImageMetric] = {
    "scene_iou": functools.partial(mean_iou, palette=SCENE_PALETTE),
    "mask_iou": functools.partial(mean_iou, palette=MASK_PALETTE),
    "colour_iou": colour_iou,
    "depth_abs_rel": functools.partial(depth_abs_rel, near=scenes.NEAR, far=scenes.FAR),
    "normal_degrees": normal_degrees,
    "edge_f_score": edge_f_score,
}
HIGHER_IS_BETTER = frozenset(
    {"psnr", "ssim", "scene_iou", "palette_iou", "mask_iou", "colour_iou", "edge_f_score", "accuracy", "first_accuracy"}
)


def task_metrics(
    palette: Sequence[Colour] | None = None, depth_range: tuple[float, float] | None = None
) -> Mapping[str, ImageMetric]:
    """Returns `TASK_METRICS`, with `palette_iou` if there is a palette, and with another depth range (near, far)."""
    metrics = dict(TASK_METRICS)
    if palette:
        metrics["palette_iou"] = functools.partial(mean_iou, palette=palette)
    if depth_range:
        near, far = depth_range
        metrics["depth_abs_rel"] = functools.partial(depth_abs_rel, near=near, far=far)
    return metrics


def read_palette(path: str) -> list[Colour]:
    """Reads a palette: one colour `R G B` per line, the background first. Empty lines are ignored.

    Raises:
      UserError: naming the file, and the line if one is invalid.
    """
    line_of_colour: dict[Colour, int] = {}
    for number, line in read_text_lines(path):
        words = line.split()
        values = [int(word) for word in words if word.isdecimal()]
        if not len(words) == len(values) == 3 or max(values) > 255:
            raise UserError(f"{path}:{number}: {line.strip()!r}: must be R G B, three integers from 0 to 255")
        red, green, blue = values
        colour = red, green, blue
        if colour in line_of_colour:
            raise UserError(f"{path}:{number}: {line.strip()}: the same colour as line {line_of_colour[colour]}")
        line_of_colour[colour] = number
    if len(line_of_colour) < 2:
        raise UserError(f"{path}: {len(line_of_colour)} colours: give the background and at least one class")
    return list(line_of_colour)


def perplexity(log_likelihoods_BN: np.ndarray) -> np.ndarray:
    """exp(mean negative log-likelihood) of each example's tokens. Shape [B]."""
    return np.exp(-np.asarray(log_likelihoods_BN, np.float64).mean(axis=1))


def unigram_log_likelihoods(tokens_BN: np.ndarray, codes: int) -> np.ndarray:
    """Log-likelihood of each example's tokens under the token frequencies of all other examples. Shape [B, N].

    Uses add-one smoothing over `codes` ids. The frequencies exclude the example itself: the baseline must not see the
    answer.
    """
    counts_BV = np.stack([np.bincount(tokens, minlength=codes) for tokens in tokens_BN])
    others_BV = counts_BV.sum(axis=0)[None, :] - counts_BV + 1
    likelihoods_BV = others_BV / others_BV.sum(axis=1, keepdims=True)
    return np.log(np.take_along_axis(likelihoods_BV, tokens_BN, axis=1))


def with_standard_error(values: np.ndarray | Sequence[float]) -> dict[str, float]:
    """Returns the mean over examples and its standard error."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "standard_error": float(error)}
