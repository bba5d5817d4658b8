"""The attention mask and dropout on the weights, as functions of indices. They do not depend on the chunk sizes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

MASKED_SCORE = -1e30  # finite, because -inf minus -inf is NaN


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("valid_BS", "forget_key", "dropout_key", "first_BT"),
    meta_fields=("forget_ratios", "dropout_rate"),
)
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Restrictions on the keys that each query attends to, beyond the causal rule, and dropout on the weights.

    A query always attends to its own key, so every query has at least one key.

    Attributes:
      valid_BS: 1 for a token, 0 for padding. None means no padding.
      forget_key: PRNG key of the forgetful causal mask (FCM, arXiv 2210.13432), or None. Each query drops a random
        share of its past keys. The share is uniform between the two `forget_ratios`. The first key is never dropped.
      dropout_key: PRNG key of dropout on the attention weights, or None. `dropout_rate` is the rate.
      first_BT: the first token of each token's document, or None: a row is one document. A query attends to keys of
        its own document only.
    """

    valid_BS: jax.Array | None = None  # noqa: N815
    forget_key: jax.Array | None = None
    forget_ratios: tuple[float, float] = (0.0, 0.0)
    dropout_key: jax.Array | None = None
    dropout_rate: float = 0.0
    first_BT: jax.Array | None = None  # noqa: N815

    def with_dropout(self, key: jax.Array | None, rate: float) -> "AttentionMask":
        """Returns the mask with dropout. Returns the mask unchanged if there is no key or the rate is 0."""
        return self if key is None or rate == 0 else dataclasses.replace(self, dropout_key=key, dropout_rate=rate)

    def allowed(self, batch: int, t_T: jax.Array, s_S: jax.Array) -> jax.Array:
        """Returns whether queries at positions `t_T` attend to keys at positions `s_S`, as bool [B or 1, T, S]."""
        t, s = t_T[None, :, None], s_S[None, None, :]
        past, first = s < t, jnp.zeros((1, 1, 1), jnp.int32)
        if self.first_BT is not None:
            first = jnp.take(self.first_BT, t_T, axis=1, mode="clip")[:, :, None]
            past &= s >= first
        if self.valid_BS is not None:
            past &= jnp.take(self.valid_BS, s_S, axis=1, mode="clip")[:, None, :] != 0
        if self.forget_key is not None:
            low, high = self.forget_ratios
            b = jnp.arange(batch)[:, None, None]
            ratio_BT1 = low + (high - low) * _uniform(jax.random.fold_in(self.forget_key, 0), b, t)
            past &= (_uniform(jax.random.fold_in(self.forget_key, 1), b, t, s) >= ratio_BT1) | (s == first)
        return past | (s == t)

    def dropout_factor(self, batch: int, heads: int, t_T: jax.Array, s_S: jax.Array) -> jax.Array | None:
        """Returns the dropout factor of each weight, 0 or 1 / (1 - rate): [B, H, T, S]. None without dropout.

        `t_T` numbers the queries of a head. With grouped queries a token has several.
        """
        if self.dropout_key is None:
            return None
        b, h = jnp.arange(batch)[:, None, None, None], jnp.arange(heads)[None, :, None, None]
        u_BHTS = _uniform(self.dropout_key, b, h, t_T[None, None, :, None], s_S[None, None, None, :])
        return (u_BHTS >= self.dropout_rate) / (1 - self.dropout_rate)


def _uniform(key: jax.Array, *indices: jax.Array) -> jax.Array:
    """Returns uniform float32 values in [0, 1) as a function of the key and the indices, which are broadcast.

    The values are recomputed when needed and never stored. A 32-bit hash with low bias mixes in each index
    (Wellons, "Prospecting for hash functions", 2018).
    """
    x = jax.random.bits(key, (), jnp.uint32)
    x = jnp.reshape(x, (1,) * indices[0].ndim)
    for index in indices:
        x = x + index.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return (x >> 8).astype(jnp.float32) * 2.0**-24
