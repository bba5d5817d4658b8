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
from EasyLM.storage import is_remote, path_exists
from EasyLM.training.abstract_step import abstract_state
from EasyLM.training.step import Optimizer, Params, TrainState, init_state, state_from_params
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
      run_dir: the run directory.
      formats: the valid prefixes of checkpoints.
    """

    files: StartFiles
    entries: list[Entry]
    dataset_state: Mapping[str, Any] | None
    metadata: Mapping[str, Any]
    run_dir: str
    formats: CheckpointFormats = dataclasses.field(default_factory=lambda: checkpoints.CHECKPOINT_FORMATS)

    @property
    def origin(self) -> str:
        """The `--load_checkpoint` that the run started from, PREFIX::PATH; empty: fresh parameters."""
        return self.files.history[0]

    @property
    def is_new(self) -> bool:
        """Whether the run starts now, from `origin`, rather than from a checkpoint of its own."""
        return self.files.history == (self.files.checkpoint,)

    @property
    def step(self) -> int:
        """Micro-steps done, according to the metadata."""
        return int(self.metadata.get("step", 0))

    @property
    def updates(self) -> int:
        """Updates done. Older metadata has no count of them, only the setting of accumulation."""
        accumulation = self.metadata.get("flags", {}).get("optimizer", {}).get("accumulate_gradient_steps", 1)
        return int(self.metadata.get("updates", self.step // max(1, accumulation)))


def find_start(given: StartFiles, run_dir: str, formats: CheckpointFormats) -> StartPoint:
    """Locates and opens the files from which a run starts. Reads each file once.

    If the run directory has a checkpoint, the run resumes from the newest whole one. `--load_checkpoint` starts a new
    run, or returns a run to one of its own milestones. After the next save the flag is part of the run's history and is
    ignored, so a requeued job can repeat its command.

    Args:
      given: values of `--load_checkpoint`, `--load_dataset_state` and `--load_metadata`.
      formats: the valid prefixes of `--load_checkpoint`.

    Raises:
      UserError: if a file is missing or damaged; if the run directory holds another run, checkpoints of which none is
        whole, or a foreign file that a save would have to replace.
    """
    for name, path in (("load_metadata", given.metadata), ("load_dataset_state", given.dataset_state)):
        if path and not is_remote(path) and not os.path.isfile(path):
            raise UserError(f"--{name}={path}: no such file")
    if not is_remote(run_dir):
        checkpoints.check_replaceable(run_dir)
    newest, problems = checkpoints.newest_whole(run_dir, formats)
    history = _history(newest.saved.contents) if newest else ()
    if newest and given.checkpoint in ("", *history):
        for problem in problems:
            logging.warning("%s: a newer checkpoint cannot be used: %s", run_dir, problem)
        saved = newest.saved
        logging.info("%s: resuming after step %s, from %s", run_dir, saved.step, saved.name)
        files = StartFiles(saved.spec, saved.dataset_state, saved.metadata, history)
        return StartPoint(files, newest.entries, newest.dataset_state, saved.contents, run_dir, formats)
    if newest or problems:
        files = _within_run(given, run_dir, formats, history, problems)
    else:
        files = dataclasses.replace(given, history=(given.checkpoint,))
        left = ", only an interrupted save" if checkpoints.has_interrupted_save(run_dir) else ""
        has_run = path_exists(os.path.join(run_dir, "metrics.jsonl"))
        level, left = (logging.WARNING, f"{left}, although it has metrics") if has_run else (logging.INFO, left)
        logging.log(level, "%s: holds no checkpoint%s; starting from %s", run_dir, left, given.checkpoint or "step 0")
    return _open_files(files, run_dir, formats)


def _history(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns every `--load_checkpoint` from which the run of a checkpoint has started."""
    flags = metadata.get("flags", {})
    return tuple(metadata.get("started_from", [flags.get("load_checkpoint", "")]))


def _within_run(
    given: StartFiles, run_dir: str, formats: CheckpointFormats, history: tuple[str, ...], problems: list[str]
) -> StartFiles:
    """Returns the files of a milestone, in a directory that already holds a run.

    Raises:
      UserError: if `--load_checkpoint` names no checkpoint in the run directory with its metadata and data position.
    """
    path = given.checkpoint.partition("::")[2]
    if not os.path.realpath(path).startswith(os.path.realpath(run_dir) + os.sep):
        if not history:
            raise UserError(
                f"{run_dir}: none of its checkpoints can be used: {'; '.join(problems)}; repair them or move them "
                "away, name one with --load_checkpoint, or give another --logger.experiment_id"
            )
        raise UserError(
            f"--load_checkpoint={given.checkpoint}: {run_dir} already holds a run that started from {history[0]!r}; "
            "give another --logger.experiment_id, or resume that run without --load_checkpoint"
        )
    checkpoints.parse_spec(given.checkpoint, formats, f"--load_checkpoint={given.checkpoint}")
    sidecars = {
        "dataset": given.dataset_state or checkpoints.sidecar_path(path, "dataset"),
        "metadata": given.metadata or checkpoints.sidecar_path(path, "metadata"),
    }
    for name, flag in (("dataset", "load_dataset_state"), ("metadata", "load_metadata")):
        if not sidecars[name]:
            raise UserError(f"--load_checkpoint={given.checkpoint}: no {name}.json beside it; name one with --{flag}")
    return StartFiles(
        given.checkpoint, sidecars["dataset"] or "", sidecars["metadata"] or "", (*history, given.checkpoint)
    )


def _open_files(files: StartFiles, run_dir: str, formats: CheckpointFormats) -> StartPoint:
    entries = checkpoints.open_checkpoint(files.checkpoint, formats) if files.checkpoint else []
    metadata = checkpoints.load_metadata(files.metadata) if files.metadata else {}
    dataset_state = checkpoints.load_dataset_state(files.dataset_state) if files.dataset_state else None
    return StartPoint(files, entries, dataset_state, metadata, run_dir, formats)


def check_settings(start: StartPoint, settings: ModelSettings, optimizer: Mapping[str, Any]) -> None:
    """Compares the settings of the model and the type of the optimizer with those of the checkpoint.

    A run that starts from parameters without metadata may change settings; a warning lists the changes.

    Args:
      optimizer: values of the optimizer's flags; empty for programs with one optimizer.

    Raises:
      UserError: if the metadata has other settings, or the parameters or the optimizer's state need other ones.
    """
    _check_optimizer(start, optimizer)
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


def _check_optimizer(start: StartPoint, optimizer: Mapping[str, Any]) -> None:
    given, saved = optimizer.get("type"), start.metadata.get("flags", {}).get("optimizer", {}).get("type")
    spec = start.files.checkpoint
    if spec.startswith("trainstate::") and given and saved and given != saved:
        raise UserError(
            f"--optimizer.type={given}: {spec} has the state of {saved}; to start a new run from its parameters, give "
            f"--load_checkpoint={spec.replace('::', '_params::', 1)} and another --logger.experiment_id"
        )


def first_state(start: StartPoint, model: Model, optimizer: Optimizer, mesh: Mesh, seed: int) -> TrainState:
    """Returns the first train state of a run, on the mesh.

    Raises:
      UserError: if the checkpoint holds other arrays than the model and its optimizer.
    """
    target = abstract_state(model, optimizer, mesh)
    if model.frozen is None:
        return _trained_state(start, model, optimizer, seed, target)
    frozen = _frozen_parameters(start, target.extra)
    state = _trained_state(start, model, optimizer, seed, dataclasses.replace(target, extra={}))
    return dataclasses.replace(state, extra=frozen)


def _frozen_parameters(start: StartPoint, target: Params) -> Params:
    """Returns the parameters that no step changes, from the checkpoint that the run started from."""
    entries = start.entries if start.is_new else checkpoints.open_checkpoint(start.origin, start.formats)
    logging.info("loading the frozen parameters from %s", start.origin)
    frozen = checkpoints.load_entries(start.origin, entries, target)
    entries.clear()
    return frozen


def _trained_state(start: StartPoint, model: Model, optimizer: Optimizer, seed: int, target: TrainState) -> TrainState:
    """Returns the first train state, without frozen parameters."""
    placement = jax.tree.map(lambda array: array.sharding, target)
    spec = start.files.checkpoint
    if not spec or (model.frozen is not None and start.is_new):
        return init_state(model.init, optimizer, seed, placement)
    logging.info("starting from %s", spec)
    is_train_state = spec.startswith("trainstate::")
    assert is_train_state or not jax.tree.leaves(target.extra), "only trainstate:: checkpoints hold extra state"
    loaded = read_arrays(start, target if is_train_state else target.params)
    start.entries.clear()
    if is_train_state:
        return loaded
    if start.step:
        logging.warning("the optimizer's moments start from zero at step %d; its schedule continues", start.step)
    return state_from_params(loaded, optimizer, start.step, start.updates, placement)


def read_arrays(start: StartPoint, target: Any = None) -> Any:
    """Loads the arrays of the checkpoint from which a run starts; see `checkpoints.load`.

    Raises:
      UserError: as `checkpoints.load`. If an array is damaged, the message names the run's other checkpoints.
    """
    try:
        return checkpoints.load_entries(start.files.checkpoint, start.entries, target)
    except checkpoints.DamagedArrayError as error:
        others = [saved for saved in checkpoints.list_checkpoints(start.run_dir) if not saved.problem]
        specs = [f"{saved.spec} (step {saved.step})" for saved in others if saved.spec != start.files.checkpoint]
        advice = f"; to go back to another checkpoint, give it as --load_checkpoint: {', '.join(specs)}"
        raise UserError(f"{error}{advice if specs else ''}") from None
