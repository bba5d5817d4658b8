"""Splits arrays along time into C chunks of t tokens, for iteration with `lax.scan` and `lax.map`."""

import jax
import jax.numpy as jnp
from einops import rearrange


def split_time(x_BT: jax.Array, chunk: int) -> jax.Array:
    """Splits [B, T, ...] into [C, B, t, ...]. The last chunk is padded with zeros."""
    padding = ((0, 0), (0, -x_BT.shape[1] % chunk)) + ((0, 0),) * (x_BT.ndim - 2)
    return rearrange(jnp.pad(x_BT, padding), "B (C t) ... -> C B t ...", t=chunk)


def join_time(x_CBt: jax.Array, length: int) -> jax.Array:
    """Joins [C, B, t, ...] to [B, length, ...]. This is the inverse of `split_time`."""
    return rearrange(x_CBt, "C B t ... -> B (C t) ...")[:, :length]
