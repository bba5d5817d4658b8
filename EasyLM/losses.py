"""Cross-entropy and accuracy of next-token prediction, in float32.

Shapes: B batch, T tokens of a row, V vocabulary, D hidden size, C chunks of a row, t tokens of a chunk.
"""

import jax
import jax.numpy as jnp


def cross_entropy_and_accuracy(
    logits_BTV: jax.Array, targets_BT: jax.Array, masks_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Mean negative log-likelihood in nats, and the share of targets that are the largest logit.

    Each row's mean is over its valid tokens (mask > 0); the result is the mean over rows: each weighs the same.
    """
    nll_BT, correct_BT = _token_figures(logits_BTV, targets_BT)
    weights_BT = row_weights(targets_BT, masks_BT)
    return (nll_BT * weights_BT).sum(), (correct_BT * weights_BT).sum()


def row_weights(targets_BT: jax.Array, masks_BT: jax.Array | None) -> jax.Array:
    """What each token adds to the mean over rows of the mean over a row's valid tokens."""
    valid_BT = jnp.ones(targets_BT.shape) if masks_BT is None else (masks_BT > 0).astype(jnp.float32)
    return valid_BT / jnp.maximum(valid_BT.sum(-1, keepdims=True), 1e-10) / targets_BT.shape[0]


def _token_figures(logits_BTV, targets_BT):
    logits_BTV = logits_BTV.astype(jnp.float32)
    hit_BTV = jnp.arange(logits_BTV.shape[-1])[None, None] == targets_BT[..., None]
    # A sum under a mask instead of a gather: it stays elementwise where the vocabulary is split over devices.
    target_logit_BT = jnp.where(hit_BTV, logits_BTV, 0).sum(-1)
    nll_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - target_logit_BT
    return nll_BT, logits_BTV.argmax(-1) == targets_BT
