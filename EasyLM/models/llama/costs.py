"""Parameter counts and FLOPs of a LLaMA, computed from its settings."""

from EasyLM.models.llama.llama_config import LLaMAConfig


def num_matmul_parameters(config: LLaMAConfig) -> int:
    """Number of parameters in matrix products: all except the norms and the embedding, which is a gather."""
    c = config
    attention = 2 * c.hidden_size**2 + 2 * c.hidden_size * c.kv_heads * c.head_dim
    block = attention + 3 * c.hidden_size * c.intermediate_size
    return c.num_hidden_layers * block + c.hidden_size * c.vocab_size


def num_parameters(config: LLaMAConfig) -> int:
    """Number of parameters, without those of adapters."""
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    norms += 2 * config.num_hidden_layers * config.head_dim * config.qk_norm
    return num_matmul_parameters(config) + embedding + norms


def flops_per_token(config: LLaMAConfig, seq_length: int, frozen: bool = False) -> int:
    """Model FLOPs to train on one token of a sequence: 6 N + 6 L T D.

    N is the number of parameters in matrix products. Each costs 2 FLOPs in the forward pass and 4 in the backward pass.
    L is the number of layers, T the sequence length and D the hidden size. In the forward pass, attention scores and
    the weighted sum of values cost 4 T D per layer over all T keys. Causal attention needs half of these FLOPs, 2 T D.
    The backward pass costs twice as much as the forward pass, so a layer costs 6 T D. Recomputation is not counted.

    Args:
      frozen: no gradients of the N parameters are computed, which saves 2 N. Adapters are not counted.
    """
    attention = 6 * config.num_hidden_layers * seq_length * config.hidden_size
    return (4 if frozen else 6) * num_matmul_parameters(config) + attention
