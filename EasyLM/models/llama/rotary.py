"""Rotary position embedding (RoPE, arXiv 2104.09864) on interleaved pairs."""

import jax
import jax.numpy as jnp
import numpy as np
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


def rotate(x_BTHK: jax.Array, rope: tuple[jax.Array, jax.Array], platform: str | None = None) -> jax.Array:
    """Rotates each interleaved pair (2i, 2i+1) of a head by its angle.

    Args:
      rope: see `rotary_table`.
      platform: of the devices; None: any.
    """
    tables = (table_BTk[:, :, None, :] for table_BTk in rope)
    return (_rotate_by_product if platform == "tpu" else _rotate_pairs)(x_BTHK, *tables)


def _rotate_pairs(x_BTHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    pairs = rearrange(x_BTHK.astype(jnp.float32), "... (k pair) -> ... k pair", pair=2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return rearrange(rotated, "... k pair -> ... (k pair)").astype(x_BTHK.dtype)


def _rotate_by_product(x_BTHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates on TPUs. There an axis of pairs changes the layout of the array, which takes longer than a product.

    Each column of the matrix has one entry, 1 or -1, so the product is exact. XLA estimates 8% fewer cycles for a step
    of 1b on v5p than with pairs, 5% fewer than for halves whose kernels are permuted, and 3% more than for no rotation.
    """
    even = np.arange(0, x_BTHK.shape[-1], 2)
    quarter_turn_KK = np.zeros((x_BTHK.shape[-1],) * 2, np.float32)
    quarter_turn_KK[even + 1, even], quarter_turn_KK[even, even + 1] = -1, 1  # (even, odd) to (-odd, even)
    turned = jnp.einsum("BTHK,KJ->BTHJ", x_BTHK, quarter_turn_KK.astype(x_BTHK.dtype), precision="highest")
    cos, sin = (jnp.repeat(table, 2, axis=-1) for table in (cos, sin))
    return (x_BTHK.astype(jnp.float32) * cos + turned.astype(jnp.float32) * sin).astype(x_BTHK.dtype)
