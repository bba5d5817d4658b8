"""Checkpoints: formats, loading, background saving, run directories and the metadata beside them.

May import `EasyLM.storage`. A checkpoint is named `PREFIX::PATH` (`trainstate::RUN/streaming_train_state`).

Vocabulary:
  entry: one array of a checkpoint file, with its key; read on demand.
  key: the path of an array, a tuple of names (`("params", "transformer", "h", "3", ...)`).
  stacked: with all layers along a leading axis, as arrays are in memory; files have one entry per layer.
  state: `step`, `params` and `opt_state`; a train state is a file of all three.
  sidecar: `metadata.json` or `dataset.json` beside the file of a state.
  milestone: a checkpoint that is never pruned.

Modules:
  entries: an array that is not read yet.
  msgpack_arrays, streaming: the byte formats, of one array and of a file.
  stacking: layers in memory and in files.
  formats: the prefixes and their readers.
  loading: from a checkpoint into shapes, types and shardings.
  saving: the background writer of a run.
  run_directory: atomic saves, links, milestones, pruning.
  metadata: sidecars.
  restricted_pickle: settings in pickles of the LVM release.
"""

from EasyLM.checkpoints.entries import Entry
from EasyLM.checkpoints.formats import CHECKPOINT_FORMATS, open_checkpoint, parse_spec
from EasyLM.checkpoints.loading import check_entries, load, load_entries
from EasyLM.checkpoints.metadata import load_dataset_state, load_metadata, make_metadata
from EasyLM.checkpoints.run_directory import SavedCheckpoint, latest_checkpoint, sidecar_path
from EasyLM.checkpoints.saving import CHECKPOINTER_FLAGS, FLOAT_DTYPES, Checkpointer

__all__ = [
    "CHECKPOINTER_FLAGS",
    "CHECKPOINT_FORMATS",
    "FLOAT_DTYPES",
    "Checkpointer",
    "Entry",
    "SavedCheckpoint",
    "check_entries",
    "latest_checkpoint",
    "load",
    "load_dataset_state",
    "load_entries",
    "load_metadata",
    "make_metadata",
    "open_checkpoint",
    "parse_spec",
    "sidecar_path",
]
