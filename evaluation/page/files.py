"""Files of the page: its example prompts, and the images that visitors give.

Shapes: see `evaluation.prompting`.
"""

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from EasyLM.errors import UserError
from evaluation.page.examples import NUM_SHOTS, Example
from evaluation.page.pictures import enlarged, original, save_enlarged
from evaluation.serving import Limits, uploads
from evaluation.serving.request_errors import RequestError
from tokenizer.media import grids, images

LIMITS = Limits()  # `pixels` is that of each image: seven photographs of a phone have more together
_FIELD = "file"  # what `uploads` calls an image
# Order of the images of an analogy on its sheet: images in the first row, annotations in the second.
_ANALOGY_ORDER = [*range(0, 2 * NUM_SHOTS + 1, 2), *range(1, 2 * NUM_SHOTS, 2)]


class ExampleFiles:
    """The examples of one tab as files.

    Attributes:
      examples: the examples.
      sheets: (path, caption) of a picture of each example.
      folder: the page's folder.
      is_analogy: whether they are analogies, not sequences.
    """

    def __init__(self, examples: Sequence[Example], folder: pathlib.Path, name: str):
        """Writes the pictures to `folder`; `name` begins the names of the files."""
        self.examples, self.sheets, self.is_analogy = examples, [], examples[0].is_analogy
        self.folder, self._name = folder, name
        for i, example in enumerate(examples):
            order = _ANALOGY_ORDER if self.is_analogy else range(len(example.images))
            path = folder / f"{name}_{i}.png"
            images.save(path, grids.grid(enlarged(example.images[list(order)]), -(-len(order) // 2), gap=16))
            self.sheets.append((str(path), example.name))

    def save(self, index: int) -> list[str]:
        """Writes the images of an example, enlarged, and returns their paths."""
        return [save_enlarged(image, self.folder, self._name) for image in self.examples[index].images]

    def truth_after(self, prompt: np.ndarray) -> np.ndarray | None:
        """Returns the images that follow a prompt, uint8 [P,S,S,3]; see `Example.truth_after`."""
        truths = (example.truth_after(prompt) for example in self.examples)
        return next((truth for truth in truths if truth is not None), None)


def check_stored(path: str, folder: pathlib.Path) -> None:
    """Checks that a file is one of the page's folder, where uploads are stored.

    gradio checks this only if the request marks the path as that of a file, which a malicious request can omit.

    Raises:
      UserError: if the file has been removed or lies elsewhere.
    """
    if not pathlib.Path(path).resolve().is_relative_to(folder.resolve()) or not os.path.isfile(path):
        raise UserError("a file is no longer stored: add it again")


def read_file(path: str, folder: pathlib.Path) -> bytes:
    """Reads an image file of the page's folder, and marks it as used: files that nobody uses are removed after an hour.

    Raises:
      UserError: see `check_stored`; or if the file is too large.
    """
    check_stored(path, folder)
    try:
        os.utime(path)
        if os.path.getsize(path) > LIMITS.body_bytes:
            raise UserError(f"an image file has at most {LIMITS.body_bytes // 2**20} MB")
        return pathlib.Path(path).read_bytes()
    except FileNotFoundError:  # it is removed at this moment
        raise UserError("a file is no longer stored: add it again") from None


def decode(file: bytes, size: int) -> np.ndarray:
    """Decodes an image file to uint8 [S,S,3] with S = `size`.

    Raises:
      UserError: if the image cannot be decoded, or has too many pixels.
    """
    try:
        (pixels,) = images.to_uint8(uploads.decode_images([file], size, LIMITS, _FIELD))
    except RequestError:
        raise UserError(f"an image has at most {LIMITS.pixels // 10**6} million pixels") from None
    except UserError as error:
        raise UserError(str(error).removeprefix(f"{_FIELD}[0]: ")) from error
    exact = original(file, size)
    return pixels if exact is None else exact
