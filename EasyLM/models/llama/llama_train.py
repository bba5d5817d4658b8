"""Trains a Large Vision Model: `python -m EasyLM.models.llama.llama_train --flag=value` (README, "Training")."""

import dataclasses
import logging
import os
from functools import partial

import jax.numpy as jnp

from EasyLM import flags
from EasyLM.data import dataset, text_tokenizer
from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.models.llama import hf_layout, llama_config, llama_model
from EasyLM.parallel import check_batch_size, initialize_distributed, make_mesh, on_first_process_first
from EasyLM.storage import expand_path_groups
from EasyLM.training import optimizers, run

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}

DEFINITIONS = {
    **run.RUN_FLAGS,
    "dtype": Flag("fp32", "Type of the computation; parameters, softmax and loss are float32.", choices=tuple(DTYPES)),
    "load_llama_config": Flag("", "A preset, json::PATH, or pickle::PATH (metadata of a run of the LVM release)."),
    "update_llama_config": Flag("", "A Python dict literal of settings to change, as {'num_hidden_layers': 4}."),
    "llama": llama_config.LLAMA_FLAGS,
    "tokenizer": text_tokenizer.TOKENIZER_FLAGS,
    "train_dataset": dataset.DATASET_FLAGS,
    "eval_dataset": dataset.DATASET_FLAGS,
    "optimizer": optimizers.OPTIMIZER_FLAGS,
}


def main(config) -> None:
    """Trains as the flags say. All that can be checked is checked before the data is indexed and the model compiled."""
    logging.getLogger().setLevel(logging.INFO)
    initialize_distributed(config.jax_distributed)
    model = llama_config.build_config(config.load_llama_config, config.llama, config.update_llama_config)
    optimizer, learning_rate = optimizers.make_optimizer(config.optimizer)
    tokenizer = text_tokenizer.load_tokenizer(config.tokenizer)
    mesh = make_mesh(config.mesh_dim)
    used = ["train_dataset"] + ["eval_dataset"] * (config.eval_steps > 0)
    for name in used:
        _check_dataset_flags(name, config[name], model, mesh)
        if config[name].type == "json":
            expand_path_groups(f"{name}.json_dataset.path", config[name].json_dataset.path)
    run_dir = run.run_directory(config)
    run.check(config, run_dir, hf_layout.CHECKPOINT_FORMATS)
    sources = {}
    for name in used:
        make_source = partial(dataset.make_dataset, config[name], tokenizer, model.vocab_size, name)
        sources[name] = on_first_process_first(make_source)
    seq_length = sources["train_dataset"].seq_length
    problem = run.Problem(
        init_params=partial(llama_model.init_params, model),
        loss_fn=llama_model.make_loss_fn(model, DTYPES[config.dtype], mesh),
        optimizer=optimizer,
        learning_rate=learning_rate,
        partition_rules=llama_config.PARTITION_RULES,
        settings=dataclasses.asdict(model),
        settings_name="llama_config",
        free_settings=llama_config.FREE_SETTINGS,
        saved_settings=_saved_settings,
        data=sources["train_dataset"],
        eval_data=sources.get("eval_dataset"),
        batch_size=dataset.settings(config.train_dataset).batch_size,
        eval_batch_size=dataset.settings(config.eval_dataset).batch_size,
        units_per_row=seq_length,
        flops_per_row=seq_length * llama_config.flops_per_token(model, seq_length),
        accumulate_gradient_steps=config.optimizer.accumulate_gradient_steps,
        prefixes=hf_layout.CHECKPOINT_FORMATS,
    )
    run.train_run(config, run_dir, mesh, problem)


def _saved_settings(spec: str) -> dict:
    """The settings of the model of `--load_checkpoint=spec`, where a file beside it says."""
    prefix, _, path = spec.partition("::")
    if prefix == "huggingface":
        found = llama_config.load_config(f"json::{os.path.join(path, 'config.json')}")
    else:
        found = llama_config.config_beside(path)
    return dataclasses.asdict(found) if found else {}


def _check_dataset_flags(name, dataset_config, model, mesh) -> None:
    settings = dataset.settings(dataset_config)
    group = f"{name}.{dataset_config.type}_dataset"
    check_batch_size(f"--{group}.batch_size", settings.batch_size, mesh)
    if settings.seq_length > model.max_sequence_length:
        raise UserError(
            f"--{group}.seq_length={settings.seq_length}: longer than the model's "
            f"max_sequence_length={model.max_sequence_length}"
        )


def cli() -> None:
    """Runs the command with the flags of the command line."""
    flags.run(main, DEFINITIONS)


if __name__ == "__main__":
    cli()
