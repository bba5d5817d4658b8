"""The settings of a run's checkpoints, and the part of a train state that they hold."""

import dataclasses
from typing import Any

import jax
import numpy as np

from EasyLM.checkpoints import stacking
from EasyLM.checkpoints.stacking import Key
from EasyLM.errors import UserError, choose
from EasyLM.flags import DTYPE_ALIASES, Flag
from EasyLM.storage import is_remote

# Flag value -> type of saved parameters, for `--checkpointer.float_dtype` and `--float_dtype`.
FLOAT_DTYPES = {
    name: np.dtype(dtype)
    for dtype, names in {
        "float32": ("fp32", "float32"),
        "bfloat16": ("bf16", "bfloat16"),
        "float16": ("fp16", "float16"),
    }.items()
    for name in names
}

# Assumed rates of an estimate: of the copy of a process to host memory, and of the writes of all processes together.
HOST_GB_PER_SECOND, DISK_GB_PER_SECOND = 5.0, 1.0

CHECKPOINTER_FLAGS = {
    "float_dtype": Flag(
        "",
        "Type of the saved parameters (the optimizer's state keeps its types). Empty: in a train state unchanged, for "
        "an exact resume; bf16 for parameters alone.",
        choices=("", *FLOAT_DTYPES),
        aliases=DTYPE_ALIASES,
    ),
    "save_optimizer_state": Flag(False, "Save the whole train state, for resuming; else the parameters alone."),
    "format": Flag(
        "auto",
        "streaming: one file, as the LVM release. orbax: a directory that each process writes its shards into, on a "
        "shared disk or gs://. auto: orbax on gs://, else streaming.",
        choices=("auto", "streaming", "orbax"),
    ),
    "keep_latest": Flag(
        1,
        "How many of the latest checkpoints are kept; milestones among them count. Older milestones are kept as well.",
        least=1,
    ),
    "keep_every": Flag(
        0, "Checkpoints whose step is a multiple of this become milestones, which are all kept; 0: none.", least=0
    ),
}


@dataclasses.dataclass(frozen=True)
class SavedPart:
    """Which part of a train state a checkpoint holds, and in which types.

    Attributes:
      float_dtype, save_optimizer_state: see CHECKPOINTER_FLAGS.
    """

    float_dtype: str = ""
    save_optimizer_state: bool = False

    def __post_init__(self) -> None:
        choose("float_dtype", self.float_dtype, ("", *FLOAT_DTYPES))

    def of(self, state: Any) -> Any:
        """Returns the part of a train state: all of it, or the parameters."""
        return state if self.save_optimizer_state else state.params.get("params", state.params)

    def dtype_of(self, key: Key, array: Any) -> np.dtype:
        """Returns the type in which an array of the part, or a `jax.ShapeDtypeStruct`, is saved."""
        is_parameter = not self.save_optimizer_state or key[0] == "params"
        name = self.float_dtype or ("" if self.save_optimizer_state else "bf16")
        converted = name and is_parameter and jax.numpy.issubdtype(array.dtype, jax.numpy.floating)
        return FLOAT_DTYPES[name] if converted else np.dtype(array.dtype)

    def sizes(self, state: Any) -> tuple[int, int]:
        """Returns the bytes of the arrays in the file, and of their copies in host memory, over all processes."""
        arrays = [(stacked.key, stacked.array) for stacked in stacking.stacked_arrays(self.of(state))]
        file = sum(array.size * self.dtype_of(key, array).itemsize for key, array in arrays)
        return file, sum(array.size * array.dtype.itemsize for _, array in arrays)


def save_seconds(
    file_bytes: int,
    host_bytes: int,
    host_gb_per_second: float = HOST_GB_PER_SECOND,
    disk_gb_per_second: float = DISK_GB_PER_SECOND,
) -> float:
    """Estimates the seconds until a checkpoint is on disk. Training waits for the first part, the copy.

    Args:
      file_bytes: of the checkpoint.
      host_bytes: that a process copies to host memory.
      host_gb_per_second, disk_gb_per_second: of the copy of a process, and of the writes of all; 1 GB is 1e9 bytes.
    """
    return host_bytes / (host_gb_per_second * 1e9) + file_bytes / (disk_gb_per_second * 1e9)


def uses_orbax(checkpoint_format: str, run_dir: str) -> bool:
    """Returns whether a run saves with Orbax.

    Args:
      checkpoint_format: see CHECKPOINTER_FLAGS.

    Raises:
      UserError: if the format is unknown, or Orbax cannot write to the directory.
    """
    choose("format", checkpoint_format, CHECKPOINTER_FLAGS["format"].choices or ())
    on_gcs = run_dir.startswith("gs://")
    if checkpoint_format == "orbax" and is_remote(run_dir) and not on_gcs:
        raise UserError(f"Orbax cannot write to {run_dir}: it writes to local paths and gs:// only; choose streaming")
    return checkpoint_format == "orbax" or (checkpoint_format == "auto" and on_gcs)
