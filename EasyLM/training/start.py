"""Where a run starts: from fresh parameters, from its own latest checkpoint, or from `--load_checkpoint`."""

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from EasyLM import checkpoints
from EasyLM.checkpoints import Entry
from EasyLM.errors import UserError
from EasyLM.parallel import shardings
from EasyLM.storage import is_remote
from EasyLM.training.step import Optimizer, TrainState, init_state, state_from_params, state_shapes
from EasyLM.training.task import Model, ModelSettings

CheckpointFormats = Mapping[str, Callable[[str], list[Entry]]]  # PREFIX -> reader of the entries of a file


@dataclasses.dataclass(frozen=True)
class StartFiles:
    """The files from which a run starts; an empty path means none.

    Attributes:
      checkpoint: PREFIX::PATH.
      history: every `--load_checkpoint` that this run has started from, the oldest first.
    """

    checkpoint: str = ""
    dataset_state: str = ""
    metadata: str = ""
    history: tuple[str, ...] = ("",)


@dataclasses.dataclass(frozen=True)
class StartPoint:
    """The files from which a run starts, and their contents; no array has been read yet.

    Attributes:
      entries: the arrays of the checkpoint; `first_state` clears the list.
      dataset_state: the data state; None: the run starts with the first row.
      metadata: the metadata of the checkpoint; empty if there is none.
    """

    files: StartFiles
    entries: list[Entry]
    dataset_state: Mapping[str, Any] | None
    metadata: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Micro-steps done, according to the metadata."""
        return int(self.metadata.get("step", 0))


def find_start(given: StartFiles, run_dir: str, formats: CheckpointFormats) -> StartPoint:
    """Locates and opens the files from which a run starts. Reads each file once.

    Args:
      given: values of `--load_checkpoint`, `--load_dataset_state` and `--load_metadata`.
      formats: the valid prefixes of `--load_checkpoint`.

    Raises:
      UserError: if a file is missing or damaged, or the run directory holds another run.
    """
    for name, path in (("load_metadata", given.metadata), ("load_dataset_state", given.dataset_state)):
        if path and not is_remote(path) and not os.path.isfile(path):
            raise UserError(f"--{name}={path}: no such file")
    files, metadata = locate_start(given, run_dir)
    entries = checkpoints.open_checkpoint(files.checkpoint, formats) if files.checkpoint else []
    if metadata is None:
        metadata = checkpoints.load_metadata(files.metadata) if files.metadata else {}
    dataset_state = checkpoints.load_dataset_state(files.dataset_state) if files.dataset_state else None
    return StartPoint(files, entries, dataset_state, metadata)


def locate_start(given: StartFiles, run_dir: str) -> tuple[StartFiles, Mapping[str, Any] | None]:
    """Locates the files from which a run starts.

    If the run directory has a checkpoint, the run resumes from the latest one. `--load_checkpoint` starts a new run, or
    returns a run to one of its own milestones. After the next save the flag is part of the run's history and is
    ignored, so a requeued job can repeat its command.

    Returns:
      The files, and the metadata if it was read: that of the run's latest checkpoint.

    Raises:
      UserError: if the run directory holds a run that started from another checkpoint.
    """
    latest = checkpoints.latest_checkpoint(run_dir)
    if latest is None:
        return dataclasses.replace(given, history=(given.checkpoint,)), None
    metadata = checkpoints.load_metadata(latest.metadata)
    history = tuple(metadata.get("started_from", [metadata["flags"]["load_checkpoint"]]))
    if given.checkpoint in ("", *history):
        return StartFiles(latest.spec, latest.dataset_state, latest.metadata, history), metadata
    path = given.checkpoint.partition("::")[2]
    if not os.path.realpath(path).startswith(os.path.realpath(run_dir) + os.sep):
        raise UserError(
            f"--load_checkpoint={given.checkpoint}: {run_dir} already holds a run that started from {history[0]!r}; "
            "give another --logger.experiment_id, or resume that run without --load_checkpoint"
        )
    files = StartFiles(
        given.checkpoint,
        given.dataset_state or checkpoints.sidecar_path(path, "dataset") or "",
        given.metadata or checkpoints.sidecar_path(path, "metadata") or "",
        (*history, given.checkpoint),
    )
    return files, None


def check_settings(start: StartPoint, settings: ModelSettings) -> None:
    """Compares the model's settings with those of the checkpoint.

    A run that starts from parameters without metadata may change settings; a warning lists the changes.

    Raises:
      UserError: if the metadata has other settings, or the parameters need other ones.
    """
    differences = settings.differences(start.metadata.get(settings.name, {}))
    if differences:
        raise UserError(f"{start.files.metadata}: the checkpoint's model has other settings: {differences}")
    if start.files.checkpoint and not start.files.metadata:
        saved = settings.saved(start.files.checkpoint)
        if differences := settings.differences(saved, among=settings.fixed):
            raise UserError(
                f"--load_checkpoint={start.files.checkpoint}: its parameters need other model settings: {differences}"
            )
        if differences := settings.differences(saved):
            logging.warning("%s was trained with other settings: %s", start.files.checkpoint, differences)


def first_state(
    start: StartPoint, model: Model, optimizer: Optimizer, mesh: Mesh, seed: int
) -> tuple[TrainState, TrainState]:
    """Returns the first train state of a run, on the mesh, and its shardings.

    Raises:
      UserError: if the checkpoint holds other arrays than the model and its optimizer.
    """
    shapes = state_shapes(model.init, optimizer)
    placement = shardings(mesh, model.partition_rules, shapes)
    spec = start.files.checkpoint
    if not spec:
        return init_state(model.init, optimizer, seed, placement), placement
    logging.info("starting from %s", spec)
    target = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, placement
    )
    is_train_state = spec.startswith("trainstate::")
    assert is_train_state or not jax.tree.leaves(target.extra), "only trainstate:: checkpoints hold extra state"
    loaded = checkpoints.load_entries(spec, start.entries, target if is_train_state else target.params)
    start.entries.clear()  # frees memory: entries of orbax:: hold their arrays
    if is_train_state:
        return loaded, placement
    if start.step:
        logging.warning("the optimizer's moments start from zero at step %d; its schedule continues", start.step)
    return state_from_params(loaded, optimizer, start.step, placement), placement
