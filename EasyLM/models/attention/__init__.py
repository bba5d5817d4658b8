"""Causal self-attention: one function, `attention`, with three implementations of the same numbers.

May import `EasyLM.models`.

Shapes: B batch, T queries, S keys (S = T), H heads, K head dimension. In blocks: t queries and s keys of a block, i and
j number the blocks of queries and of keys.

Modules:
  mask: which keys a query attends to, and dropout on the weights.
  dispatch: `attention`, which selects the implementation.
  xla: all T x S weights at once.
  blockwise: FlashAttention-2 in plain JAX, with linear memory.
  cudnn: NVIDIA's fused kernel.
"""

from EasyLM.models.attention.dispatch import IMPLEMENTATIONS, attention
from EasyLM.models.attention.mask import MASKED_SCORE, AttentionMask

__all__ = ["IMPLEMENTATIONS", "MASKED_SCORE", "AttentionMask", "attention"]
