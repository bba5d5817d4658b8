"""The file in which a checkpoint records its model: the metadata beside it, or the `config.json` of its directory."""

import os

from EasyLM.checkpoints import load_metadata, sidecar_path
from EasyLM.data.tokenizer_names import tokenizer_of


def record_path(prefix: str, path: str) -> str | None:
    """Returns the path of the record of the checkpoint `prefix::path`, which is local or remote, or None."""
    if prefix == "huggingface":
        config_file = os.path.join(path, "config.json")
        return config_file if os.path.exists(config_file) else None
    return sidecar_path(path, "metadata")


def recorded_tokenizer(prefix: str, path: str) -> str | None:
    """Returns the name of the image tokenizer that a checkpoint `prefix::path` was trained with; None: not recorded."""
    source = record_path(prefix, path)
    return None if source is None else tokenizer_of(load_metadata(source))
