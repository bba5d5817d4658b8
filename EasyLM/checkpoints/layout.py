"""The names of files in a run directory."""

import os
import re

from EasyLM.storage import is_remote, path_exists

CHECKPOINTS, LATEST, TEMPORARY = "checkpoints", "latest", ".tmp-"
DATASET, METADATA, CHECKSUMS = "dataset.json", "metadata.json", "checksums.json"
WRITING = "writing.json"  # on an object store: marks a step directory until the save is complete
# Name of a state -> its checkpoint prefix. The states of Orbax are directories.
PREFIX_OF = {
    "streaming_train_state": "trainstate",
    "streaming_params": "params",
    "orbax_train_state": "trainstate",
    "orbax_params": "orbax",
}
ORBAX_STATES = ("orbax_train_state", "orbax_params")
LINKS = (*PREFIX_OF, CHECKSUMS, DATASET, METADATA)  # the links to the files of the newest checkpoint
SAVE = "save"  # section of the metadata: the run directory, the number of the save, and whether it is a milestone
# A directory of one checkpoint. A save writes `step_`; `kept_` holds files that lay where a save puts its links.
# Its groups: the kind, the step, and for a step that the run has saved before a number, which grows.
STEP_DIRECTORY = re.compile(r"(step|kept)_(\d{8,})(?:_(\d+))?")
# The name of a milestone's state, beside the newest state. Its groups: the name of the state, and the step.
MILESTONE = re.compile(rf"({'|'.join(PREFIX_OF)})_(\d+)")


def resolved(path: str) -> str:
    """Returns the path of one save, to which a link of a run directory leads now: a running job may change its links.

    Remote paths are returned as they are, and so are files in the cache of the Hugging Face Hub: they are links that do
    not change, to files of other names, which have nothing beside them.
    """
    if is_remote(path):
        return path
    target = os.path.realpath(path)
    return os.path.abspath(path) if os.path.basename(os.path.dirname(target)) == "blobs" else target


def sidecar_path(checkpoint_path: str, name: str) -> str | None:
    """Returns the path of the `metadata`, `dataset` or `checksums` file of a checkpoint, or None.

    It lies beside the state, or in the directory that the checkpoint is. It is JSON or a pickle of the LVM release.
    """
    if is_remote(checkpoint_path):
        checkpoint_path = checkpoint_path.rstrip("/")
        directory, base = checkpoint_path.rsplit("/", 1)
    else:
        checkpoint_path = resolved(checkpoint_path)
        directory, base = os.path.split(checkpoint_path)
    milestone = MILESTONE.fullmatch(base)  # LVM release: metadata_20.pkl
    suffix = f"_{milestone[2]}" if milestone else ""
    stems = (f"{checkpoint_path}/{name}", f"{directory}/{name}{suffix}")
    candidates = [f"{stem}{ending}" for stem in stems for ending in (".json", ".pkl")]
    return next((path for path in candidates if path_exists(path)), None)
