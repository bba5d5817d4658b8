"""A tiny LLaMA: the model of tests/golden/lvm_tiny."""

import dataclasses

import jax
import jax.numpy as jnp

from EasyLM.models.llama import llama_config

TINY = llama_config.updated(
    llama_config.load_config("vqlm_debug"), "dict(vocab_size=512,hidden_size=64,intermediate_size=128)"
)


def stacked(params: dict) -> dict:
    """Returns parameters with separate layers, as for inference, in the form of training: stacked."""
    transformer = params["params"]["transformer"]
    layers = [transformer["h"][str(number)] for number in range(len(transformer["h"]))]
    transformer = {**transformer, "h": jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)}
    return {"params": {**params["params"], "transformer": transformer}}


def changed(**settings) -> llama_config.LLaMAConfig:
    return dataclasses.replace(TINY, **settings)
