"""The losses of codes against the formulas of the papers, and the gradients that pass the quantization."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tokenizer_kit import random_vqgan, smooth_image

from tokenizer.training import CodeLoss, Objective, make_model
from tokenizer.training.code_losses import (
    codebook_error,
    commitment_error,
    entropy_loss,
    sign_entropy_loss,
    straight_through,
)
from tokenizer.training.codebook import empty_codebook
from tokenizer.vqgan import VQGANConfig, grid_vectors, weights
from tokenizer.vqgan.quantizers import Codebook

CONFIG = VQGANConfig(
    resolution=8,
    hidden_channels=4,
    channel_mult=(1,),
    num_res_blocks=1,
    z_channels=4,
    num_embeddings=16,
    quantized_embed_dim=4,
    norm_groups=2,
)
FSQ = dataclasses.replace(CONFIG, quantizer="fsq", fsq_levels=(8, 5), num_embeddings=40, quantized_embed_dim=2)
LFQ = dataclasses.replace(CONFIG, quantizer="lfq")
UNIT = dataclasses.replace(CONFIG, normalize_codes=True)


def random(*shape: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape, scale=scale), jnp.float32)


def fsq_slope(hidden):
    """The derivative of the bound of arXiv 2309.15505, appendix A.1, divided by half of the levels."""
    levels = np.asarray(FSQ.fsq_levels)
    half_l = (levels - 1) * (1 - 1e-3) / 2
    shift = np.tan(np.where(levels % 2 == 1, 0.0, 0.5) / half_l)
    return (1 - np.tanh(hidden + shift) ** 2) * half_l / (levels // 2)


@pytest.mark.parametrize("config", [CONFIG, UNIT, FSQ, LFQ])
def test_gradients_pass_straight_through(config):
    """The value is that of the codes; the gradient is that of the projection alone."""
    codebook = nnx.eval_shape(lambda: Codebook(config, nnx.Rngs(0)))  # compiling the initializer takes longer
    codebook.embedding = nnx.Param(random(16, 4) if config.quantizer == "vq" else jnp.asarray(grid_vectors(config)))
    hidden, weight = random(1, 3, 3, config.quantized_embed_dim), random(1, 3, 3, config.quantized_embed_dim)[:, ::-1]

    def output(hidden):
        projected = codebook.project(hidden)
        return straight_through(projected, codebook(codebook.nearest(hidden)).reshape(hidden.shape))

    @jax.jit
    def output_and_gradient(hidden, weight):
        value, backward = jax.vjp(output, hidden)
        return value, codebook(codebook.nearest(hidden))[0], *backward(weight)

    value, chosen, gradient = output_and_gradient(hidden, weight)
    np.testing.assert_allclose(value.reshape(9, -1), chosen, atol=1e-6)
    expected = np.asarray(weight)
    if config is FSQ:
        expected = expected * fsq_slope(np.asarray(hidden))
    if config is UNIT:
        length = np.linalg.norm(hidden, axis=-1, keepdims=True)
        unit = np.asarray(hidden) / length
        expected = (expected - unit * np.sum(unit * expected, axis=-1, keepdims=True)) / length
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_commitment_and_codebook_loss_share_a_value_and_divide_the_gradient():
    hidden, chosen = random(2, 3, 3, 4), random(2, 3, 3, 4)[::-1]
    variance = np.asarray(hidden).reshape(-1, 4).var(axis=0).mean()
    expected = np.mean((np.asarray(hidden) - np.asarray(chosen)) ** 2) / variance
    for error, gets_gradient in ((commitment_error, 0), (codebook_error, 1)):
        value, gradients = jax.jit(jax.value_and_grad(error, argnums=(0, 1)))(hidden, chosen)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        slope = 2 * (np.asarray(hidden) - np.asarray(chosen)) / hidden.size / variance
        np.testing.assert_allclose(gradients[gets_gradient], (slope, -slope)[gets_gradient], rtol=1e-4, atol=1e-7)
        assert not np.any(gradients[1 - gets_gradient])


@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_entropy_loss_is_that_of_the_papers(temperature):
    """Equation 5 of arXiv 2310.05737 with the distances of MaskGIT: E[H(p)] - H(E[p])."""
    hidden, table = np.asarray(random(20, 3)), np.asarray(random(7, 3))[:, ::-1].copy()
    logits = -np.sum((hidden[:, None] - table[None]) ** 2, axis=-1).astype(np.float64) / temperature
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)

    def entropy(p):
        return -np.sum(p * np.log(np.maximum(p, 1e-300)), axis=-1)

    expected = np.mean(entropy(p)) - entropy(p.mean(axis=0))
    value, gradient = jax.jit(jax.value_and_grad(entropy_loss))(hidden, table, temperature)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert -np.log(7) < value < 0 and np.all(np.isfinite(gradient)) and np.any(gradient)


@pytest.mark.parametrize("bits", [1, 5])
def test_entropy_of_signs_is_that_of_the_whole_table(bits):
    config = dataclasses.replace(LFQ, num_embeddings=2**bits, quantized_embed_dim=bits)
    hidden, table = random(30, bits, scale=0.3), jnp.asarray(grid_vectors(config))
    whole, by_signs = (
        jax.jit(jax.value_and_grad(function))(hidden)
        for function in (lambda x: entropy_loss(x, table, 0.5), lambda x: sign_entropy_loss(x, 0.5))
    )
    np.testing.assert_allclose(by_signs[0], whole[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(by_signs[1], whole[1], rtol=1e-3, atol=1e-6)


def test_entropy_is_lowest_for_clear_choices_of_all_codes():
    table = jnp.asarray(grid_vectors(LFQ))
    loss = jax.jit(sign_entropy_loss)
    assert loss(table, 0.01) == pytest.approx(-np.log(16), rel=1e-4)
    assert loss(jnp.tile(table[:1], (16, 1)), 0.01) == pytest.approx(0, abs=1e-4)
    assert loss(0 * table, 0.01) == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "loss", "terms"),
    [
        (CONFIG, CodeLoss(), {"commitment"}),
        (UNIT, CodeLoss("gradient", 0.1), {"commitment", "codebook", "entropy"}),
        (FSQ, CodeLoss(), set()),
        (LFQ, CodeLoss("ema", 0.1), {"commitment", "entropy"}),
    ],
)
def test_each_quantizer_has_its_terms_and_its_state(config, loss, terms):
    params, extra = jax.eval_shape(Objective(config, code_loss=loss).init, jax.random.key(0))
    assert ("codebook" in extra) == (config is CONFIG)
    assert ("quantize.embedding" in params["model"]) == (config is UNIT)
    arrays, codebook = jax.tree.map(lambda s: random(*s.shape), (params["model"], extra.get("codebook")))
    model = make_model(config, arrays, codebook)
    hidden = random(2, 3, 3, config.quantized_embed_dim)
    values = loss.terms(model, hidden, jnp.sign(hidden))
    assert set(values) == terms
    if config is LFQ:  # the codes have a fixed scale: arXiv 2310.05737 uses the plain squared error
        expected = 0.25 * np.mean((np.asarray(hidden) - np.sign(hidden)) ** 2)
        np.testing.assert_allclose(values["commitment"], expected, rtol=1e-5)


@pytest.mark.slow
def test_trained_codes_get_the_gradient_of_their_loss():
    """Codes nobody chose get none; the reconstruction does not move them, as its gradient passes them by."""
    objective = Objective(CONFIG, code_loss=CodeLoss("gradient"))
    params, extra = jax.jit(objective.init)(jax.random.key(0))
    params["model"]["quantize.embedding"] = random(16, 4)
    batch = {"pixels": jnp.asarray(np.random.default_rng(1).random((4, 8, 8, 3), np.float32))}
    _, gradients, metrics, _ = jax.jit(objective.loss_and_gradients)(
        params, extra, batch, jnp.int32(0), jax.random.key(2)
    )
    model = make_model(CONFIG, params["model"], None)
    hidden, codes = nnx.jit(lambda model, pixels: model.encode(pixels))(model, batch["pixels"])
    hidden, codes = np.asarray(hidden).reshape(-1, 4), np.asarray(codes).ravel()
    expected = np.zeros((16, 4))
    np.add.at(expected, codes, 2 * (np.asarray(params["model"]["quantize.embedding"])[codes] - hidden))
    expected /= hidden.size * hidden.var(axis=0).mean()
    np.testing.assert_allclose(gradients["model"]["quantize.embedding"], expected, rtol=1e-3, atol=1e-6)
    assert 1 < len(np.unique(codes)) < 16 and metrics["codebook"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("config", "loss"), [(UNIT, CodeLoss()), (LFQ, CodeLoss("ema", 0.1))])
def test_a_short_training_improves_the_images_and_uses_most_codes(config, loss):
    objective = Objective(config, code_loss=loss)
    network = weights.parameters(random_vqgan(config))
    codebook = empty_codebook(*network.pop("quantize.embedding").shape)
    pixels = jnp.asarray(np.stack([smooth_image(seed, 8) for seed in range(6)]) / 255, jnp.float32)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train_step(params, extra, optimizer_state, step):
        key = jax.random.key(0)
        _, gradients, metrics, extra = objective.loss_and_gradients(params, extra, {"pixels": pixels}, step, key)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state)
        return optax.apply_updates(params, updates), extra, optimizer_state, metrics

    params, extra = {"model": network}, {"average": network} | ({"codebook": codebook} if config is UNIT else {})
    optimizer_state, rows = optimizer.init(params), []
    for step in range(150):
        params, extra, optimizer_state, metrics = train_step(params, extra, optimizer_state, jnp.int32(step))
        rows.append(jax.device_get(metrics))
    assert rows[-1]["psnr"] > rows[0]["psnr"] + 3
    assert rows[-1]["codes_used"] > 0.5
