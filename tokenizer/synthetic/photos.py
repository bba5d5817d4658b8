"""Photographs that scikit-image and scikit-learn carry in their wheels: real pictures without a download."""

import functools
import importlib.util
import pathlib

import numpy as np
from PIL import Image, ImageEnhance

from EasyLM.errors import UserError

# (package, path in it). A held-out photograph is in no training set, so figures on it are of a picture never seen.
TRAINING = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/retina.jpg"),
    ("skimage", "data/ihc.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/camera.png"),
    ("skimage", "data/brick.png"),
    ("skimage", "data/coins.png"),
    ("sklearn", "datasets/images/china.jpg"),
)
HELD_OUT = (("skimage", "data/coffee.png"), ("sklearn", "datasets/images/flower.jpg"))


def crop(seed: int, size: int, held_out: bool = False) -> np.ndarray:
    """A square of a photograph, at least a third of its shorter side, perhaps mirrored: uint8 [size,size,3].

    Raises:
      UserError: if scikit-image or scikit-learn is not installed.
    """
    rng = np.random.default_rng([seed, 11])
    names = HELD_OUT if held_out else TRAINING
    photograph = _open(*names[rng.integers(len(names))])
    shorter = min(photograph.size)
    side = int(rng.uniform(max(size, shorter / 3), shorter))
    left, top = (int(rng.integers(extent - side + 1)) for extent in photograph.size)
    square = photograph.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    pixels = np.asarray(square)
    return pixels[:, ::-1].copy() if rng.random() < 0.5 else pixels.copy()


def recoloured(square: np.ndarray, seed: int) -> np.ndarray:
    """The picture with other colours: hues turned, colours stronger or weaker, in one of four channels exchanged.

    A few photographs have a few colours: who learns from these alone is sure of wrong ones elsewhere.
    """
    rng = np.random.default_rng([seed, 17])
    hue, saturation, value = Image.fromarray(square).convert("HSV").split()
    turned = hue.point(np.roll(np.arange(256), int(rng.normal(0, 24))).tolist())  # 24 of 256: about 34 degrees
    picture = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
    pixels = np.asarray(ImageEnhance.Color(picture).enhance(rng.uniform(0.5, 1.5)))
    return pixels[..., rng.permutation(3)] if rng.random() < 0.25 else pixels


@functools.cache
def _open(package: str, path: str) -> Image.Image:
    found = importlib.util.find_spec(package)
    if found is None:
        raise UserError(f"the photographs of {package} need it installed: pip install scikit-image scikit-learn")
    return Image.open(pathlib.Path(found.origin).parent / path).convert("RGB")
