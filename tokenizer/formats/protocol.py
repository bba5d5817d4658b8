"""The interface of a tokenizer for images.

Shapes: n images, S the resolution, N tokens of an image.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np


class ImageTokenizer(Protocol):
    """Maps images to codes and codes to images. Pixels are in [0, 1] outside, whatever the network's own range is."""

    @property
    def resolution(self) -> int:
        """The side of an image in pixels, S."""
        ...

    @property
    def num_codes(self) -> int:
        """The size of the codebook. Codes are 0..num_codes - 1; the special ids of a model follow."""
        ...

    @property
    def tokens_per_image(self) -> int:
        """The codes of an image, N, row by row."""
        ...

    @property
    def pixel_range(self) -> tuple[int, int]:
        """The range of the pixels inside the network: (0, 1) or (-1, 1)."""
        ...

    @property
    def digest(self) -> str:
        """16 hexadecimal digits, equal for equal tokenizers."""
        ...

    @property
    def batch_size(self) -> int:
        """The largest batch of `encode_batches` and `decode_batches`."""
        ...

    def encode(self, pixels_nSS3: np.ndarray) -> np.ndarray:
        """Encodes pixels [n,S,S,3] in [0, 1] to codes [n,N] int32."""
        ...

    def decode(self, codes_nN: np.ndarray) -> np.ndarray:
        """Decodes codes [n,N] to pixels [n,S,S,3] float32 in [0, 1]."""
        ...

    def encode_batches(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields the codes [n,N] of each batch of pixels [n,S,S,3], n at most `batch_size`."""
        ...

    def decode_batches(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields the pixels [n,S,S,3] in [0, 1] of each batch of codes [n,N]."""
        ...
