"""The loss equals its definition, however it is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from EasyLM.models.losses import chunked_cross_entropy_and_accuracy, cross_entropy_and_accuracy

B, T, D, V = 3, 10, 8, 20


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    hidden_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
    head_DV = rng.normal(size=(D, V)).astype(np.float32)
    targets_BT = rng.integers(0, V, (B, T))
    masks_BT = (rng.random((B, T)) < 0.6).astype(np.float32)
    masks_BT[1] = 0  # a row without a valid token
    return hidden_BTD, head_DV, targets_BT, masks_BT


def definition(logits_BTV, targets_BT, masks_BT):
    """In float64, a row at a time."""
    losses, accuracies = [], []
    for logits_TV, targets_T, masks_T in zip(logits_BTV.astype(np.float64), targets_BT, masks_BT, strict=True):
        log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        count = max(masks_T.sum(), 1e-10)
        losses.append(-(log_p_TV[np.arange(T), targets_T] * masks_T).sum() / count)
        accuracies.append(((logits_TV.argmax(-1) == targets_T) * masks_T).sum() / count)
    return np.mean(losses), np.mean(accuracies)


def test_rows_have_equal_weight_and_masked_tokens_none(batch):
    hidden_BTD, head_DV, targets_BT, masks_BT = batch
    measure = jax.jit(cross_entropy_and_accuracy)
    actual = measure(hidden_BTD @ head_DV, targets_BT, masks_BT)
    np.testing.assert_allclose(actual, definition(hidden_BTD @ head_DV, targets_BT, masks_BT), rtol=1e-6)
    actual = measure(hidden_BTD @ head_DV, targets_BT)
    np.testing.assert_allclose(actual, definition(hidden_BTD @ head_DV, targets_BT, np.ones((B, T))), rtol=1e-6)


def test_half_precision_logits_are_summed_in_float32(batch):
    logits_BTV = jnp.asarray(batch[0] @ batch[1], jnp.bfloat16)
    loss, accuracy = cross_entropy_and_accuracy(logits_BTV, *batch[2:])
    expected = cross_entropy_and_accuracy(logits_BTV.astype(jnp.float32), *batch[2:])
    assert (loss.dtype, loss, accuracy) == (jnp.float32, *expected)


@pytest.mark.slow
@pytest.mark.parametrize("chunk, parts", [(3, 1), (10, 1), (6, 2)])
def test_chunked_loss_and_gradients_equal_the_whole(batch, chunk, parts):
    hidden_BTD, head_DV, targets_BT, masks_BT = batch

    def whole(hidden_BTD, head_DV):
        return cross_entropy_and_accuracy(hidden_BTD @ head_DV, targets_BT, masks_BT)

    def chunked(hidden_BTD, head_DV):
        return chunked_cross_entropy_and_accuracy(
            jnp.matmul, hidden_BTD, head_DV, targets_BT, masks_BT, chunk, parts=parts
        )

    np.testing.assert_allclose(chunked(hidden_BTD, head_DV), whole(hidden_BTD, head_DV), rtol=1e-6)

    def gradients(figures):  # of twice the loss: the incoming gradient counts
        return jax.grad(lambda *x: 2 * figures(*x)[0], argnums=(0, 1))(hidden_BTD, head_DV)

    for actual, expected in zip(gradients(chunked), gradients(whole), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


def test_chunked_loss_never_holds_all_logits(batch):
    hidden_BTD, head_DV, targets_BT, masks_BT = batch

    def loss(hidden_BTD, head_DV):
        return chunked_cross_entropy_and_accuracy(jnp.matmul, hidden_BTD, head_DV, targets_BT, masks_BT, 2)[0]

    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden_BTD, head_DV))
    assert f"f32[{B},2,{V}]" in text
    assert f"f32[{B},{T},{V}]" not in text and f"f32[{T // 2},{B},2,{V}]" not in text


@pytest.mark.slow
def test_z_loss_is_that_of_palm(batch):
    """The mean of log^2 Z over the same tokens as the cross-entropy (arXiv 2204.02311, section 5)."""
    hidden_BTD, head_DV, targets_BT, masks_BT = batch
    logits_BTV = hidden_BTD @ head_DV
    plain, accuracy = definition(logits_BTV, targets_BT, masks_BT)
    log_z_BT = np.log(np.exp(logits_BTV.astype(np.float64)).sum(-1))
    z_loss = np.mean((log_z_BT**2 * masks_BT).sum(1) / np.maximum(masks_BT.sum(1), 1e-10))
    actual = cross_entropy_and_accuracy(jnp.asarray(logits_BTV), targets_BT, masks_BT, 0.01)
    np.testing.assert_allclose(actual, (plain + 0.01 * z_loss, accuracy, z_loss), rtol=1e-6)

    def chunked(hidden_BTD):
        return chunked_cross_entropy_and_accuracy(jnp.matmul, hidden_BTD, head_DV, targets_BT, masks_BT, 3, 0.01)

    def whole(hidden_BTD):
        return cross_entropy_and_accuracy(hidden_BTD @ head_DV, targets_BT, masks_BT, 0.01)

    np.testing.assert_allclose(chunked(hidden_BTD), actual, rtol=1e-6)
    gradients = [jax.grad(lambda x, loss=loss: loss(x)[0])(hidden_BTD) for loss in (chunked, whole)]
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-7)
