"""What `llama_train` trains, from its flags. `llama_plan` plans the same task."""

import dataclasses
import math
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from EasyLM import checkpoints, flags
from EasyLM.data import dataset, text_tokenizer
from EasyLM.errors import UserError, prefix_errors
from EasyLM.flags import Flag
from EasyLM.models.llama import adapters, costs, hf_layout, llama_config, llama_model
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.models.llama.lora import LORA_FLAGS, LoRAConfig
from EasyLM.models.llama.memory import RematChoice, StepShape, check_memory, choose_remat
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.models.llama.remat_policies import AUTO
from EasyLM.parallel import BATCH_AXES, check_batch_size, group_mesh, more_device_memory
from EasyLM.storage import local_path
from EasyLM.training import (
    OPTIMIZER_FLAGS,
    RUN_FLAGS,
    Accounting,
    Model,
    abstract_state,
    make_optimizer,
    model_without_extra,
)

COMPUTE_DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}

TRAIN_FLAGS = {
    **RUN_FLAGS,
    "dtype": Flag(
        "fp32",
        "Type of the computation; parameters, softmax and loss are float32. fp16 is refused: gradients underflow.",
        choices=(*COMPUTE_DTYPES,),
        aliases=flags.DTYPE_ALIASES,
    ),
    "gradient_reduce_dtype": Flag(
        "",
        "Type in which devices sum the gradients of kernels: fp32 (with --dtype=bf16 the sums take twice the bytes); "
        "empty: that of --dtype.",
        choices=("", "fp32"),
    ),
    "load_llama_config": Flag(
        "",
        "A preset, json::PATH, or pickle::PATH (metadata of a run of the LVM release); empty: the settings that "
        "--load_checkpoint records.",
    ),
    "update_llama_config": Flag("", "A Python dict literal of settings to change, such as {'num_hidden_layers': 4}."),
    "llama": llama_config.LLAMA_FLAGS,
    "lora": LORA_FLAGS,
    "tokenizer": text_tokenizer.TOKENIZER_FLAGS,
    "train_dataset": dataset.DATASET_FLAGS,
    "eval_dataset": dataset.DATASET_FLAGS,
    "optimizer": OPTIMIZER_FLAGS,
}


def read_model(config: Any) -> LLaMAConfig:
    """Returns the model's settings.

    Args:
      config: values of TRAIN_FLAGS.

    Raises:
      UserError: if a setting is invalid, or the type cannot train.
    """
    if config.dtype == "fp16":
        raise UserError(
            "--dtype=fp16: small gradients underflow to zero, as there is no loss scaling; use bf16, which has the "
            "range of fp32"
        )
    recorded = recorded_config(config.load_checkpoint) if config.load_checkpoint else None
    settings = config.load_llama_config, config.llama, config.update_llama_config
    return llama_config.build_config(*settings, recorded or LLaMAConfig())


def recorded_config(spec: str) -> LLaMAConfig | None:
    """Returns the settings that the checkpoint `PREFIX::PATH` records, or None.

    Raises:
      UserError: if they are broken, or missing from a Hugging Face directory.
    """
    prefix, _, path = spec.partition("::")
    with prefix_errors(f"checkpoint {spec!r}"):
        path = local_path(path)
        recorded = llama_config.recorded_config(prefix, path)
        if recorded is None and prefix == "huggingface" and os.path.isdir(path):
            hint = checkpoints.prefix_hint(prefix, path, hf_layout.CHECKPOINT_FORMATS)
            raise UserError(f"{path}: no Hugging Face model: config.json is missing{hint}")
    return recorded


def make_model(
    llama: LLaMAConfig,
    dtype: str,
    mesh: Mesh,
    lora: LoRAConfig | None = None,
    gradient_reduce_dtype: str = "",
) -> Model:
    """Returns the functions of the model.

    Args:
      dtype: a name of COMPUTE_DTYPES.
      lora: train adapters; None: train all parameters.
      gradient_reduce_dtype: the value of the flag.
    """
    wide_gradients = gradient_reduce_dtype == "fp32"
    if lora:
        return adapters.make_model(llama, lora, COMPUTE_DTYPES[dtype], mesh, wide_gradients)
    loss_fn, group_loss_fn = (
        llama_model.make_loss_fn(llama, COMPUTE_DTYPES[dtype], devices, wide_gradients=wide_gradients)
        for devices in (mesh, group_mesh(mesh))
    )
    return model_without_extra(partial(llama_model.init_params, llama), loss_fn, PARTITION_RULES, group_loss_fn)


def step_shape(config: Any, llama: LLaMAConfig, mesh: Mesh) -> StepShape:
    """Returns what the memory of the flags' step depends on. `config` has the values of TRAIN_FLAGS."""
    model = make_model(llama, config.dtype, mesh, LoRAConfig.from_flags(config.lora))
    state = abstract_state(model, make_optimizer(config.optimizer), mesh)
    settings = dataset.settings(config.train_dataset)
    return StepShape.of(state, mesh, COMPUTE_DTYPES[config.dtype], settings.batch_size, settings.seq_length)


def check_step(config: Any, llama: LLaMAConfig, mesh: Mesh, memory: int | None) -> None:
    """Checks that the flags' step can fit into the memory that JAX may use, where it is known.

    Args:
      config: values of TRAIN_FLAGS.
      memory: bytes of a device that JAX may use; None: unknown.

    Raises:
      UserError: with the bytes, and the flags that reduce them.
    """
    if memory is None:
        return
    settings, group = dataset.settings(config.train_dataset), f"--train_dataset.{config.train_dataset.type}_dataset"
    both = ["more devices along fsdp in --mesh_dim"]
    if mesh.devices.flat[0].platform == "gpu":
        both.append(more_device_memory())
    adapters = ["--lora.rank=16"] if config.load_checkpoint and not config.lora.rank else []  # of loaded parameters
    tokens = fewer_tokens(group, settings.batch_size, settings.seq_length, llama, mesh.shape)
    tokens.append(f"a smaller {group}.seq_length")
    check_memory(llama, step_shape(config, llama, mesh), memory, [*both, *adapters], [*tokens, *both])


def fewer_tokens(
    group: str, batch_size: int, seq_length: int, llama: LLaMAConfig, mesh: Mapping[str, int]
) -> list[str]:
    """Returns what gives each device fewer tokens of a batch: a smaller batch, or for one row a device, split rows.

    Args:
      group: the dataset's flags, with two hyphens.
      mesh: the size of each mesh axis.
    """
    rows = math.prod(mesh[axis] for axis in BATCH_AXES)
    if batch_size > rows:
        return [f"a smaller {group}.batch_size"]
    sp = 2 * mesh["sp"]
    if mesh["fsdp"] % 2 == seq_length % sp == llama.num_attention_heads % (mesh["mp"] * sp) == 0:
        axes = ",".join(f"{axis}:{size}" for axis, size in ({**mesh, "fsdp": mesh["fsdp"] // 2, "sp": sp}).items())
        return [f"half the batch with --mesh_dim={axes}, which splits each row over {sp} devices"]
    return []


def with_remat(config: Any, llama: LLaMAConfig, mesh: Mesh, memory: int | None) -> tuple[LLaMAConfig, RematChoice]:
    """Returns the settings with the policy of `remat_block` that the step of the flags uses, and why.

    Args:
      config: values of TRAIN_FLAGS.
      memory: bytes of a device that the step may use; None: unknown.
    """
    is_needed = llama.remat_block == AUTO and memory is not None
    choice = choose_remat(llama, step_shape(config, llama, mesh) if is_needed else None, memory)
    return dataclasses.replace(llama, remat_block=choice.policy), choice


def accounting(llama: LLaMAConfig, seq_length: int, lora: LoRAConfig | None = None) -> Accounting:
    """Returns the units of rows of `seq_length` tokens."""
    return Accounting(
        unit="tokens",
        items_per_row=seq_length,
        flops_per_row=seq_length * costs.flops_per_token(llama, seq_length, frozen=lora is not None),
    )


def check_batch(name: str, dataset_config: Any, llama: LLaMAConfig, mesh: Mesh) -> None:
    """Checks the size and the length of a dataset's batches against the mesh and the model.

    Args:
      name: the group of the dataset's flags.
      dataset_config: values of DATASET_FLAGS.

    Raises:
      UserError: naming the flag, its value and the rule.
    """
    settings = dataset.settings(dataset_config)
    group = f"{name}.{dataset_config.type}_dataset"
    check_batch_size(f"--{group}.batch_size", settings.batch_size, mesh)
    if settings.seq_length > llama.max_sequence_length:
        raise UserError(
            f"--{group}.seq_length={settings.seq_length}: longer than the model's "
            f"max_sequence_length={llama.max_sequence_length}"
        )
    _check_sequence_split(f"--{group}.seq_length={settings.seq_length}", settings.seq_length, llama, mesh)


def _check_sequence_split(flag: str, seq_length: int, llama: LLaMAConfig, mesh: Mesh) -> None:
    """Checks that the mesh axis sp divides rows, and the heads of each part of mp."""
    mp, sp = mesh.shape["mp"], mesh.shape["sp"]
    if seq_length % sp:
        raise UserError(f"{flag}: must be a multiple of {sp}, the mesh's sp")
    heads = llama.num_attention_heads
    if sp > 1 and heads % (mp * sp):
        choices = [str(size) for size in range(1, heads // mp + 1) if heads % (mp * size) == 0]
        raise UserError(
            f"--mesh_dim: sp={sp}: sp x mp must divide the model's {heads} attention heads; with mp={mp}, "
            + (f"sp may be {', '.join(choices)}" if choices else "no sp does")
        )
