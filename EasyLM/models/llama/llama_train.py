"""Trains a Large Vision Model: `python -m EasyLM.models.llama.llama_train --flag=value` (README, "Train")."""

import dataclasses
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from EasyLM import flags
from EasyLM.data import dataset, text_tokenizer
from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.models.llama import costs, hf_layout, llama_config, llama_model
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.parallel import check_batch_size, fail_together, initialize_distributed, make_mesh, on_first_process_first
from EasyLM.storage import expand_path_groups, local_path
from EasyLM.training import (
    OPTIMIZER_FLAGS,
    RUN_FLAGS,
    Accounting,
    ModelSettings,
    RunSettings,
    StopSignals,
    TrainingData,
    TrainingTask,
    make_optimizer,
    model_without_extra,
    open_run,
    train,
)

COMPUTE_DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}

FLAGS = {
    **RUN_FLAGS,
    "dtype": Flag(
        "fp32",
        "Type of the computation; parameters, softmax and loss are float32. fp16 is refused: gradients underflow.",
        choices=(*COMPUTE_DTYPES,),
        aliases=flags.DTYPE_ALIASES,
    ),
    "load_llama_config": Flag(
        "",
        "A preset, json::PATH, or pickle::PATH (metadata of a run of the LVM release); empty: the settings that "
        "--load_checkpoint records.",
    ),
    "update_llama_config": Flag("", "A Python dict literal of settings to change, as {'num_hidden_layers': 4}."),
    "llama": llama_config.LLAMA_FLAGS,
    "tokenizer": text_tokenizer.TOKENIZER_FLAGS,
    "train_dataset": dataset.DATASET_FLAGS,
    "eval_dataset": dataset.DATASET_FLAGS,
    "optimizer": OPTIMIZER_FLAGS,
}


@StopSignals()
@fail_together()
def main(config: Any) -> int:
    """Trains a model as specified by the flags.

    Flags and initial files are validated before the data is indexed and the train step is compiled.

    Returns:
      The exit code: 0, or 75 if a signal stopped the run. The state is saved before exit code 75.
    """
    logging.getLogger().setLevel(logging.INFO)
    initialize_distributed(config.jax_distributed)

    # Model
    if config.dtype == "fp16":
        raise UserError(
            "--dtype=fp16: small gradients underflow to zero, as there is no loss scaling; use bf16, which has the "
            "range of fp32"
        )
    recorded = _recorded_config(config.load_checkpoint) if config.load_checkpoint else None
    model = llama_config.build_config(
        config.load_llama_config, config.llama, config.update_llama_config, recorded or LLaMAConfig()
    )
    optimizer = make_optimizer(config.optimizer)
    tokenizer = text_tokenizer.load_tokenizer(**config.tokenizer)
    mesh = make_mesh(config.mesh_dim)

    # Start
    dataset_names = ["train_dataset"] + ["eval_dataset"] * (config.eval_steps > 0)
    for name in dataset_names:
        _check_dataset_flags(name, config[name], model, mesh)
    with open_run(RunSettings.from_flags(config), _model_settings(model), hf_layout.CHECKPOINT_FORMATS) as run:
        # Data
        sources = {}
        for name in dataset_names:
            make_source = partial(dataset.make_dataset, config[name], tokenizer, model.vocab_size, name)
            sources[name] = on_first_process_first(make_source)
        seq_length = sources["train_dataset"].seq_length

        # Train
        task = TrainingTask(
            model_without_extra(
                partial(llama_model.init_params, model),
                llama_model.make_loss_fn(model, COMPUTE_DTYPES[config.dtype], mesh),
                PARTITION_RULES,
            ),
            optimizer,
            TrainingData(
                train=sources["train_dataset"],
                batch_size=dataset.settings(config.train_dataset).batch_size,
                eval=sources.get("eval_dataset"),
                eval_batch_size=dataset.settings(config.eval_dataset).batch_size,
            ),
            Accounting(
                unit="tokens",
                items_per_row=seq_length,
                flops_per_row=seq_length * costs.flops_per_token(model, seq_length),
            ),
        )
        return train(run, task, mesh)


def _model_settings(model: LLaMAConfig) -> ModelSettings:
    return ModelSettings(
        name="llama_config",
        values=dataclasses.asdict(model),
        resumable=llama_config.RESUMABLE_SETTINGS,
        fixed=llama_config.FIXED_SETTINGS,
        saved=_saved_settings,
    )


def _saved_settings(spec: str) -> Mapping[str, Any]:
    """Returns the model settings that the checkpoint `PREFIX::PATH` records, or an empty mapping if there are none."""
    saved = _recorded_config(spec)
    return dataclasses.asdict(saved) if saved else {}


def _recorded_config(spec: str) -> LLaMAConfig | None:
    prefix, _, path = spec.partition("::")
    return llama_config.recorded_config(prefix, local_path(path))


def _check_dataset_flags(name: str, dataset_config: Any, model: LLaMAConfig, mesh: Mesh) -> None:
    """Checks the flags of a dataset against the model and the mesh. Checks that the files of the dataset exist."""
    settings = dataset.settings(dataset_config)
    group = f"{name}.{dataset_config.type}_dataset"
    check_batch_size(f"--{group}.batch_size", settings.batch_size, mesh)
    if settings.seq_length > model.max_sequence_length:
        raise UserError(
            f"--{group}.seq_length={settings.seq_length}: longer than the model's "
            f"max_sequence_length={model.max_sequence_length}"
        )
    if dataset_config.type == "json":
        expand_path_groups(f"{name}.json_dataset.path", dataset_config.json_dataset.path)


def cli() -> None:
    """Runs `main` with the flags of the command line."""
    flags.run(main, FLAGS)


if __name__ == "__main__":
    cli()
