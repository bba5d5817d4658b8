"""Uploaded image files: headers are checked before pixels are decoded.

Shapes: see `evaluation.prompting`.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from EasyLM.errors import UserError
from evaluation.serving.limits import Limits
from evaluation.serving.request_errors import RequestError
from tokenizer.media import images

# Pillow's other decoders are less tested against malicious files.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


def check_images(fields: Mapping[str, Sequence[bytes]], limits: Limits) -> None:
    """Checks the number of images and pixels in all fields of a request, without decoding them.

    Raises:
      RequestError: with status 413, if there are too many images or pixels.
      UserError: naming the field and the number of an image whose header cannot be read.
    """
    num_images = num_pixels = 0
    for name, files in fields.items():
        num_images += len(files)
        if num_images > limits.images:
            raise RequestError(
                413, "too_many_pictures", f"{name}: {num_images} images in the request, at most {limits.images} allowed"
            )
        for i, data in enumerate(files):
            with _open(data, f"{name}[{i}]") as image:
                num_pixels += image.width * image.height
            if num_pixels > limits.pixels:
                raise RequestError(
                    413,
                    "too_many_pixels",
                    f"{name}[{i}] has {image.width} x {image.height} pixels: all images of a request have at most "
                    f"{limits.pixels}",
                )


def decode_images(files: Sequence[bytes], size: int, limits: Limits, name: str = "pictures") -> np.ndarray:
    """Decodes image files to float32 [P,S,S,3] in [0, 1], with S = `size`; see `images.load`.

    Raises:
      RequestError: see `check_images`.
      UserError: see `check_images`; or if there is no file, or an image cannot be decoded.
    """
    if not files:
        raise UserError(f"{name}: give at least one image")
    check_images({name: files}, limits)
    return np.stack([_pixels(data, size, f"{name}[{i}]") for i, data in enumerate(files)])


def _pixels(data: bytes, size: int, name: str) -> np.ndarray:
    with _open(data, name) as image:
        try:
            images.prepare(image)
            return images.to_pixels(image, size)
        except Exception as error:
            raise UserError(f"{name}: broken image ({error or type(error).__name__})") from error


def _open(data: bytes, name: str) -> Image.Image:
    """Opens a file and reads its header."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise RequestError(413, "too_many_pixels", f"{name}: {error}") from error
    except Exception as error:  # Pillow raises many types for invalid bytes
        raise UserError(f"{name}: not a readable image ({len(data)} bytes); give {', '.join(FORMATS)}") from error
