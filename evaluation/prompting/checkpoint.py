"""Loads a model from any checkpoint format onto a mesh."""

import os
from typing import Any

import jax
import jax.numpy as jnp

from EasyLM import checkpoints
from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.models.llama import hf_layout, llama_config, llama_model
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.parallel import shardings

MODEL_FLAGS = {
    "checkpoint": Flag(
        "", "The model: PREFIX::PATH, as for training, or a Hugging Face directory or name.", required=True
    ),
    "load_llama_config": Flag(
        "", "Preset or json::PATH, if there is no metadata beside the checkpoint; it must agree."
    ),
}


def load_model(
    spec: str, load_llama_config: str, mesh: jax.sharding.Mesh, dtype: jnp.dtype = jnp.float32
) -> tuple[llama_config.LLaMAConfig, Any]:
    """Returns the model settings of a checkpoint, and its parameters sharded over the mesh.

    Kernels are cast to `dtype`, the compute type: a 7B model in bf16 takes 13 GB of device memory. Norms and the
    embedding stay float32, because they are always computed in float32.

    Args:
      spec: PREFIX::PATH or a Hugging Face directory.
      load_llama_config: preset or json::PATH; empty: use the settings that the checkpoint records.
      mesh: the mesh of devices.
      dtype: type of the kernels.

    Raises:
      UserError: if the checkpoint does not exist, or its model settings are unknown or differ from the given ones.
    """
    is_prefixed = "::" in spec or os.path.isfile(spec)  # `parse_spec` rejects a file without a prefix
    prefix, path = checkpoints.parse_spec(
        spec if is_prefixed else f"huggingface::{spec}", hf_layout.CHECKPOINT_FORMATS, f"--checkpoint={spec}"
    )
    config = _model_config(prefix, path, load_llama_config)
    shapes = jax.eval_shape(lambda params: llama_model.with_kernels(params, dtype), hf_layout.parameter_shapes(config))
    target = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        shardings(mesh, PARTITION_RULES, shapes),
    )
    prefix = "trainstate_params" if prefix == "trainstate" else prefix
    return config, checkpoints.load(f"{prefix}::{path}", target, hf_layout.CHECKPOINT_FORMATS)


def _model_config(prefix: str, path: str, load_llama_config: str) -> llama_config.LLaMAConfig:
    recorded = llama_config.recorded_config(prefix, path)
    if load_llama_config:
        config = llama_config.load_config(load_llama_config)
        if recorded is not None:
            llama_config.check_recorded(config, recorded, f"--load_llama_config={load_llama_config}", path)
        return config
    if recorded is not None:
        return recorded
    if prefix == "huggingface":
        raise UserError(f"--checkpoint={path}: no config.json in it: give a Hugging Face directory, or PREFIX::PATH")
    raise UserError(f"--load_llama_config is empty, and there is no metadata.json beside {path}")
