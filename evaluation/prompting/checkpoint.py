"""Loads a model from any checkpoint format onto a mesh, and the tokenizer that it was trained with."""

import os
from typing import Any

import jax
import jax.numpy as jnp

from EasyLM import checkpoints
from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.models.llama import hf_layout, llama_config, llama_model
from EasyLM.models.llama.checkpoint_record import recorded_tokenizer
from EasyLM.models.llama.lora_checkpoint import open_merged, recorded_lora
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.parallel import shardings
from tokenizer.vqgan import PRETRAINED, Codec

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
    prefix, path = _parse(spec)
    config = _model_config(prefix, path, load_llama_config)
    shapes = jax.eval_shape(lambda params: llama_model.with_kernels(params, dtype), hf_layout.parameter_shapes(config))
    target = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        shardings(mesh, PARTITION_RULES, shapes),
    )
    prefix = "trainstate_params" if prefix == "trainstate" else prefix
    spec = f"{prefix}::{path}"
    if lora := recorded_lora(prefix, path):
        return config, checkpoints.load_entries(spec, open_merged(spec, lora), target)
    return config, checkpoints.load(spec, target, hf_layout.CHECKPOINT_FORMATS)


def load_codec(spec: str, load_llama_config: str, vqgan: str, **settings: Any) -> Codec:
    """Loads the tokenizer of a checkpoint.

    Args:
      spec, load_llama_config: see `load_model`.
      vqgan: the tokenizer; empty: the one that ships with the project, if the checkpoint names it.
      settings: further arguments of `Codec`.

    Raises:
      UserError: as `load_model`; or if the checkpoint was trained with another tokenizer, or `vqgan` is empty and the
        checkpoint names none.
    """
    prefix, path = _parse(spec)
    _model_config(prefix, path, load_llama_config)  # a wrong checkpoint is named first
    recorded = recorded_tokenizer(prefix, path)
    if not vqgan and recorded is None:
        raise UserError(
            f"--vqgan is missing: --checkpoint={spec} does not name the tokenizer that it was trained with; the one "
            f"that ships with the project is {PRETRAINED}"
        )
    codec = Codec(vqgan or PRETRAINED, **settings)
    if recorded not in (None, codec.digest):
        problem = f"--vqgan={vqgan}: wrong tokenizer" if vqgan else "--vqgan is missing"
        raise UserError(
            f"{problem}: --checkpoint={spec} was trained with the tokenizer {recorded}, and "
            f"{'this one' if vqgan else 'the one that ships with the project'} is {codec.digest}"
        )
    return codec


def _parse(spec: str) -> tuple[str, str]:
    is_prefixed = "::" in spec or os.path.isfile(spec)  # `parse_spec` rejects a file without a prefix
    return checkpoints.parse_spec(
        spec if is_prefixed else f"huggingface::{spec}", hf_layout.CHECKPOINT_FORMATS, f"--checkpoint={spec}"
    )


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
