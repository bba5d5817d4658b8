"""A tiny LLaMA: the model of tests/golden/lvm_tiny."""

import dataclasses

from EasyLM.models.llama import llama_config

TINY = llama_config.updated(
    llama_config.load_config("vqlm_debug"), "dict(vocab_size=512,hidden_size=64,intermediate_size=128)"
)


def changed(**settings) -> llama_config.LLaMAConfig:
    return dataclasses.replace(TINY, **settings)
