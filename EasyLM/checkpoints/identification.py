"""What a path holds, and the prefixes that load it. Errors of loading name them."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Collection, Iterable

from EasyLM.checkpoints import orbax_directory, streaming
from EasyLM.checkpoints.directories import list_directory
from EasyLM.checkpoints.entries import Entry
from EasyLM.checkpoints.layout import CHECKPOINTS, PREFIX_OF
from EasyLM.checkpoints.stacking import Key
from EasyLM.errors import UserError
from EasyLM.storage import is_remote, is_remote_folder, read_json

TRAIN_STATES = ("trainstate", "trainstate_params", "trainstate_ema")  # prefixes
_HUGGING_FACE_CONFIG, _HUGGING_FACE_WEIGHTS = "config.json", (".safetensors", ".bin", ".index.json")
_ORBAX_STEP = "_CHECKPOINT_METADATA"  # Orbax writes this file into the directory of a step, beside its items


@dataclasses.dataclass(frozen=True)
class Identified:
    """A checkpoint: its path, what it is, and the prefixes that load it."""

    path: str
    content: str
    prefixes: tuple[str, ...]


def prefix_hint(prefix: str, path: str, accepted: Collection[str]) -> str:
    """Returns the end of an error about `prefix::path`: which checkpoint is there, and how to load it.

    Args:
      accepted: the prefixes that the command takes.

    Returns:
      an empty text if the prefix is one for this path, or nothing is recognized.
    """
    path, found = path.rstrip("/"), None
    with contextlib.suppress(UserError, OSError):  # the error in hand matters more
        found = identify(path)
    if found is None or (found.path == path and prefix in found.prefixes):
        return ""
    relation = "is" if found.path == path else "holds" if found.path.startswith(f"{path}/") else "belongs to"
    chosen = [name for name in found.prefixes if name in accepted and name != "trainstate_ema"][:2]
    if prefix in found.prefixes:
        chosen = [prefix]
    specs = " or ".join(f"{name}::{found.path}" for name in chosen)
    return f"; it {relation} {found.content}" + (f": load it as {specs}" if specs else "")


def identify(path: str) -> Identified | None:
    """Returns the checkpoint at a local or remote path, or one in a directory of a run or of Orbax; None if unknown.

    Raises:
      UserError, OSError: if a file or directory cannot be read.
    """
    if not is_folder(path):
        return _identify_file(path)
    names = list_directory(path)
    if orbax_directory.is_orbax_state(path):
        if is_train_state(orbax_directory.saved_keys(path)):
            return Identified(path, "an Orbax train state", (*TRAIN_STATES, "orbax"))
        return Identified(path, "an Orbax directory of parameters", ("orbax",))
    if model := _identify_hugging_face(path, names):
        return model
    steps = sorted((order, name) for name in names if (order := orbax_directory.step_order(name)))
    inner = [name for name in (*PREFIX_OF, CHECKPOINTS) if name in names]
    inner += [name for _, name in reversed(steps)]  # the newest first
    if _ORBAX_STEP in names:
        items = [name for name in names if orbax_directory.is_orbax_state(f"{path}/{name}")]
        inner += filter(None, [orbax_directory.chosen_item(items)])
    return next((found for name in inner if (found := _identify_inner(f"{path}/{name}"))), None)


def is_folder(path: str) -> bool:
    """Whether a local or remote path is a directory. On the web all paths count as files.

    Raises:
      UnavailableError: if an object store cannot be reached.
    """
    if path.startswith(("http://", "https://")):  # the answer would need the content, which may be large
        return False
    return is_remote_folder(path) if is_remote(path) else os.path.isdir(path)


def _identify_inner(path: str) -> Identified | None:
    """Returns the checkpoint in a directory; None if it is damaged."""
    with contextlib.suppress(UserError, OSError):
        return identify(path)
    return None


def _identify_hugging_face(folder: str, names: Collection[str]) -> Identified | None:
    """Returns the model in a directory with files of these names. Those of image tokenizers have no `model_type`."""
    if _HUGGING_FACE_CONFIG not in names or not any(name.endswith(_HUGGING_FACE_WEIGHTS) for name in names):
        return None
    if "model_type" not in read_json(f"{folder}/{_HUGGING_FACE_CONFIG}"):
        return None
    if is_remote(folder):
        return Identified(folder, "a Hugging Face model, which is read from a local disk: copy it to one", ())
    return Identified(folder, "a Hugging Face model", ("huggingface",))


def _identify_file(path: str) -> Identified | None:
    if path.endswith((_HUGGING_FACE_CONFIG, *_HUGGING_FACE_WEIGHTS)):
        folder = os.path.dirname(path) or "."
        return _identify_hugging_face(folder, list_directory(folder))
    if keys := _keys(streaming.read_streaming, path):
        if is_train_state(keys):
            return Identified(path, "a train state", TRAIN_STATES)
        return Identified(path, "a file of parameters", ("params",))
    keys = _keys(streaming.read_flax, path)
    if keys and not is_train_state(keys):
        return Identified(path, "a flax msgpack file of parameters", ("flax_params",))
    return None


def _keys(read: Callable[[str], list[Entry]], path: str) -> list[Key]:
    """Returns the keys in a file, or none if it has another format."""
    with contextlib.suppress(UserError):
        return [entry.key for entry in read(path)]
    return []


def is_train_state(keys: Iterable[Key]) -> bool:
    """Whether a checkpoint with these keys is a train state, not parameters alone."""
    return any(key[0] == "step" for key in keys)
