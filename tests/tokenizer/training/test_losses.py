"""The loss terms, and the parameters that receive their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenizer.training import Objective
from tokenizer.training.code_losses import commitment_error
from tokenizer.training.losses import gradient_error, paste_rectangles, roll_cells
from tokenizer.vqgan import VQGANConfig

CONFIG = VQGANConfig(resolution=8, hidden_channels=4, channel_mult=(1,), norm_groups=2, num_embeddings=16)


def test_rectangles_of_the_next_image_are_pasted_and_the_mask_excludes_their_neighbours():
    images = np.random.default_rng(0).random((64, 16, 16, 3), np.float32)
    pasted, unchanged = jax.jit(paste_rectangles, static_argnums=1)(images, 4, jax.random.key(0))
    cells = np.asarray(pasted).reshape(64, 4, 4, 4, 4, 3).swapaxes(2, 3)
    own, other = (array.reshape(64, 4, 4, 4, 4, 3).swapaxes(2, 3) for array in (images, np.roll(images, 1, axis=0)))
    is_own, is_other = ((cells == whole).all(axis=(3, 4, 5)) for whole in (own, other))
    assert (is_own ^ is_other).all()
    assert 0.05 < is_other.mean() < 0.5
    around = np.pad(is_own, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    shifts = [around[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    changed_B = ~is_own.all(axis=(1, 2))
    np.testing.assert_array_equal(unchanged[changed_B], np.all(shifts, axis=0)[changed_B])


def test_cells_are_rolled_and_the_mask_excludes_those_at_the_seam():
    cells = np.arange(2 * 36).reshape(2, 6, 6)
    images = jnp.asarray(cells.repeat(4, axis=1).repeat(4, axis=2)[..., None])
    roll, shifts = jax.jit(roll_cells, static_argnums=1), set()
    for seed in range(20):
        rolled, shift, away = roll(images, 6, jax.random.key(seed))
        expected = np.roll(cells, shift, axis=(1, 2))
        np.testing.assert_array_equal(rolled[:, ::4, ::4, 0], expected)
        np.testing.assert_array_equal(rolled[:, 3::4, 3::4, 0], expected)
        row, column = np.divmod(expected[0], 6)
        inside = (
            (row > 0) & (row < 5) & (column > 0) & (column < 5)
        )  # of the original: cells whose neighbours are there
        np.testing.assert_array_equal(away, inside)
        shifts.add(tuple(np.asarray(shift).tolist()))
    assert len(shifts) > 10


def test_commitment_is_bounded_when_all_vectors_have_one_code():
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 16)), jnp.float32)
    one_code = jnp.broadcast_to(jnp.mean(hidden, axis=(0, 1, 2)), hidden.shape)
    for scale in (1e-2, 1.0, 1e2):
        assert commitment_error(scale * hidden, scale * one_code) == pytest.approx(1, rel=1e-3)


def test_gradient_error_distinguishes_errors_of_equal_mean():
    flat = jnp.full((1, 8, 8, 3), 0.1)
    checks = flat.at[:, ::2, ::2].multiply(-1)
    error = jax.jit(gradient_error)
    assert error(flat) == 0
    assert error(checks) > 0.05


def start():
    """Returns fresh parameters, and extra state whose codes are all in use."""
    params, extra = jax.jit(Objective(CONFIG).init)(jax.random.key(0))
    sum_KZ = jnp.asarray(np.random.default_rng(0).normal(size=(16, 64)) / 16, jnp.float32)
    return params, extra | {"codebook": {"share": jnp.full(16, 1 / 16), "sum": sum_KZ}}


@pytest.mark.slow
def test_locality_has_gradients_for_the_encoder_only():
    params, extra = start()
    batch = {"pixels": jnp.asarray(np.random.default_rng(1).random((4, 8, 8, 3), np.float32))}

    def gradient(weight):
        objective = Objective(CONFIG, locality_weight=weight)
        step = jax.jit(objective.loss_and_gradients)
        _, gradients, _, _ = step(params, extra, batch, jnp.int32(1), jax.random.key(2))
        return gradients["model"]

    without, with_locality = gradient(0.0), gradient(1.0)
    changed = {name for name, array in without.items() if not np.array_equal(array, with_locality[name])}
    assert changed and all(name.startswith(("encoder.", "quant_conv.")) for name in changed)


@pytest.mark.slow
def test_vectors_pass_unquantized_at_the_start_and_then_have_many_codes():
    params, extra = Objective(CONFIG).init(jax.random.key(0))
    batch = {"pixels": jnp.asarray(np.random.default_rng(1).random((4, 8, 8, 3), np.float32))}
    loss_and_gradients = jax.jit(Objective(CONFIG, unquantized_steps=3).loss_and_gradients)
    losses, used = [], []
    for step in range(5):
        value, _, metrics, extra = loss_and_gradients(params, extra, batch, jnp.int32(step), jax.random.key(step))
        losses.append(float(value))
        used.append(float(metrics["codes_used"]))
    assert losses[:4] == [losses[0]] * 4  # the parameters do not change
    assert used[:4] == [1 / 16] * 4 and used[4] > 0.5
    assert losses[4] > losses[0]  # quantization costs something


@pytest.mark.slow
def test_gradients_are_those_of_the_loss_as_one_function():
    """Evaluation computes the same loss without a separate gradient of the image."""
    objective = Objective(CONFIG)
    params, extra = start()
    batch = {"pixels": jnp.asarray(np.random.default_rng(1).random((4, 8, 8, 3), np.float32))}
    loss, gradients, _, _ = jax.jit(objective.loss_and_gradients)(params, extra, batch, jnp.int32(0), jax.random.key(2))

    def whole(network):
        return objective.evaluate(params, extra | {"average": network}, batch)["loss"]

    expected_loss, expected = jax.jit(jax.value_and_grad(whole))(params["model"])
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert gradients.keys() == {"model"} and gradients["model"].keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(
            gradients["model"][name], array, rtol=0, atol=1e-5 * np.abs(array).max() + 1e-8, err_msg=name
        )


@pytest.mark.slow
def test_evaluation_uses_the_average():
    params, extra = Objective(CONFIG).init(jax.random.key(0))
    batch = {"pixels": jnp.asarray(np.random.default_rng(1).random((4, 8, 8, 3), np.float32))}
    evaluate = jax.jit(Objective(CONFIG).evaluate)
    other = jax.tree.map(lambda array: array + 1, params)
    assert evaluate(params, extra, batch) == evaluate(other, extra, batch)
    changed = extra | {"average": other["model"]}
    assert evaluate(params, extra, batch)["loss"] != evaluate(params, changed, batch)["loss"]
