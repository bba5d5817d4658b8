"""Folders of open-muse's VQGANModel, of the LVM release, and of this project: config.json and weights."""

import pathlib

from EasyLM.errors import UserError
from EasyLM.storage import read_json
from tokenizer.formats.architecture import Translated, at_resolution
from tokenizer.formats.tensor_files import read_shards


def find(path: pathlib.Path) -> list[pathlib.Path] | None:
    """Returns config.json and the weight files of a folder, or None if it has no config.json.

    Raises:
      UserError: naming the folder, if it has no weights.
    """
    if not (path / "config.json").is_file():
        return None
    weights = sorted(path.glob("*.safetensors")) or [path / "pytorch_model.bin"]
    if not weights[0].is_file():
        raise UserError(f"{path}: no weights: pytorch_model.bin or *.safetensors")
    return [path / "config.json", *weights]


def read(files: list[pathlib.Path], resolution: int) -> Translated:
    """Reads the files of `find`. Several weight files are the shards of one model.

    Raises:
      UserError: naming the file, if it cannot be read, or describes a model of transformers, such as an exported LLaMA.
    """
    config, *weights = files
    settings = read_json(config)
    if "model_type" in settings:  # a key of transformers
        raise UserError(f"{config}: a model of transformers ({settings['model_type']}), not a tokenizer")
    source = str(weights[0]) if weights[0].suffix == ".bin" else f"{weights[0].parent}/*.safetensors"
    return Translated(
        at_resolution(settings, resolution) if resolution else settings, read_shards(weights), source, str(config)
    )
