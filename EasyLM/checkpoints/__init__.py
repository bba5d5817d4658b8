"""Checkpoints: formats, loading, background saving, run directories and the metadata beside them.

May import `EasyLM.storage` and `EasyLM.parallel`. `PREFIX::PATH` names a checkpoint, for example
`trainstate::RUN/streaming_train_state`.

Vocabulary:
  entry: one array of a checkpoint file, with its key. It is read on demand.
  key: the path of an array, a tuple of names (`("params", "transformer", "h", "3", ...)`).
  stacked: with all layers along the leading axis. Arrays are stacked in memory; files have one entry per layer.
  state: `step`, `params` and `opt_state`. A train state is a checkpoint that holds all three.
  sidecar: `metadata.json` `dataset.json` or `checksums.json`, in the directory of a checkpoint file.
  milestone: a checkpoint that pruning keeps.

Modules:
  entries: arrays that have not been read yet.
  msgpack_arrays, streaming: the byte format of one array, and that of a whole file.
  safetensors_file: reads and writes safetensors files, with checksums.
  stacking: the layout of layers in memory and in files.
  checksums: a sidecar with a checksum of each array, verified when the array is read.
  formats: the prefixes and their readers; orbax_directory: the reader of Orbax checkpoints.
  identification: what a path holds and which prefixes load it, for errors.
  loading: loads a checkpoint into given shapes, types and shardings.
  shared_reads: each of several processes reads its share of the rows.
  row_split: the rows of an array, split over all devices, so that each process saves and loads its share.
  host_copy: a copy of a state, or of this process's share, in host memory.
  state_file: the layout of a state file, which several processes write together.
  saved_part: settings of a run's checkpoints; the part of a state that they hold.
  streaming_save, orbax_save: write the state of a save in one of the two formats.
  conversion: writes a checkpoint in another format or type.
  saving: saves the checkpoints of a run in the background.
  layout: the names of files in a run directory; directories: what lies in a directory.
  listing: every checkpoint in a run directory, in any form; the newest whole one.
  run_directory, remote_run_directory: atomic saves, links, milestones; saves: numbers and pruning.
  displaced: checkpoints that lie where a save makes its links.
  metadata: reads and creates the content of sidecars.
  restricted_pickle: reads settings from pickles of the LVM release.
"""

from EasyLM.checkpoints.checksums import DamagedArrayError
from EasyLM.checkpoints.conversion import Conversion
from EasyLM.checkpoints.displaced import check_replaceable
from EasyLM.checkpoints.entries import Entry
from EasyLM.checkpoints.formats import CHECKPOINT_FORMATS, open_checkpoint, parse_spec
from EasyLM.checkpoints.identification import prefix_hint
from EasyLM.checkpoints.layout import PREFIX_OF, sidecar_path
from EasyLM.checkpoints.listing import (
    OpenCheckpoint,
    SavedCheckpoint,
    has_interrupted_save,
    latest_checkpoint,
    list_checkpoints,
    newest_whole,
)
from EasyLM.checkpoints.loading import check_entries, load, load_entries
from EasyLM.checkpoints.metadata import load_dataset_state, load_metadata, make_metadata
from EasyLM.checkpoints.orbax_directory import is_orbax_state, read_orbax
from EasyLM.checkpoints.saved_part import (
    CHECKPOINTER_FLAGS,
    DISK_GB_PER_SECOND,
    FLOAT_DTYPES,
    HOST_GB_PER_SECOND,
    SavedPart,
    save_seconds,
    uses_orbax,
)
from EasyLM.checkpoints.saving import Checkpointer

__all__ = [
    "CHECKPOINTER_FLAGS",
    "CHECKPOINT_FORMATS",
    "DISK_GB_PER_SECOND",
    "FLOAT_DTYPES",
    "HOST_GB_PER_SECOND",
    "PREFIX_OF",
    "Checkpointer",
    "Conversion",
    "DamagedArrayError",
    "Entry",
    "OpenCheckpoint",
    "SavedCheckpoint",
    "SavedPart",
    "check_entries",
    "check_replaceable",
    "has_interrupted_save",
    "is_orbax_state",
    "latest_checkpoint",
    "list_checkpoints",
    "load",
    "load_dataset_state",
    "load_entries",
    "load_metadata",
    "make_metadata",
    "newest_whole",
    "open_checkpoint",
    "parse_spec",
    "prefix_hint",
    "read_orbax",
    "save_seconds",
    "sidecar_path",
    "uses_orbax",
]
