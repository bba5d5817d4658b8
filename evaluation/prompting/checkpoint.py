"""A trained model from any checkpoint, ready to prompt."""

import os

import jax
import jax.numpy as jnp

from EasyLM import checkpoints
from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.models.llama import hf_layout, llama_config, llama_model
from EasyLM.parallel import shardings

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
    named = spec if "::" in spec or os.path.isfile(spec) else f"huggingface::{spec}"  # a file says not what it holds
    prefix, path = checkpoints.parse_spec(named, hf_layout.CHECKPOINT_FORMATS, f"--checkpoint={spec}")
    config = _config(prefix, path, load_llama_config)
    shapes = jax.eval_shape(lambda params: llama_model.with_kernels(params, dtype), hf_layout.parameter_shapes(config))
    places = shardings(mesh, llama_config.PARTITION_RULES, shapes)
    target = jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places)
    prefix = "trainstate_params" if prefix == "trainstate" else prefix
    return config, checkpoints.load(f"{prefix}::{path}", target, hf_layout.CHECKPOINT_FORMATS)


def _config(prefix: str, path: str, load_llama_config: str) -> llama_config.LLaMAConfig:
    if load_llama_config:
        return llama_config.load_config(load_llama_config)
    if prefix == "huggingface":
        file = os.path.join(path, "config.json")
        if os.path.isdir(path) and not os.path.exists(file):
            raise UserError(
                f"--checkpoint={path}: no config.json there: name a Hugging Face directory, or PREFIX::FILE"
            )
        return llama_config.load_config(f"json::{file}")
    found = llama_config.config_beside(path)
    if found is None:
        raise UserError(f"--load_llama_config is empty, and no metadata.json lies beside {path}")
    return found
