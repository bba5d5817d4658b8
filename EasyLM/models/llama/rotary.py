"""Rotary position embedding (RoPE, arXiv 2104.09864) on interleaved pairs."""

import jax
import jax.numpy as jnp
from einops import rearrange

from EasyLM.models.llama.llama_config import LLaMAConfig


def positions(length: int, attention_mask_BT: jax.Array | None, first_BT: jax.Array | None = None) -> jax.Array:
    """Returns position ids [B or 1, T]: the index of a token among the tokens of its row. Left padding has 0.

    Args:
      first_BT: the first token of each token's document. Positions restart there. Such rows have no padding.
    """
    assert attention_mask_BT is None or first_BT is None, "rows of several documents have no padding"
    if attention_mask_BT is None:
        return jnp.arange(length)[None] - (0 if first_BT is None else first_BT)
    return jnp.clip(jnp.cumsum(attention_mask_BT, axis=-1) - 1, 0)


def first_tokens(segment_ids_BT: jax.Array) -> jax.Array:
    """Returns the index of the first token of each token's document, int32 [B, T]."""
    is_first_BT = jnp.diff(segment_ids_BT, axis=1, prepend=segment_ids_BT[:, :1]) != 0
    index_BT = jnp.where(is_first_BT, jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)[None], 0)
    return jax.lax.cummax(index_BT, axis=1)


def rotary_table(config: LLaMAConfig, position_ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines [B, T, K/2] of the angles in float32. bf16 represents only 524 integers below 4096."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    periods_k = config.rope_theta**exponents
    if config.rope_scaling is not None:
        periods_k = 1 / config.rope_scaling.scaled(1 / periods_k)
    angles_BTk = position_ids_BT[..., None].astype(jnp.float32) / periods_k[None, None, :]
    return jnp.cos(angles_BTk), jnp.sin(angles_BTk)


def rotate(x_BTHK: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each interleaved pair (2i, 2i+1) of a head by its angle."""
    cos, sin = (table_BTk[:, :, None, :] for table_BTk in rope)
    pairs = rearrange(x_BTHK.astype(jnp.float32), "... (k pair) -> ... k pair", pair=2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return rearrange(rotated, "... k pair -> ... (k pair)").astype(x_BTHK.dtype)
