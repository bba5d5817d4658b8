"""Training rows from folders of images."""

import concurrent.futures
import os
import threading

import numpy as np

from EasyLM.data import shuffled_number
from EasyLM.errors import UserError
from EasyLM.process_pool import available_cores
from EasyLM.skipped_inputs import SkippedInputs
from EasyLM.storage import json_digest, split_paths
from tokenizer.media import folders, images

MAX_CACHE_BYTES = 2 * 2**30  # decoded images are kept if all of them fit: decoding small ones is slower than a step


class ImageRows:
    """A row source (see `EasyLM.training`): a row is an image, and each epoch has a new order.

    The image that follows an unreadable one in the list of files takes its place, in every epoch and every process.

    Attributes:
      fingerprint: names and sizes of the files, their order, and the seed. Modification times are excluded, so a run
        resumes on a copy of the folders.

    Raises:
      UserError: if there are no folders or images. The constructor and `rows` raise it, naming the path, if more than
        `max_errors` files are unusable.
    """

    def __init__(self, directories: str, flag: str, size: int, seed: int, max_errors: int = 0):
        """Lists the images.

        Args:
          directories: comma list of folders; subfolders are included.
          flag: the name of the flag, for errors.
          size: side of an image in pixels.
          seed: of the order.
          max_errors: number of unusable files to report and skip.
        """
        names = split_paths(directories)
        if not names:
            raise UserError(f"--{flag} is missing: a comma list of folders of images")
        self._skipped, self._lock = SkippedInputs(max_errors), threading.Lock()
        files = {
            name: sorted((entry.name, entry.size) for entry in folders.walk(name, flag, report=self._skipped.add))
            for name in names
        }
        self._paths = [os.path.join(name, file) for name in names for file, _ in files[name]]
        if not self._paths:
            raise UserError(f"--{flag}={directories}: has no usable image")
        self._size, self._seed = size, seed
        self._cache: dict[int, np.ndarray] | None = None
        if len(self._paths) * size**2 * 3 * np.dtype(np.float32).itemsize <= MAX_CACHE_BYTES:
            self._cache = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(available_cores())
        self.fingerprint = {
            "seed": seed,
            "images": len(self._paths),
            "directories": names,
            "names_and_sizes": json_digest(files),
        }

    def rows(self, start: int, count: int) -> dict[str, np.ndarray]:
        """Returns rows start..start+count-1 as {"pixels": [count,H,W,3]} float32 in [0, 1]."""
        total = len(self._paths)
        order = [shuffled_number(row, total, self._seed) for row in range(start, start + count)]
        return {"pixels": np.stack(list(self._pool.map(self._load, order)))}

    def _load(self, index: int) -> np.ndarray:
        """Returns an image, or the next readable one, as float32 [S,S,3] in [0, 1]."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        for offset in range(len(self._paths)):
            path = self._paths[(index + offset) % len(self._paths)]
            if path in self._skipped.reasons:
                continue
            try:
                pixels = images.load(path, self._size)
            except UserError as error:
                with self._lock:  # several threads load images
                    self._skipped.add(path, str(error))
                continue
            if self._cache is not None:
                self._cache[index] = pixels
            return pixels
        raise UserError(f"{self._paths[0]}: neither this image nor any other one can be read")

    def metrics(self, rows_consumed: int) -> dict[str, float]:
        """Returns the number of epochs."""
        return {"dataset_epoch": rows_consumed / len(self._paths)}
