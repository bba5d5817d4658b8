"""Checkpoint formats. `PREFIX::PATH` names a checkpoint; the prefix selects the function that reads the file."""

import os
from collections.abc import Callable, Mapping

import numpy as np

from EasyLM.checkpoints import stacking, streaming
from EasyLM.checkpoints.entries import Entry
from EasyLM.errors import UserError, choose, prefix_errors
from EasyLM.storage import is_remote, remote_file_system

Reader = Callable[[str], list[Entry]]


def _train_state(path: str) -> list[Entry]:
    return streaming.read_streaming(path)


def _train_state_params(path: str) -> list[Entry]:
    entries = [entry.renamed(entry.key[1:]) for entry in streaming.read_streaming(path) if entry.key[0] == "params"]
    if not any(entry.key[0] == "params" for entry in entries):
        raise UserError(f"{path}: not a train state; load a file of parameters alone as params::{path}")
    return entries


def _params(path: str) -> list[Entry]:
    return _below_params(path, streaming.read_streaming(path))


def _flax_params(path: str) -> list[Entry]:
    return _below_params(path, streaming.read_flax(path))


def _below_params(path: str, entries: list[Entry]) -> list[Entry]:
    if any(entry.key[0] == "step" for entry in entries):
        raise UserError(f"{path}: a train state; load its parameters as trainstate_params::{path}")
    return [entry.renamed(("params", *entry.key)) for entry in entries]


def _orbax(path: str) -> list[Entry]:
    import orbax.checkpoint as ocp  # imported here because the import takes a second

    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(os.path.abspath(path))
    tree = tree["params"] if "opt_state" in tree else tree
    return [
        Entry(key, stacked.file_shape, np.dtype(stacked.array.dtype), _copier(stacked.array, layer))
        for key, stacked, layer in stacking.file_order(tree)
    ]


def _copier(array, layer: int | None) -> Callable[[np.ndarray], None]:
    return lambda out: np.copyto(out, array if layer is None else array[layer])


# Prefix -> reader, which returns entries of a train state or of parameters. Parameters have their train state keys.
CHECKPOINT_FORMATS: dict[str, Reader] = {
    "trainstate": _train_state,
    "trainstate_params": _train_state_params,
    "params": _params,
    "flax_params": _flax_params,
    "orbax": _orbax,
}
_DIRECTORY_FORMATS = ("orbax", "huggingface")


def open_checkpoint(spec: str, formats: Mapping[str, Reader] = CHECKPOINT_FORMATS) -> list[Entry]:
    """Returns the entries of the checkpoint `PREFIX::PATH` without reading their arrays.

    Raises:
      UserError: if the prefix is unknown, the path is missing or of the wrong kind, or the file is broken.
    """
    prefix, path = parse_spec(spec, formats, f"checkpoint {spec!r}")
    return formats[prefix](path)


def parse_spec(spec: str, formats: Mapping[str, Reader], name: str) -> tuple[str, str]:
    """Returns the prefix and the path of `PREFIX::PATH`.

    Args:
      name: the name of the spec in error messages.

    Raises:
      UserError: if the prefix is unknown, or the path is missing or of the wrong kind.
    """
    prefix, separator, path = spec.partition("::")
    if not separator:
        raise UserError(f"{name}: must be PREFIX::PATH, with one of the prefixes {', '.join(formats)}")
    choose(f"{name}: prefix", prefix, formats)
    if is_remote(path):
        with prefix_errors(name):
            remote_file_system(path)
    else:
        kind, is_kind = ("directory", os.path.isdir) if prefix in _DIRECTORY_FORMATS else ("file", os.path.isfile)
        if not os.path.exists(path):
            raise UserError(f"{name}: there is no {path}")
        if not is_kind(path):
            raise UserError(f"{name}: {path} is not a {kind}, as {prefix}:: needs")
    return prefix, path
