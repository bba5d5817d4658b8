"""Writes a checkpoint in another format or type: a directory like that of a saved step."""

import collections
import dataclasses
import os
from collections.abc import Sequence

import jax
import numpy as np

from EasyLM.checkpoints import checksums, layout, stacking, streaming
from EasyLM.checkpoints.directories import orbax_record
from EasyLM.checkpoints.entries import Entry
from EasyLM.checkpoints.loading import load_entries
from EasyLM.checkpoints.metadata import load_dataset_state, load_metadata, with_digest
from EasyLM.checkpoints.orbax_directory import import_orbax
from EasyLM.checkpoints.orbax_save import names_write_errors, orbax_arguments
from EasyLM.checkpoints.stacking import Key
from EasyLM.storage import write_json


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The arrays of a checkpoint, and the type of its parameters after the conversion.

    Attributes:
      spec: PREFIX::PATH.
      dtype: of parameters; the optimizer's state and integers keep their types. None: parameters keep theirs too.
    """

    spec: str
    entries: Sequence[Entry]
    dtype: np.dtype | None

    @property
    def is_train_state(self) -> bool:
        """Whether the checkpoint has the state of the optimizer, not only parameters."""
        return any(entry.key[0] == "opt_state" for entry in self.entries)

    def dtype_of(self, key: Key, array: Entry | jax.ShapeDtypeStruct | np.ndarray) -> np.dtype:
        """Returns the type of an array after the conversion."""
        converted = self.dtype is not None and key[0] == "params"
        is_float = jax.numpy.issubdtype(array.dtype, jax.numpy.floating)
        return self.dtype if self.dtype is not None and converted and is_float else np.dtype(array.dtype)

    def write_streaming(self, directory: str) -> str:
        """Writes a streaming file and its checksums. Holds one array in memory at a time. Returns the file's name."""
        name = "streaming_train_state" if self.is_train_state else "streaming_params"
        table = {}
        with open(os.path.join(directory, name), "wb") as file:
            for entry in self.entries:
                array = entry.read().astype(self.dtype_of(entry.key, entry), copy=False)
                key = entry.key if self.is_train_state else entry.key[1:]  # as the LVM release writes parameters
                table[key] = checksums.array_checksum(key, array)
                streaming.write_entry(file, key, array)
            write_json(os.path.join(directory, layout.CHECKSUMS), checksums.make_table(name, file.tell(), table))
        return name

    def write_orbax(self, directory: str) -> str:
        """Writes a directory of Orbax. Holds all arrays in memory. Returns the directory's name.

        Raises:
          UnavailableError: if Orbax cannot write it.
        """
        name = layout.ORBAX_STATES[0 if self.is_train_state else 1]
        target = stacking.shapes_in_memory(self.entries, collections.OrderedDict)
        tree = load_entries(self.spec, self.entries, target)
        with names_write_errors(), import_orbax().PyTreeCheckpointer() as checkpointer:
            checkpointer.save(os.path.join(os.path.abspath(directory), name), args=orbax_arguments(tree, self.dtype_of))
        return name

    def write_sidecars(self, directory: str) -> None:
        """Writes the metadata and the data state of the checkpoint, as far as it has them."""
        path = self.spec.partition("::")[2]
        for name, load in ((layout.METADATA, load_metadata), (layout.DATASET, load_dataset_state)):
            source = layout.sidecar_path(path, os.path.splitext(name)[0])
            content = load(source) if source else {}
            if name == layout.METADATA and content:
                # Without the number and directory of the original save. A run never deletes a converted checkpoint.
                content[layout.SAVE] = orbax_record(directory)
            if content:
                write_json(os.path.join(directory, name), with_digest(content))
