"""Cross-entropy and accuracy of next-token prediction, in float32.

Shapes: B batch, T tokens of a row, V vocabulary, D hidden size, C chunks of a row, t tokens of a chunk.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp


def cross_entropy_and_accuracy(
    logits_BTV: jax.Array, targets_BT: jax.Array, masks_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Mean negative log-likelihood in nats, and the share of targets that are the largest logit.

    Each row's mean is over its valid tokens (mask > 0); the result is the mean over rows: each weighs the same.
    """
    return _weighted_figures(logits_BTV, targets_BT, _weights(targets_BT, masks_BT))


def chunked_cross_entropy_and_accuracy(
    logits_of: Callable,
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    masks_BT: jax.Array | None,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """The same from hidden states, `chunk` tokens of each row at a time: the logits of all never exist.

    Their gradients are made in the forward pass, so nothing is computed twice; only the loss can be differentiated.

    Args:
      logits_of: (hidden_BtD, head_DV) -> logits_BtV; captures no arrays.
    """
    batch, length = targets_BT.shape

    def chunks(x_BT):
        x_BT = jnp.pad(x_BT, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x_BT.ndim - 2))  # with weights of 0
        return x_BT.reshape(batch, -1, chunk, *x_BT.shape[2:]).swapaxes(0, 1)

    others = chunks(targets_BT), chunks(_weights(targets_BT, masks_BT))
    return _chunked(logits_of, chunks(hidden_BTD), head_DV, *others)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(logits_of, hidden_CBtD, head_DV, targets_CBt, weights_CBt):
    def add(sums, chunk):
        hidden_BtD, targets_Bt, weights_Bt = chunk
        figures = _weighted_figures(logits_of(hidden_BtD, head_DV), targets_Bt, weights_Bt)
        return jax.tree.map(jnp.add, sums, figures), None

    return jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(())), (hidden_CBtD, targets_CBt, weights_CBt))[0]


def _chunked_forward(logits_of, hidden_CBtD, head_DV, targets_CBt, weights_CBt):
    def add(sums, chunk):
        hidden_BtD, targets_Bt, weights_Bt = chunk

        def figures_of(hidden_BtD, head_DV):
            return _weighted_figures(logits_of(hidden_BtD, head_DV), targets_Bt, weights_Bt)

        figures, (dhidden_BtD, dhead_DV) = jax.value_and_grad(figures_of, (0, 1), has_aux=True)(hidden_BtD, head_DV)
        return jax.tree.map(jnp.add, sums, (*figures, dhead_DV.astype(jnp.float32))), dhidden_BtD

    start = jnp.zeros(()), jnp.zeros(()), jnp.zeros(head_DV.shape)
    (loss, accuracy, dhead_DV), dhidden_CBtD = jax.lax.scan(add, start, (hidden_CBtD, targets_CBt, weights_CBt))
    return (loss, accuracy), (dhidden_CBtD, dhead_DV.astype(head_DV.dtype))


def _chunked_backward(logits_of, gradients, dfigures):
    return *(gradient * dfigures[0].astype(gradient.dtype) for gradient in gradients), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _weights(targets_BT, masks_BT):
    """What each token adds to the mean over rows of the mean over a row's valid tokens."""
    valid_BT = jnp.ones(targets_BT.shape) if masks_BT is None else (masks_BT > 0).astype(jnp.float32)
    return valid_BT / jnp.maximum(valid_BT.sum(-1, keepdims=True), 1e-10) / targets_BT.shape[0]


def _weighted_figures(logits_BTV, targets_BT, weights_BT):
    logits_BTV = logits_BTV.astype(jnp.float32)
    hit_BTV = jnp.arange(logits_BTV.shape[-1])[None, None] == targets_BT[..., None]
    # A sum under a mask instead of a gather: it stays elementwise where the vocabulary is split over devices.
    target_logit_BT = jnp.where(hit_BTV, logits_BTV, 0).sum(-1)
    nll_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - target_logit_BT
    correct_BT = logits_BTV.argmax(-1) == targets_BT
    return (nll_BT * weights_BT).sum(), (correct_BT * weights_BT).sum()
