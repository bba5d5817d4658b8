"""The memory that generation and scoring need on each device, from shapes alone."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from EasyLM.models.generate import INITIAL_SLOTS
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.models.llama.llama_decode import LOGITS_TOKENS
from EasyLM.parallel import BATCH_AXES, axis_size

# A forward pass holds 2 F + 5 D values of each token at a time: F of the feed-forward network, D of the hidden states.
# It is what XLA plans for an H100 (scripts/card_table.json).
_HIDDEN_SIZES = 5


@dataclasses.dataclass(frozen=True)
class Batch:
    """The largest batch of a program.

    Attributes:
      prompts: B, over all devices.
      prompt_tokens: P, of the longest prompt, or of the longest sequence that is scored.
      candidates: C, for each prompt; 0: sequences are scored, nothing is generated.
      new_tokens: N, of a candidate.
    """

    prompts: int
    prompt_tokens: int
    candidates: int = 1
    new_tokens: int = 256


@dataclasses.dataclass(frozen=True)
class InferenceMemory:
    """Bytes on one device.

    Attributes:
      weights: parameters.
      caches: keys and values of the prompts and of the candidates.
      working: the largest temporary arrays.
    """

    weights: int
    caches: int
    working: int

    @property
    def total(self) -> int:
        """Bytes in use at the peak."""
        return self.weights + self.caches + self.working

    def __str__(self) -> str:
        parts = (self.total, self.weights, self.caches, self.working)
        total, weights, caches, working = (f"{part / 1e9:.3g}" for part in parts)
        return f"{total} GB on each device (weights {weights}, caches {caches}, computation {working})"


def inference_memory(config: LLaMAConfig, params: Any, dtype: DTypeLike, mesh: Mesh, batch: Batch) -> InferenceMemory:
    """Returns what a model needs for a batch. The memory of the image tokenizer is not included.

    Args:
      params: the parameters, arrays or `jax.ShapeDtypeStruct`, with shardings.
      dtype: the compute type.
      mesh: the mesh of the parameters.
    """
    leaves = jax.tree.leaves(params)
    weights = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    if batch.candidates and (ways := axis_size(mesh, "fsdp")) > 1:
        weights += weights * ways  # decoding holds a second copy, which is split over mp only
    itemsize, mp = jnp.dtype(dtype).itemsize, axis_size(mesh, "mp")
    rows = -(-batch.prompts // axis_size(mesh, BATCH_AXES))
    prompt_tokens = rows * batch.prompt_tokens
    forward = prompt_tokens * (2 * config.intermediate_size // mp + _HIDDEN_SIZES * config.hidden_size) * itemsize
    if not batch.candidates:
        logits = rows * min(batch.prompt_tokens, LOGITS_TOKENS // batch.prompts + 1) * config.vocab_size * 4
        return InferenceMemory(weights, 0, forward + logits)
    heads = config.kv_heads // mp if config.kv_heads % mp == 0 else config.kv_heads
    token_bytes = 2 * config.num_hidden_layers * heads * config.head_dim * itemsize
    new_tokens = rows * batch.candidates * batch.new_tokens
    if batch.new_tokens > INITIAL_SLOTS:
        new_tokens += new_tokens // 2  # while the cache grows, the one of half the size exists
    # For single candidates, XLA transposes the keys of the prompts before the loop over tokens.
    transposed = prompt_tokens * token_bytes // 2 if batch.candidates == 1 else 0
    return InferenceMemory(weights, (prompt_tokens + new_tokens) * token_bytes, max(forward, transposed))
