"""What a worker measures of an image: sides, bytes, contrast, hashes, scores. Imports no JAX."""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from EasyLM.errors import UnavailableError, UserError
from tokenizer.filter.listing import Entry
from tokenizer.filter.scores import read_scores
from tokenizer.media import images
from tokenizer.sources.reading import ItemFile, read_bytes

_SIDE = 32  # of the luminance that is hashed
_LEAST_CONTRAST = 1.0  # below it, the bits of a perceptual hash are noise
_LUMINANCE = np.array([0.299, 0.587, 0.114])


def measure(entries: Sequence[Entry], scores: Sequence[str]) -> list[dict[str, Any] | str]:
    """Measures images. One that cannot be read, or whose scores cannot be read, gives the reason instead.

    Raises:
      UnavailableError: if the store of the images cannot be reached.
    """
    return [_measured_or_reason(entry, scores) for entry in entries]


def _measured_or_reason(entry: Entry, scores: Sequence[str]) -> dict[str, Any] | str:
    try:
        return _measure(entry, scores)
    except UnavailableError:
        raise
    except UserError as error:
        return str(error)


def _measure(entry: Entry, scores: Sequence[str]) -> dict[str, Any]:
    data = read_bytes(entry.address, entry.location)
    with images.open_image(ItemFile(data, entry.address)) as image:
        width, height = image.size
        # Decodes a large JPEG at 1/2, 1/4 or 1/8 of its size, in a fraction of the time.
        image.draft(None, (2 * _SIDE, 2 * _SIDE))
        luminance_SS = images.to_bytes(image, _SIDE) @ _LUMINANCE
    contrast = float(luminance_SS.std())
    return {
        "name": entry.name,
        "address": entry.address,
        "width": width,
        "height": height,
        "bytes": len(data),
        "contrast": round(contrast, 3),
        "phash": f"{perceptual_hash(luminance_SS):016x}" if contrast >= _LEAST_CONTRAST else None,
        "md5": hashlib.md5(data, usedforsecurity=False).hexdigest(),
        "sha256": hashlib.sha256(data).hexdigest(),
        "scores": read_scores(entry, scores),
    }


def perceptual_hash(luminance_SS: np.ndarray) -> int:
    """Returns the hash `phash` of the package imagehash: which of 8x8 low frequencies are above their median.

    Args:
      luminance_SS: float [32,32].

    The frequencies are those of the two-dimensional DCT-II. The bits are those of the rows in order, the first one is
    the highest. Krawetz, "Looks Like It" (2011).
    """
    cosines_KS = _cosines()
    frequencies_KK = cosines_KS @ luminance_SS @ cosines_KS.T
    bits = frequencies_KK > np.median(frequencies_KK)
    return int.from_bytes(np.packbits(bits).tobytes())


@functools.cache
def _cosines() -> np.ndarray:
    """Returns the first 8 rows of the matrix of a DCT-II, float64 [8,32]."""
    return np.cos(np.pi / _SIDE * np.arange(8)[:, None] * (np.arange(_SIDE) + 0.5))
