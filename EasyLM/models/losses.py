"""Cross-entropy and accuracy of next-token prediction, in float32.

`EasyLM.models` defines the letters of shapes.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from EasyLM.models.chunks import split_time


def cross_entropy_and_accuracy(
    logits_BTV: jax.Array, targets_BT: jax.Array, masks_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns (mean negative log-likelihood in nats, accuracy). A target is correct if it has the largest logit.

    Both are means over the valid tokens (mask > 0) of each row, then means over rows with equal weights.
    """
    return _weighted_sums(logits_BTV, targets_BT, _weights(targets_BT, masks_BT))


def chunked_cross_entropy_and_accuracy(
    logits_of: Callable[[jax.Array, jax.Array], jax.Array],
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    masks_BT: jax.Array | None,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Computes `cross_entropy_and_accuracy` from hidden states. Holds logits of only `chunk` tokens per row in memory.

    The forward pass also computes the gradients, which avoids recomputation. Only the loss is differentiable.

    Args:
      logits_of: a function (hidden_BtD, head_DV) -> logits_BtV. It must not capture arrays.
    """
    arrays = hidden_BTD, targets_BT, _weights(targets_BT, masks_BT)  # the weights of padded tokens are 0
    hidden_CBtD, targets_CBt, weights_CBt = (split_time(x_BT, chunk) for x_BT in arrays)
    return _chunked(logits_of, hidden_CBtD, head_DV, targets_CBt, weights_CBt)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(logits_of, hidden_CBtD, head_DV, targets_CBt, weights_CBt):
    def add(sums, chunk):
        hidden_BtD, targets_Bt, weights_Bt = chunk
        added = _weighted_sums(logits_of(hidden_BtD, head_DV), targets_Bt, weights_Bt)
        return jax.tree.map(jnp.add, sums, added), None

    return jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(())), (hidden_CBtD, targets_CBt, weights_CBt))[0]


def _chunked_forward(logits_of, hidden_CBtD, head_DV, targets_CBt, weights_CBt):
    def add(sums, chunk):
        hidden_BtD, targets_Bt, weights_Bt = chunk

        def chunk_sums(hidden_BtD, head_DV):
            return _weighted_sums(logits_of(hidden_BtD, head_DV), targets_Bt, weights_Bt)

        added, (dhidden_BtD, dhead_DV) = jax.value_and_grad(chunk_sums, (0, 1), has_aux=True)(hidden_BtD, head_DV)
        return jax.tree.map(jnp.add, sums, (*added, dhead_DV.astype(jnp.float32))), dhidden_BtD

    start = jnp.zeros(()), jnp.zeros(()), jnp.zeros(head_DV.shape)
    (loss, accuracy, dhead_DV), dhidden_CBtD = jax.lax.scan(add, start, (hidden_CBtD, targets_CBt, weights_CBt))
    return (loss, accuracy), (dhidden_CBtD, dhead_DV.astype(head_DV.dtype))


def _chunked_backward(logits_of, gradients, dsums):
    return *(gradient * dsums[0].astype(gradient.dtype) for gradient in gradients), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _weights(targets_BT, masks_BT):
    """Returns token weights. The weighted sum is the mean over rows of the mean over each row's valid tokens."""
    valid_BT = jnp.ones(targets_BT.shape) if masks_BT is None else (masks_BT > 0).astype(jnp.float32)
    return valid_BT / jnp.maximum(valid_BT.sum(-1, keepdims=True), 1e-10) / targets_BT.shape[0]


def _weighted_sums(logits_BTV, targets_BT, weights_BT):
    """Returns the weighted sums of negative log-likelihoods and of correct predictions."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    hit_BTV = jnp.arange(logits_BTV.shape[-1])[None, None] == targets_BT[..., None]
    # A masked sum replaces a gather, because the mask is elementwise even if the vocabulary is split over devices.
    target_logit_BT = jnp.where(hit_BTV, logits_BTV, 0).sum(-1)
    nll_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - target_logit_BT
    correct_BT = logits_BTV.argmax(-1) == targets_BT
    return (nll_BT * weights_BT).sum(), (correct_BT * weights_BT).sum()
