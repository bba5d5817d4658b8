"""Checkpoint formats. `PREFIX::PATH` names a checkpoint; the prefix selects the function that reads the file."""

import os
from collections.abc import Callable, Mapping

from EasyLM.checkpoints import checksums, orbax_directory, streaming
from EasyLM.checkpoints.entries import Entry
from EasyLM.checkpoints.identification import TRAIN_STATES, is_folder, is_train_state, prefix_hint
from EasyLM.checkpoints.layout import resolved
from EasyLM.errors import UnavailableError, UserError, choose, prefix_errors
from EasyLM.storage import (
    file_version,
    is_hub_name,
    is_remote,
    local_path,
    names_store_errors,
    path_on_disk,
    remote_file_system,
)

Reader = Callable[[str], list[Entry]]
AVERAGE = "ema_params"  # in the keys of a train state: the moving average of the parameters is below this name


def _train_state(path: str) -> list[Entry]:
    entries = orbax_directory.read_orbax(path) if orbax_directory.is_orbax_state(path) else _streaming(path)
    if not is_train_state(entry.key for entry in entries):
        raise UserError(f"{path}: not a train state")
    return entries


def _streaming(path: str) -> list[Entry]:
    return _verified(path, streaming.read_streaming)


def _verified(path: str, read: Reader) -> list[Entry]:
    """Returns the entries of a file. Their reads verify the checksums, if there are any beside the file."""
    path = resolved(path)
    return checksums.verified(path, read(path), file_version(path)["size"])


def _train_state_params(path: str) -> list[Entry]:
    return [entry.renamed(entry.key[1:]) for entry in _train_state(path) if entry.key[0] == "params"]


def _train_state_average(path: str) -> list[Entry]:
    """Returns the moving average of the parameters, from the state of the optimizer."""
    entries = [entry for entry in _train_state(path) if AVERAGE in entry.key]
    if not entries:
        raise UserError(f"{path}: holds no average of the parameters; train with --optimizer.ema_decay")
    return [entry.renamed(entry.key[entry.key.index(AVERAGE) + 1 :]) for entry in entries]


def _params(path: str) -> list[Entry]:
    return _below_params(path, _streaming(path))


def _flax_params(path: str) -> list[Entry]:
    return _below_params(path, _verified(path, streaming.read_flax))


def _below_params(path: str, entries: list[Entry]) -> list[Entry]:
    if is_train_state(entry.key for entry in entries):
        raise UserError(f"{path}: not a file of parameters")
    return [entry.renamed(("params", *entry.key)) for entry in entries]


# Prefix -> reader, which returns entries of a train state or of parameters. Parameters have their train state keys.
CHECKPOINT_FORMATS: dict[str, Reader] = {
    "trainstate": _train_state,
    "trainstate_params": _train_state_params,
    "params": _params,
    "flax_params": _flax_params,
    "orbax": orbax_directory.read_orbax_params,
    "trainstate_ema": _train_state_average,
}
_DIRECTORY_FORMATS = ("orbax", "huggingface")


def open_checkpoint(spec: str, formats: Mapping[str, Reader] = CHECKPOINT_FORMATS) -> list[Entry]:
    """Returns the entries of the checkpoint `PREFIX::PATH` without reading their arrays.

    Raises:
      UserError: if the prefix is unknown, the path is missing or of the wrong kind, or the file is broken.
      OSError: if a disk fails.
      UnavailableError: if an object store cannot be reached.
    """
    prefix, path = parse_spec(spec, formats, f"checkpoint {spec!r}")
    try:
        with names_store_errors(path):
            return formats[prefix](path)
    except UnavailableError:
        raise
    except UserError as error:
        if hint := prefix_hint(prefix, path, formats):
            raise UserError(f"{error}{hint}") from error
        raise


def parse_spec(spec: str, formats: Mapping[str, Reader], name: str) -> tuple[str, str]:
    """Returns the prefix and the path of `PREFIX::PATH`. A path on the Hugging Face Hub is downloaded.

    Args:
      name: the name of the spec in error messages.

    Raises:
      UserError: if the prefix is unknown, or the path is missing or of the wrong kind.
    """
    prefix, separator, path = spec.partition("::")
    if not separator:
        hint = prefix_hint("", spec, formats)
        if not hint and "huggingface" in formats and is_hub_name(spec) and not os.path.exists(spec):
            hint = f"; a model on the Hugging Face Hub is huggingface::{spec}"
        raise UserError(f"{name}: must be PREFIX::PATH, with one of the prefixes {', '.join(formats)}{hint}")
    choose(f"{name}: prefix", prefix, formats)
    with prefix_errors(name):
        path = path_on_disk(path, "a Hugging Face model") if prefix == "huggingface" else local_path(path)
        if is_remote(path):
            remote_file_system(path)
    if not (is_remote(path) or os.path.exists(path)):
        raise UserError(f"{name}: there is no {path}")
    if not _is_of_kind(prefix, path):
        kind, hint = "directory" if prefix in _DIRECTORY_FORMATS else "file", prefix_hint(prefix, path, formats)
        raise UserError(f"{name}: {path} is not a {kind}, as {prefix}:: needs{hint}")
    return prefix, path


def _is_of_kind(prefix: str, path: str) -> bool:
    """Whether a path is the file or the directory that a prefix needs."""
    if prefix in _DIRECTORY_FORMATS:
        return is_remote(path) or os.path.isdir(path)
    if prefix in TRAIN_STATES and orbax_directory.is_orbax_state(path):
        return True
    return not is_folder(path) if is_remote(path) else os.path.isfile(path)
