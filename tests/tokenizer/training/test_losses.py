"""The loss terms, and the parameters that receive their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenizer.training import Objective
from tokenizer.training.losses import gradient_error, gradient_only, paste_rectangles
from tokenizer.vqgan import VQGANConfig

CONFIG = VQGANConfig(resolution=8, hidden_channels=4, channel_mult=(1,), norm_groups=2, num_embeddings=16)


def test_rectangles_of_the_next_image_are_pasted_and_the_mask_excludes_their_neighbours():
    images = np.random.default_rng(0).random((64, 16, 16, 3), np.float32)
    pasted, unchanged = paste_rectangles(jnp.asarray(images), 4, jax.random.key(0))
    cells = np.asarray(pasted).reshape(64, 4, 4, 4, 4, 3).swapaxes(2, 3)
    own, other = (array.reshape(64, 4, 4, 4, 4, 3).swapaxes(2, 3) for array in (images, np.roll(images, 1, axis=0)))
    is_own, is_other = ((cells == whole).all(axis=(3, 4, 5)) for whole in (own, other))
    assert (is_own ^ is_other).all()
    assert 0.05 < is_other.mean() < 0.5
    around = np.pad(is_own, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    shifts = [around[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    changed_B = ~is_own.all(axis=(1, 2))
    np.testing.assert_array_equal(unchanged[changed_B], np.all(shifts, axis=0)[changed_B])


def test_gradient_error_distinguishes_errors_of_equal_mean():
    flat = jnp.full((1, 8, 8, 3), 0.1)
    checks = flat.at[:, ::2, ::2].multiply(-1)
    assert gradient_error(flat) == 0
    assert gradient_error(checks) > 0.05


def test_gradient_only_has_a_gradient_and_no_value():
    value, gradient = jax.value_and_grad(lambda x: gradient_only(x**2))(3.0)
    assert value == 0 and gradient == 6


@pytest.mark.slow
def test_locality_has_gradients_for_the_encoder_only():
    params, extra = Objective(CONFIG).init(jax.random.key(0))
    sum_KZ = jnp.asarray(np.random.default_rng(0).normal(size=(16, 64)) / 16, jnp.float32)
    extra["codebook"] = {"share": jnp.full(16, 1 / 16), "sum": sum_KZ}
    batch = {"pixels": jnp.asarray(np.random.default_rng(1).random((4, 8, 8, 3), np.float32))}

    def gradient(weight):
        objective = Objective(CONFIG, locality_weight=weight)
        loss = jax.jit(jax.grad(lambda p: objective.loss(p, extra, batch, jnp.int32(0), jax.random.key(2))[0]))
        return loss(params)["model"]

    without, with_locality = gradient(0.0), gradient(1.0)
    changed = {name for name, array in without.items() if not np.array_equal(array, with_locality[name])}
    assert changed and all(name.startswith(("encoder.", "quant_conv.")) for name in changed)


@pytest.mark.slow
def test_evaluation_uses_the_average():
    params, extra = Objective(CONFIG).init(jax.random.key(0))
    batch = {"pixels": jnp.asarray(np.random.default_rng(1).random((4, 8, 8, 3), np.float32))}
    evaluate = jax.jit(Objective(CONFIG).evaluate)
    other = jax.tree.map(lambda array: array + 1, params)
    assert evaluate(params, extra, batch) == evaluate(other, extra, batch)
    changed = extra | {"average": other["model"]}
    assert evaluate(params, extra, batch)["loss"] != evaluate(params, changed, batch)["loss"]
