"""Splits arrays along time into C chunks of t tokens, for iteration with `lax.scan` and `lax.map`."""

import jax
import jax.numpy as jnp
from einops import rearrange


def split_time(x_BT: jax.Array, chunk: int, parts: int = 1) -> jax.Array:
    """Splits [B, T, ...] into [C, B, t, ...]. The last chunk is padded with zeros.

    Args:
      chunk: t.
      parts: into how many parts devices split T. A chunk has t / parts tokens of each, so that all devices work on it.
        It divides T and t.
    """
    x_BpT = rearrange(x_BT, "B (p T) ... -> B p T ...", p=parts)
    padding = ((0, 0), (0, 0), (0, -x_BpT.shape[2] % (chunk // parts))) + ((0, 0),) * (x_BpT.ndim - 3)
    return rearrange(jnp.pad(x_BpT, padding), "B p (C t) ... -> C B (p t) ...", t=chunk // parts)


def join_time(x_CBt: jax.Array, length: int, parts: int = 1) -> jax.Array:
    """Joins [C, B, t, ...] to [B, length, ...]. This is the inverse of `split_time`."""
    x_BpT = rearrange(x_CBt, "C B (p t) ... -> B p (C t) ...", p=parts)
    return rearrange(x_BpT[:, :, : length // parts], "B p T ... -> B (p T) ...")
