"""Causal self-attention: one function, `attention`, with four equivalent implementations.

May import `EasyLM.models` and `EasyLM.parallel`.

Shapes: B batch, T queries, S keys, H heads, G heads of keys and values, R = H / G heads of queries in a group, K head
dimension. In chunks: t queries and s keys of a chunk; i and j index the chunks of queries and of keys.

Modules:
  mask: selects the keys that a query attends to; dropout on the weights.
  dispatch: `attention`, which selects the implementation.
  sequence_split: the exchange of tokens and heads between devices that have parts of a row.
  xla: attention with all T x S weights in memory.
  blockwise: FlashAttention-2 in plain JAX. Memory is linear in the length.
  cudnn: the fused kernel of cuDNN.
  splash: the splash kernel of Pallas, for TPUs.
"""

from EasyLM.models.attention.dispatch import IMPLEMENTATIONS, attention
from EasyLM.models.attention.mask import MASKED_SCORE, AttentionMask

__all__ = ["IMPLEMENTATIONS", "MASKED_SCORE", "AttentionMask", "attention"]
