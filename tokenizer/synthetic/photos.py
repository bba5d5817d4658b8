"""Crops of the photographs that scikit-image and scikit-learn contain: real images without a download."""

import functools
import importlib.util
import pathlib

import numpy as np
from PIL import Image, ImageEnhance

from EasyLM.errors import check_installed

# (package, path in the package). Held-out photographs are not used for training.
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


def check_available(feature: str) -> None:
    """Checks, before the work of a command, that the packages with the photographs are installed.

    Raises:
      UnavailableError: naming the feature, which needs the photographs, and the missing package.
    """
    check_installed(feature, "quickstart", "skimage", "sklearn")


def crop(seed: int, size: int, held_out: bool = False) -> np.ndarray:
    """Returns a random square of a photograph, mirrored with probability 1/2.

    The square's side is at least a third of the photograph's shorter side and, where the photograph is large enough, at
    least `size`: smaller photographs are enlarged.

    Returns:
      uint8 [size,size,3].

    Raises:
      UnavailableError: if scikit-image or scikit-learn is not installed.
    """
    rng = np.random.default_rng([seed, 11])
    files = HELD_OUT if held_out else TRAINING
    photograph = _open(*files[rng.integers(len(files))])
    shorter = min(photograph.size)
    side = int(rng.uniform(min(max(size, shorter / 3), shorter), shorter))
    left, top = (int(rng.integers(extent - side + 1)) for extent in photograph.size)
    square = photograph.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    pixels = np.asarray(square)
    return pixels[:, ::-1].copy() if rng.random() < 0.5 else pixels.copy()


def recolour(pixels: np.ndarray, seed: int) -> np.ndarray:
    """Randomly shifts hues, scales saturation and, for one in four seeds, permutes channels: uint8 [S,S,3].

    There are few photographs with few colours. Augmenting their colours prevents overfitting.
    """
    rng = np.random.default_rng([seed, 17])
    hue, saturation, value = Image.fromarray(pixels).convert("HSV").split()
    shifted = hue.point(np.roll(np.arange(256), int(rng.normal(0, 24))).tolist())  # 24 of 256: about 34 degrees
    image = Image.merge("HSV", (shifted, saturation, value)).convert("RGB")
    recoloured = np.asarray(ImageEnhance.Color(image).enhance(rng.uniform(0.5, 1.5)))
    return recoloured[..., rng.permutation(3)] if rng.random() < 0.25 else recoloured


@functools.cache
def _open(package: str, path: str) -> Image.Image:
    check_available("a photograph")
    spec = importlib.util.find_spec(package)
    assert spec and spec.origin, package
    return Image.open(pathlib.Path(spec.origin).parent / path).convert("RGB")
