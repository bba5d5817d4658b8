"""Picture files from strangers: their sizes are read and checked before a pixel is unpacked.

Shapes: P pictures, S the side in pixels.
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from EasyLM.errors import UserError
from tokenizer.media import images

# Formats whose readers meet the web every day; what else Pillow can read is not offered to strangers.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may bring.

    Attributes:
      body_bytes: size of its body.
      pictures: number of its pictures.
      pixels: of all its pictures together, as their files say before they are unpacked.
      read_seconds: time in which its header, and then its body, must have come, and in which its sender must take each
        part of the answer.
      connections: requests that are open at once, those that are still being read and those that wait included. Twice
        as many connections are held.
    """

    body_bytes: int = 16 * 2**20
    pictures: int = 64
    pixels: int = 64 * 10**6
    read_seconds: float = 30.0
    connections: int = 256


class Refused(Exception):  # noqa: N818, it is an answer
    """An answer that is no picture: HTTP `status`, a `code` for programs and a message for people."""

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after

    @property
    def body(self) -> dict:
        return {"error": {"code": self.code, "message": self.message}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {"www-authenticate": "Bearer"} if self.status == 401 else {}
        return headers if self.retry_after is None else headers | {"retry-after": str(self.retry_after)}


def check(fields: Mapping[str, Sequence[bytes]], limits: Limits) -> None:
    """Counts the pictures of all fields of a request, and their pixels, before one of them is unpacked.

    Raises:
      Refused: with status 413, if they are too many or too large.
      UserError: naming the picture by field and number, if it cannot be read.
    """
    pictures = pixels = 0
    for name, files in fields.items():
        pictures += len(files)
        if pictures > limits.pictures:
            raise Refused(
                413, "too_many_pictures", f"{name}: {pictures} pictures in all, at most {limits.pictures} are taken"
            )
        for i, data in enumerate(files):
            with _open(data, f"{name}[{i}]") as image:
                pixels += image.width * image.height
            if pixels > limits.pixels:
                raise Refused(
                    413,
                    "too_many_pixels",
                    f"{name}[{i}] has {image.width} x {image.height} pixels: a request may have {limits.pixels} in all",
                )


def decode(files: Sequence[bytes], size: int, limits: Limits, name: str = "pictures") -> np.ndarray:
    """Picture files as the tokenizer sees them, see `images.load`: float32 [P,S,S,3] in [0, 1].

    Raises: as `check`, of which this is the only field.
    """
    check({name: files}, limits)
    return np.stack([_pixels(data, size, f"{name}[{i}]") for i, data in enumerate(files)])


def _pixels(data: bytes, size: int, name: str) -> np.ndarray:
    with _open(data, name) as image:
        try:
            return images.to_pixels(image, size)
        except Exception as error:
            raise UserError(f"{name}: broken picture ({error or type(error).__name__})") from error


def _open(data: bytes, name: str) -> Image.Image:
    """The file with its header read."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Refused(413, "too_many_pixels", f"{name}: {error}") from error
    except Exception as error:  # on broken bytes Pillow's readers raise nearly anything
        kinds = ", ".join(FORMATS)
        raise UserError(f"{name}: not a readable picture of {len(data)} bytes; give {kinds}") from error
