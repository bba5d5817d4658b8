"""Sizes and costs that follow from a LLaMA's settings."""

from EasyLM.models.llama.llama_config import LLaMAConfig


def num_matmul_parameters(config: LLaMAConfig) -> int:
    """Number of parameters that multiply every token: all but the norms and the embedding, which is a gather."""
    c = config
    block = 4 * c.hidden_size**2 + 3 * c.hidden_size * c.intermediate_size
    return c.num_hidden_layers * block + c.hidden_size * c.vocab_size


def num_parameters(config: LLaMAConfig) -> int:
    """Number of trained parameters."""
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    return num_matmul_parameters(config) + embedding + norms


def flops_per_token(config: LLaMAConfig, seq_length: int) -> int:
    """Model FLOPs of training on one token of a sequence: 6 N + 6 L T D.

    N is the number of parameters that multiply each token: 2 FLOPs forward, 4 backward. Attention scores and their
    weighted sum take 4 T D per layer forward over all T keys (D the hidden size). Causal attention needs half of that,
    and the backward pass twice as much again: 3 * 2 T D. Rematerialisation is not counted.
    """
    attention = 6 * config.num_hidden_layers * seq_length * config.hidden_size
    return 6 * num_matmul_parameters(config) + attention
