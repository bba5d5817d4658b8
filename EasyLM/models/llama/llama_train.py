"""Trains a Large Vision Model: `python -m EasyLM.models.llama.llama_train --flag=value` (README, "Train")."""

import dataclasses
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from EasyLM import flags
from EasyLM.data import dataset, text_tokenizer
from EasyLM.data.tokenizer_names import TOKENIZER_KEY, common_tokenizer, tokenizer_of
from EasyLM.errors import UserError
from EasyLM.models.llama import hf_layout, llama_config, training_task
from EasyLM.models.llama.checkpoint_record import recorded_tokenizer
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.models.llama.lora import LoRAConfig
from EasyLM.parallel import (
    device_memory,
    fail_together,
    initialize_distributed,
    make_mesh,
    on_first_process_first,
    usable_memory,
)
from EasyLM.storage import expand_path_groups, local_path
from EasyLM.training import (
    ModelSettings,
    RunSettings,
    StartPoint,
    StopSignals,
    TrainingData,
    TrainingTask,
    make_optimizer,
    open_run,
    train,
)

FLAGS = training_task.TRAIN_FLAGS


@StopSignals()
@fail_together()
def main(config: Any) -> int:
    """Trains a model as specified by the flags.

    Flags and initial files are validated before the data is indexed and the train step is compiled.

    Returns:
      The exit code: 0, or 75 if a signal stopped the run. The state is saved before exit code 75, unless
      `--preemption_notice_seconds` leaves no time.
    """
    logging.getLogger().setLevel(logging.INFO)
    initialize_distributed(config.jax_distributed)

    # Model
    model = training_task.read_model(config)
    lora = LoRAConfig.from_flags(config.lora)
    optimizer = make_optimizer(config.optimizer)
    if config.optimizer.ema_decay and not config.checkpointer.save_optimizer_state:
        raise UserError(
            f"--optimizer.ema_decay={config.optimizer.ema_decay}: the average is part of the optimizer's state; it "
            "needs --checkpointer.save_optimizer_state=True"
        )
    tokenizer = text_tokenizer.load_tokenizer(**config.tokenizer)
    mesh = make_mesh(config.mesh_dim)

    # Start
    dataset_names = ["train_dataset"] + ["eval_dataset"] * (config.eval_steps > 0)
    for name in dataset_names:
        training_task.check_batch(name, config[name], model, mesh)
        _check_files(name, config[name])
    training_task.check_step(config, model, mesh, device_memory(mesh))
    with open_run(RunSettings.from_flags(config), _model_settings(model, lora), hf_layout.CHECKPOINT_FORMATS) as run:
        _check_start(run.start, lora)
        # Data
        sources = {}
        for name in dataset_names:
            ids = model.bos_token_id, model.eos_token_id
            make_source = partial(dataset.make_dataset, config[name], tokenizer, model.vocab_size, name, *ids)
            sources[name] = on_first_process_first(make_source)

        # Train
        model, remat = training_task.with_remat(config, model, mesh, usable_memory(mesh))
        logging.info("llama.remat_block: %s", remat)
        task = TrainingTask(
            training_task.make_model(model, config.dtype, mesh, lora, config.gradient_reduce_dtype),
            optimizer,
            TrainingData(
                train=sources["train_dataset"],
                batch_size=dataset.settings(config.train_dataset).batch_size,
                eval=sources.get("eval_dataset"),
                eval_batch_size=dataset.settings(config.eval_dataset).batch_size,
            ),
            training_task.accounting(model, sources["train_dataset"].seq_length, lora),
            metadata=_tokenizer_metadata(run.start, {name: source.tokenizer for name, source in sources.items()}),
        )
        return train(run, task, mesh)


def _tokenizer_metadata(start: StartPoint, names: Mapping[str, str | None]) -> dict[str, str]:
    """Returns the key of the metadata that names the image tokenizer of the data, or of the checkpoint.

    Args:
      names: the tokenizer that the records of each data set name, if they do.

    Raises:
      UserError: if two data sets have different ones.
    """
    name = common_tokenizer((name, f"--{flag}") for flag, name in names.items())
    earlier = tokenizer_of(start.metadata)
    if start.files.checkpoint and not start.files.metadata:
        prefix, _, path = start.files.checkpoint.partition("::")
        earlier = recorded_tokenizer(prefix, local_path(path))
    if name and earlier and name != earlier:
        logging.warning(
            "the data has tokens of the tokenizer %s, but %s was trained on those of %s: ids mean other images",
            name,
            start.files.checkpoint,
            earlier,
        )
    tokenizer = name or earlier
    return {TOKENIZER_KEY: tokenizer} if tokenizer else {}


def _check_start(start: StartPoint, lora: LoRAConfig | None) -> None:
    """Checks that the run starts from what `--lora.rank` needs.

    Raises:
      UserError: if adapters have no frozen parameters, or flags for whole parameters resume a run of adapters.
    """
    if lora and not start.origin:
        raise UserError(f"--lora.rank={lora.rank}: needs --load_checkpoint, the frozen parameters")
    if lora and start.origin.startswith("trainstate::"):
        raise UserError(f"--load_checkpoint={start.origin}: adapters need parameters alone: use trainstate_params::")
    saved = start.metadata.get("llama_config", {}).get("lora")
    if saved and not lora:
        raise UserError(f"--lora.rank=0: {start.files.checkpoint} holds adapters of rank {saved['rank']}")


def _model_settings(model: LLaMAConfig, lora: LoRAConfig | None) -> ModelSettings:
    return ModelSettings(
        name="llama_config",
        values=dataclasses.asdict(model) | ({"lora": dataclasses.asdict(lora)} if lora else {}),
        resumable=llama_config.RESUMABLE_SETTINGS,
        fixed=llama_config.FIXED_SETTINGS,
        saved=_saved_settings,
    )


def _saved_settings(spec: str) -> Mapping[str, Any]:
    """Returns the model settings that the checkpoint `PREFIX::PATH` records, or an empty mapping if there are none."""
    saved = training_task.recorded_config(spec)
    return dataclasses.asdict(saved) if saved else {}


def _check_files(name: str, dataset_config: Any) -> None:
    """Checks that the files of the dataset exist."""
    if dataset_config.type == "json":
        expand_path_groups(f"{name}.json_dataset.path", dataset_config.json_dataset.path)


def cli() -> None:
    """Runs `main` with the flags of the command line."""
    flags.run(main, FLAGS)


if __name__ == "__main__":
    cli()
