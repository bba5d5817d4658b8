"""Helpers of prompting tests: a tiny tokenizer and a tiny model with confident predictions."""

import dataclasses
import functools
import json
import math
import pathlib

import jax
import numpy as np
from tokenizer_kit import TINY, tiny_vqgan

from EasyLM.checkpoints import stacking, streaming
from EasyLM.models.llama import llama_model
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.parallel import make_mesh, shardings
from evaluation.prompting import Prompter
from tokenizer.vqgan import Codec

CONFIG = LLaMAConfig(
    vocab_size=40,  # a few more than the tokenizer has codes
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,  # compilation takes most of the tests' time
    num_attention_heads=4,
    max_sequence_length=6 * TINY.tokens_per_image,
)


@functools.cache
def tiny_params(config: LLaMAConfig = CONFIG, matrix_gain: float = 10, stacked_gain: float = 5):
    """Returns random parameters, scaled up: otherwise all tokens would be almost equally likely."""
    params = jax.jit(llama_model.init_params, static_argnums=0)(config, jax.random.key(1))
    gains = {1: 1, 2: matrix_gain, 3: stacked_gain}
    return jax.tree.map(lambda x: gains[x.ndim] * x, params)


def tiny_logits(row_T: np.ndarray) -> np.ndarray:
    """Returns logits [T, V] of the full forward pass, without a cache."""
    padded_BT = np.zeros((1, CONFIG.max_sequence_length), np.int32)  # later tokens do not change earlier logits
    padded_BT[0, : len(row_T)] = row_T
    return np.asarray(_logits(padded_BT))[0, : len(row_T)]


@jax.jit
def _logits(tokens_BT):
    return llama_model.apply(CONFIG, tiny_params(), tokens_BT)


def tiny_prompter(directory: str | pathlib.Path, mesh_dim: str = "1,1,1") -> Prompter:
    """Writes a tokenizer to `directory`; returns a prompter on the first devices, as many as the mesh has."""
    size = math.prod(map(int, mesh_dim.split(",")))
    mesh = make_mesh(mesh_dim, jax.devices()[:size])
    params = jax.device_put(tiny_params(), shardings(mesh, PARTITION_RULES, tiny_params()))
    return Prompter(Codec(tiny_vqgan(directory)), CONFIG, params, mesh)


def tiny_checkpoint(directory: pathlib.Path) -> dict[str, str]:
    """Writes the tokenizer, the model and its settings. Returns the flags that name them."""
    with open(directory / "model.json", "w") as file:
        json.dump(dataclasses.asdict(CONFIG), file)
    with open(directory / "params", "wb") as file:
        for key, leaf, layer in stacking.file_order(tiny_params()):
            streaming.write_entry(file, key[1:], np.asarray(leaf.array if layer is None else leaf.array[layer]))
    return {
        "checkpoint": f"params::{directory}/params",
        "load_llama_config": f"json::{directory}/model.json",
        "vqgan": tiny_vqgan(directory / "vqgan"),
    }
