"""Finds out which project wrote a tokenizer, and reads it."""

import os
import pathlib

from EasyLM.errors import UserError
from EasyLM.storage import path_on_disk
from tokenizer.formats import diffusers, llamagen, open_muse, taming
from tokenizer.formats.architecture import Translated

# Each has `find`, which returns the files of a tokenizer or None, and `read`, which translates them. The first one that
# finds files reads them.
_FORMATS = (diffusers, open_muse, taming, llamagen)


def tokenizer_files(path: str | os.PathLike) -> list[pathlib.Path]:
    """Returns the files that make up the tokenizer at `path`: a folder, or a file of LlamaGen or taming-transformers.

    A path that does not exist can be a name on the Hugging Face Hub (`EasyLM.storage.path_on_disk`).

    Raises:
      UserError: naming the path, if it does not exist or holds no tokenizer, or a file that is missing.
    """
    return _find(path)[1]


def read(path: str | os.PathLike, resolution: int = 0) -> Translated:
    """Reads the tokenizer at `path` (see `tokenizer_files`) and translates it to the format of this project.

    Args:
      resolution: side of an image in pixels; 0: as the files say, or 256.

    Raises:
      UserError: naming the file, if it is broken or its model is not supported.
    """
    module, files = _find(path)
    return module.read(files, resolution)


def _find(name: str | os.PathLike):
    path = pathlib.Path(path_on_disk(os.fspath(name), "a tokenizer"))
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    for module in _FORMATS:
        if files := module.find(path):
            return module, files
    raise UserError(
        f"{path}: no tokenizer: a folder has config.json and weights, model.yaml and a *.ckpt file, or a *.pt file"
    )
