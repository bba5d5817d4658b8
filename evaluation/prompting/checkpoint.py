"""Loads a model from any checkpoint format onto a mesh, and the tokenizer that it was trained with."""

import os
import sys
from typing import Any

import jax
import jax.numpy as jnp

from EasyLM import checkpoints
from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.models.llama import hf_layout, inference_model, llama_config
from EasyLM.models.llama.checkpoint_record import recorded_tokenizer
from EasyLM.models.llama.inference_memory import Batch, InferenceMemory, inference_memory
from EasyLM.models.llama.int8_kernels import quantized_entries
from EasyLM.models.llama.lora_checkpoint import open_merged, recorded_lora
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.parallel import more_device_memory, shardings, usable_memory
from EasyLM.storage import is_remote
from tokenizer.formats import ImageTokenizer
from tokenizer.vqgan import PRETRAINED, Codec

MODEL_FLAGS = {
    "checkpoint": Flag(
        "", "The model: PREFIX::PATH, as for training, or a Hugging Face directory or name.", required=True
    ),
    "load_llama_config": Flag(
        "",
        "Preset or json::PATH, for a checkpoint without metadata. Metadata, if any, must have the same settings.",
    ),
}


def load_model(
    spec: str,
    load_llama_config: str,
    mesh: jax.sharding.Mesh,
    dtype: jnp.dtype = jnp.float32,
    int8: bool = False,
    batch: Batch | None = None,
) -> tuple[llama_config.LLaMAConfig, Any]:
    """Returns the model settings of a checkpoint, and its parameters with separate layers, sharded over the mesh.

    The host holds a few matrices at a time, in the type of the device. Kernels are cast to `dtype`, the compute type: a
    7B model in bf16 takes 13 GB of device memory. Norms and the embedding stay float32, because they are always
    computed in float32.

    Args:
      spec: PREFIX::PATH or a Hugging Face directory.
      load_llama_config: preset or json::PATH; empty: use the settings that the checkpoint records.
      mesh: the mesh of devices.
      dtype: type of the kernels.
      int8: the kernels of the layers are int8, with scales; see `int8_kernels`.
      batch: the largest batch that will be computed. What it needs is printed first; None: it is not known.

    Raises:
      UserError: if the checkpoint does not exist, its model settings are unknown or differ from the given ones, or the
        devices have too little memory for the batch.
    """
    prefix, path = parse_spec(spec)
    config = _model_config(prefix, path, load_llama_config)
    shapes = inference_model.parameter_shapes(config, dtype, int8)
    target = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        shardings(mesh, PARTITION_RULES, shapes),
    )
    if batch is not None:
        _check_memory(spec, inference_memory(config, target, dtype, mesh, batch), batch, mesh, int8)
    prefix = "trainstate_params" if prefix == "trainstate" else prefix
    spec = f"{prefix}::{path}"
    lora = recorded_lora(prefix, path)
    entries = open_merged(spec, lora) if lora else checkpoints.open_checkpoint(spec, hf_layout.CHECKPOINT_FORMATS)
    return config, checkpoints.load_entries(spec, quantized_entries(entries) if int8 else entries, target)


def _check_memory(spec: str, need: InferenceMemory, batch: Batch, mesh: jax.sharding.Mesh, int8: bool) -> None:
    """Prints what a model needs on each device.

    Raises:
      UserError: if a device has less memory. The message names remedies.
    """
    limit = usable_memory(mesh)
    if limit is None:
        print(f"{spec}: needs {need}", file=sys.stderr)
        return
    platform = mesh.devices.flat[0].platform
    available = "a CPU's share of this machine is" if platform == "cpu" else "JAX may use"
    available += f" {limit / 1e9:.3g} GB"
    print(f"{spec}: needs {need}; {available}", file=sys.stderr)
    if need.total <= limit:
        return
    remedies = [] if int8 else ["--weights=int8"]
    remedies += ["fewer candidates"] if batch.candidates > 1 else []
    remedies += ["a smaller batch"] if batch.prompts > 1 else []
    remedies += ["shorter prompts", "more devices along the axis mp of --mesh_dim"]
    if platform == "gpu":
        remedies.append(more_device_memory())
    raise UserError(f"--checkpoint={spec}: needs {need}, but {available}: try {', '.join(remedies)}")


def read_config(spec: str, load_llama_config: str) -> llama_config.LLaMAConfig:
    """Returns the model settings of a checkpoint. Arguments and errors: see `load_model`."""
    return _model_config(*parse_spec(spec), load_llama_config)


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
    prefix, path = parse_spec(spec)
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


def check_codes(codec: ImageTokenizer, config: llama_config.LLaMAConfig) -> None:
    """Raises UserError if a model was trained with a codebook of another size, or has fewer ids than the tokenizer."""
    if config.codebook_size not in (0, codec.num_codes):
        raise UserError(
            f"the tokenizer has {codec.num_codes} codes, but the model was trained with a tokenizer of "
            f"{config.codebook_size} codes: --vqgan and --checkpoint do not match"
        )
    if config.vocab_size < codec.num_codes:
        raise UserError(
            f"the tokenizer has {codec.num_codes} codes, more than the model's vocabulary of "
            f"{config.vocab_size} ids: --vqgan and --checkpoint do not match"
        )


def parse_spec(spec: str) -> tuple[str, str]:
    """Returns the prefix and the local or remote path of a `--checkpoint`. Raises: see `checkpoints.parse_spec`."""
    is_prefixed = "::" in spec or os.path.isfile(spec)  # `parse_spec` rejects a file without a prefix
    note = " (a Hugging Face model, as it has no PREFIX::)" if is_remote(spec) and not is_prefixed else ""
    return checkpoints.parse_spec(
        spec if is_prefixed else f"huggingface::{spec}", hf_layout.CHECKPOINT_FORMATS, f"--checkpoint={spec}{note}"
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
        hint = checkpoints.prefix_hint(prefix, path, hf_layout.CHECKPOINT_FORMATS)
        raise UserError(
            f"--checkpoint={path}: no config.json in it: give a Hugging Face directory, or PREFIX::PATH{hint}"
        )
    raise UserError(f"--load_llama_config is empty, and there is no metadata.json beside {path}")
