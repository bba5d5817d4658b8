"""What the tests of prompting share: a tiny tokenizer and a tiny model on disk, which is sure of its answers."""

import functools
import json
import math

import jax
import numpy as np
from tokenizer_kit import TINY, tiny_vqgan

from EasyLM.checkpoints import stacking, streaming
from EasyLM.models.llama import llama_model
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.parallel import make_mesh, shardings
from evaluation.prompting.prompter import Prompter
from tokenizer.vqgan import Codec

MODEL = {
    "vocab_size": 40,  # a few more than the tokenizer has codes
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,  # compiling takes most of the tests' time
    "num_attention_heads": 4,
    "max_sequence_length": 6 * TINY.tokens_per_image,
}
CONFIG = LLaMAConfig(**MODEL)


@functools.cache
def tiny_params():
    params = jax.jit(llama_model.init_params, static_argnums=0)(CONFIG, jax.random.key(1))
    scales = {1: 1, 2: 10, 3: 5}  # as it is, all tokens are about as likely
    return jax.tree.map(lambda x: scales[x.ndim] * x, params)


def tiny_logits(row_T: np.ndarray) -> np.ndarray:
    """Logits [T, V] of the full forward, without a cache."""
    padded_BT = np.zeros((1, CONFIG.max_sequence_length), np.int32)  # what comes later changes nothing before
    padded_BT[0, : len(row_T)] = row_T
    return np.asarray(_logits(padded_BT))[0, : len(row_T)]


@jax.jit
def _logits(tokens_BT):
    return llama_model.apply(CONFIG, tiny_params(), tokens_BT)


def tiny_prompter(directory, mesh_dim: str = "1,1,1") -> Prompter:
    """In memory, on as many devices as the mesh has, its tokenizer from a folder that is written."""
    size = math.prod(map(int, mesh_dim.split(",")))
    mesh = make_mesh(mesh_dim, jax.devices()[:size])
    places = shardings(mesh, PARTITION_RULES, tiny_params())
    return Prompter(Codec(tiny_vqgan(directory)), CONFIG, jax.device_put(tiny_params(), places), mesh)


def tiny_checkpoint(directory) -> dict[str, str]:
    """Writes tokenizer, model and its settings; returns the flags that name them."""
    with open(directory / "model.json", "w") as file:
        json.dump(MODEL, file)
    with open(directory / "params", "wb") as file:
        for key, leaf, layer in stacking.file_order(tiny_params()):
            streaming.write_entry(file, key[1:], np.asarray(leaf.array if layer is None else leaf.array[layer]))
    return {
        "checkpoint": f"params::{directory}/params",
        "load_llama_config": f"json::{directory}/model.json",
        "vqgan": tiny_vqgan(directory / "vqgan"),
    }
