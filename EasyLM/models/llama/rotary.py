"""Rotary position embedding (RoPE, arXiv 2104.09864) on interleaved pairs."""

import jax
import jax.numpy as jnp
from einops import rearrange

from EasyLM.models.llama.llama_config import LLaMAConfig


def positions(length: int, attention_mask_BT: jax.Array | None) -> jax.Array:
    """Returns position ids [B or 1, T]: the index of a token among the tokens of its row. Left padding has 0."""
    if attention_mask_BT is None:
        return jnp.arange(length)[None]
    return jnp.clip(jnp.cumsum(attention_mask_BT, axis=-1) - 1, 0)


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
