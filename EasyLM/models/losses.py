"""Cross-entropy, z-loss and accuracy of next-token prediction, in float32.

`EasyLM.models` defines the letters of shapes.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from EasyLM.models.chunks import split_time


def cross_entropy_and_accuracy(
    logits_BTV: jax.Array, targets_BT: jax.Array, masks_BT: jax.Array | None = None, z_weight: float = 0.0
) -> tuple[jax.Array, ...]:
    """Returns (mean negative log-likelihood in nats, accuracy). A target is correct if it has the largest logit.

    These are means over the valid tokens (mask > 0) of each row, then means over rows with equal weights.

    Args:
      z_weight: weight of the z-loss (PaLM, arXiv 2204.02311). If it is not 0, the first result includes the weighted
        z-loss, and the mean of log^2 Z, the z-loss itself, is a third result. Z is the softmax denominator.
    """
    return _weighted_sums(logits_BTV, targets_BT, _weights(targets_BT, masks_BT), z_weight)


def chunked_cross_entropy_and_accuracy(
    logits_of: Callable[[jax.Array, jax.Array], jax.Array],
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    masks_BT: jax.Array | None,
    chunk: int,
    z_weight: float = 0.0,
    parts: int = 1,
) -> tuple[jax.Array, ...]:
    """Computes `cross_entropy_and_accuracy` from hidden states. Holds logits of only `chunk` tokens per row in memory.

    The forward pass also computes the gradients, which avoids recomputation. Only the loss is differentiable.

    Args:
      logits_of: a function (hidden_BtD, head_DV) -> logits_BtV. It must not capture arrays.
      parts: into how many parts devices split T; see `split_time`.
    """
    arrays = hidden_BTD, targets_BT, _weights(targets_BT, masks_BT)  # the weights of padded tokens are 0
    hidden_CBtD, targets_CBt, weights_CBt = (split_time(x_BT, chunk, parts) for x_BT in arrays)
    return _chunked(logits_of, z_weight, hidden_CBtD, head_DV, targets_CBt, weights_CBt)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(logits_of, z_weight, hidden_CBtD, head_DV, targets_CBt, weights_CBt):
    def add(sums, chunk):
        hidden_BtD, targets_Bt, weights_Bt = chunk
        added = _weighted_sums(logits_of(hidden_BtD, head_DV), targets_Bt, weights_Bt, z_weight)
        return jax.tree.map(jnp.add, sums, added), None

    return jax.lax.scan(add, _zero_sums(z_weight), (hidden_CBtD, targets_CBt, weights_CBt))[0]


def _chunked_forward(logits_of, z_weight, hidden_CBtD, head_DV, targets_CBt, weights_CBt):
    def add(sums, chunk):
        hidden_BtD, targets_Bt, weights_Bt = chunk

        def chunk_sums(hidden_BtD, head_DV):
            loss, *others = _weighted_sums(logits_of(hidden_BtD, head_DV), targets_Bt, weights_Bt, z_weight)
            return loss, others

        (loss, others), (dhidden_BtD, dhead_DV) = jax.value_and_grad(chunk_sums, (0, 1), has_aux=True)(
            hidden_BtD, head_DV
        )
        return jax.tree.map(jnp.add, sums, (loss, *others, dhead_DV.astype(jnp.float32))), dhidden_BtD

    start = *_zero_sums(z_weight), jnp.zeros(head_DV.shape)
    (*sums, dhead_DV), dhidden_CBtD = jax.lax.scan(add, start, (hidden_CBtD, targets_CBt, weights_CBt))
    return tuple(sums), (dhidden_CBtD, dhead_DV.astype(head_DV.dtype))


def _chunked_backward(logits_of, z_weight, gradients, dsums):
    return *(gradient * dsums[0].astype(gradient.dtype) for gradient in gradients), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _weights(targets_BT, masks_BT):
    """Returns token weights. The weighted sum is the mean over rows of the mean over each row's valid tokens."""
    valid_BT = jnp.ones(targets_BT.shape) if masks_BT is None else (masks_BT > 0).astype(jnp.float32)
    return valid_BT / jnp.maximum(valid_BT.sum(-1, keepdims=True), 1e-10) / targets_BT.shape[0]


def _zero_sums(z_weight):
    return (jnp.zeros(()),) * (3 if z_weight else 2)


def _weighted_sums(logits_BTV, targets_BT, weights_BT, z_weight):
    """Returns the weighted sums of losses and of correct predictions; with a `z_weight` also that of z-losses."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    hit_BTV = jnp.arange(logits_BTV.shape[-1])[None, None] == targets_BT[..., None]
    # A masked sum replaces a gather, because the mask is elementwise even if the vocabulary is split over devices.
    target_logit_BT = jnp.where(hit_BTV, logits_BTV, 0).sum(-1)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    nll_BT = log_z_BT - target_logit_BT
    correct_BT = logits_BTV.argmax(-1) == targets_BT
    sums = (nll_BT * weights_BT).sum(), (correct_BT * weights_BT).sum()
    if not z_weight:
        return sums
    z_loss = (jnp.square(log_z_BT) * weights_BT).sum()
    return sums[0] + z_weight * z_loss, sums[1], z_loss
