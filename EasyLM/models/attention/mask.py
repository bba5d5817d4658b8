"""Which keys a query attends to, and dropout on the weights, as functions of indices: the same for every chunking."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

MASKED_SCORE = -1e30  # finite, because differences of -inf are NaN


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("valid_BS", "forget_key", "dropout_key"),
    meta_fields=("forget_ratios", "dropout_rate"),
)
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """The keys that each query attends to, in addition to the causal rule, and dropout on the weights.

    A query always attends to its own key, so no row is empty.

    Attributes:
      valid_BS: 1 for a token, 0 for padding; None: no padding.
      forget_key: PRNG key of the forgetful causal mask (FCM, arXiv 2210.13432), or None. Each query drops a random
        share of its past keys, uniform between the two `forget_ratios`. Key 0 is never dropped.
      dropout_key: PRNG key of the dropout with `dropout_rate` on the attention weights, or None.
    """

    valid_BS: jax.Array | None = None  # noqa: N815
    forget_key: jax.Array | None = None
    forget_ratios: tuple[float, float] = (0.0, 0.0)
    dropout_key: jax.Array | None = None
    dropout_rate: float = 0.0

    def with_dropout(self, key: jax.Array | None, rate: float) -> "AttentionMask":
        """Returns the mask with dropout added; the same mask if there is no key or the rate is 0."""
        return self if key is None or rate == 0 else dataclasses.replace(self, dropout_key=key, dropout_rate=rate)

    def allowed(self, batch: int, t_T: jax.Array, s_S: jax.Array) -> jax.Array:
        """Whether queries at positions `t_T` attend to keys at positions `s_S`: bool [B or 1, T, S]."""
        t, s = t_T[None, :, None], s_S[None, None, :]
        past = s < t
        if self.valid_BS is not None:
            past &= jnp.take(self.valid_BS, s_S, axis=1, mode="clip")[:, None, :] != 0
        if self.forget_key is not None:
            low, high = self.forget_ratios
            b = jnp.arange(batch)[:, None, None]
            ratio_BT1 = low + (high - low) * _uniform(jax.random.fold_in(self.forget_key, 0), b, t)
            past &= (_uniform(jax.random.fold_in(self.forget_key, 1), b, t, s) >= ratio_BT1) | (s == 0)
        return past | (s == t)

    def dropout_factor(self, batch: int, heads: int, t_T: jax.Array, s_S: jax.Array) -> jax.Array | None:
        """The factor of each weight under dropout, 0 or 1 / (1 - rate): [B, H, T, S]. None without dropout."""
        if self.dropout_key is None:
            return None
        b, h = jnp.arange(batch)[:, None, None, None], jnp.arange(heads)[None, :, None, None]
        u_BHTS = _uniform(self.dropout_key, b, h, t_T[None, None, :, None], s_S[None, None, None, :])
        return (u_BHTS >= self.dropout_rate) / (1 - self.dropout_rate)


def _uniform(key: jax.Array, *indices: jax.Array) -> jax.Array:
    """Uniform float32 in [0, 1), a function of the key and the (broadcast) indices: recomputed, never stored.

    Each index is mixed in by a 32-bit hash with low bias (Wellons, "Prospecting for hash functions", 2018).
    """
    x = jax.random.bits(key, (), jnp.uint32)
    x = jnp.reshape(x, (1,) * indices[0].ndim)
    for index in indices:
        x = x + index.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return (x >> 8).astype(jnp.float32) * 2.0**-24
