"""A trained model from any checkpoint, ready to prompt."""

import os

import jax
import jax.numpy as jnp

from EasyLM import checkpoint, sharding
from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.models.llama import hf_layout, llama_config, llama_model

MODEL_FLAGS = {
    "checkpoint": Flag("", "The model: PREFIX::FILE, as for training, or a Hugging Face directory."),
    "load_llama_config": Flag("", "Preset or json::PATH; empty: as the metadata beside the checkpoint says."),
}


def load_model(spec: str, load_llama_config: str, mesh: jax.sharding.Mesh, dtype=jnp.float32):
    """The settings and the parameters of a checkpoint, on the mesh.

    Kernels are in `dtype`, that of the computation, so that a 7B in bf16 takes 13 GB of a device; norms and embedding,
    which are computed with in float32 always, in float32.

    Raises:
      UserError: if there is no such checkpoint, or nothing says what model it is of.
    """
    if not spec:
        raise UserError("--checkpoint is missing: PREFIX::FILE, or a Hugging Face directory")
    if "::" not in spec:
        spec = f"huggingface::{spec}"
    spec = spec.replace("trainstate::", "trainstate_params::", 1) if spec.startswith("trainstate::") else spec
    config = _config(spec, load_llama_config)
    shapes = jax.eval_shape(lambda params: llama_model.with_kernels(params, dtype), hf_layout.parameter_shapes(config))
    places = sharding.shardings(mesh, llama_config.PARTITION_RULES, shapes)
    target = jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places)
    return config, checkpoint.load(spec, target, hf_layout.PREFIXES)


def _config(spec: str, load_llama_config: str) -> llama_config.LLaMAConfig:
    prefix, _, path = spec.partition("::")
    if load_llama_config:
        return llama_config.load_config(load_llama_config)
    if prefix == "huggingface":
        return llama_config.load_config(f"json::{os.path.join(path, 'config.json')}")
    found = llama_config.config_beside(path)
    if found is None:
        raise UserError(f"--load_llama_config is empty, and no metadata.json lies beside {path}")
    return found
