"""Adversarial training: the discriminator of pix2pix, the adaptive weight of VQGAN, separate gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from EasyLM.errors import UserError
from EasyLM.parallel import batch_sharding, make_mesh, shardings
from EasyLM.training import Optimizer, TrainState, make_train_step
from EasyLM.training.step import jit_train_step
from tokenizer.training import AdversarialLoss, Objective, learning_rate, make_model
from tokenizer.training.discriminator import Discriminator
from tokenizer.vqgan import weights
from tokenizer.vqgan.config import VQGANConfig

CONFIG = VQGANConfig(
    resolution=8,
    hidden_channels=4,
    channel_mult=(1,),
    num_res_blocks=1,
    z_channels=4,
    num_embeddings=8,
    quantized_embed_dim=4,
    norm_groups=2,
)
ADVERSARIAL = AdversarialLoss(weight=0.5, start_step=3, lr=0.01, channels=4, layers=1, resolution=8)
PLAIN = Objective(CONFIG, average_decay=0.9)
BOTH = dataclasses.replace(PLAIN, adversarial=ADVERSARIAL)
START = jnp.int32(ADVERSARIAL.start_step)
LAST = "decoder.conv_out.kernel"
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def batch():
    return {"pixels": np.random.default_rng(0).random((8, 8, 8, 3), np.float32)}


@pytest.fixture(scope="module")
def state(batch):
    """Parameters and extra state whose codes lie on vectors of the batch."""
    rng = np.random.default_rng(0)  # compiling the initializers would take longer than the tests
    params, extra = jax.eval_shape(BOTH.init, jax.random.key(0))
    params, extra = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s.shape, scale=0.2), jnp.float32), (params, extra)
    )
    model = make_model(CONFIG, params["model"], extra["codebook"])
    hidden_MZ = nnx.jit(lambda model, pixels: model.encode(pixels)[0])(model, batch["pixels"]).reshape(-1, 4)
    return params, extra | {"codebook": {"share": jnp.full(8, 1 / 8), "sum": hidden_MZ[::64] / 8}}


@functools.cache
def compiled(objective):
    return jax.jit(objective.loss_and_gradients)


def gradient(objective, state, batch, step=START):
    """Returns the loss, its metrics and the gradients at a step."""
    params, extra = state
    names = ("model", "discriminator") if objective.adversarial else ("model",)
    loss, gradients, metrics, _ = compiled(objective)({n: params[n] for n in names}, extra, batch, step, KEY)
    return loss, metrics, gradients


def close(one, other, rtol=1e-4):
    for name, array in one.items():
        scale = np.abs(other[name]).max()
        np.testing.assert_allclose(array, other[name], rtol=0, atol=rtol * scale + 1e-9, err_msg=name)


def test_discriminator_is_that_of_pix2pix():
    torch = pytest.importorskip("torch")
    from torch import nn

    def conv(a, b, stride, bias):
        return nn.Conv2d(a, b, 4, stride, 1, bias=bias)

    def normal(width):
        return [nn.GroupNorm(8, width, eps=1e-6), nn.LeakyReLU(0.2)]

    layers = [conv(3, 8, 2, True), nn.LeakyReLU(0.2), conv(8, 16, 2, False), *normal(16), conv(16, 32, 2, False)]
    reference = nn.Sequential(*layers, *normal(32), conv(32, 64, 1, False), *normal(64), conv(64, 1, 1, True))
    torch.manual_seed(0)
    arrays = [torch.randn(tensor.shape) * 0.1 for tensor in reference.parameters()]
    for tensor, array in zip(reference.parameters(), arrays):
        tensor.data = array
    names = ["conv_in.kernel", "conv_in.bias"]
    for i in range(3):
        names += [f"convs.{i}.kernel", f"norms.{i}.scale", f"norms.{i}.bias"]
    names += ["conv_out.kernel", "conv_out.bias"]
    ours = {name: jnp.asarray(weights.from_file(array.numpy())) for name, array in zip(names, arrays, strict=True)}
    network = weights.with_parameters(lambda: Discriminator(8, 3, rngs=nnx.Rngs(0)), ours)
    pixels = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    with torch.no_grad():
        expected = reference(2 * torch.tensor(pixels).permute(0, 3, 1, 2) - 1)[:, 0]
    logits = nnx.jit(lambda network, pixels: network(pixels))(network, pixels)
    assert logits.shape == (2, 2, 2) and expected.abs().max() > 0.1
    np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_network_gets_both_gradients_with_the_adaptive_weight(state, batch):
    params, extra = state
    loss, metrics, both = gradient(BOTH, state, batch)
    plain_loss, _, plain = gradient(PLAIN, state, batch)
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)  # adversarial terms do not affect the value

    def generator(model):  # does not use the objective's gradients by pixel
        network = make_model(CONFIG, model, extra["codebook"])
        hidden, codes = network.encode(batch["pixels"])
        chosen = network.quantize(codes).reshape(hidden.shape)
        reconstructed = network.decode_vectors(hidden + jax.lax.stop_gradient(chosen - hidden))
        return -jnp.mean(ADVERSARIAL.discriminator(params["discriminator"])(reconstructed))

    adversarial = jax.jit(jax.grad(generator))(params["model"])
    adaptive = jnp.linalg.norm(plain["model"][LAST]) / (jnp.linalg.norm(adversarial[LAST]) + 1e-4)
    np.testing.assert_allclose(metrics["adaptive_weight"], adaptive, rtol=1e-4)
    expected = jax.tree.map(lambda a, b: a + 0.5 * adaptive * b, plain["model"], adversarial)
    close(both["model"], expected)
    # At the last kernel, the adaptive weight gives both losses the same norm.
    added = jnp.linalg.norm(both["model"][LAST] - plain["model"][LAST])
    np.testing.assert_allclose(added, 0.5 * jnp.linalg.norm(plain["model"][LAST]), rtol=0.05)

    def hinge(discriminator):
        network = ADVERSARIAL.discriminator(discriminator)
        model = make_model(CONFIG, params["model"], extra["codebook"])
        reconstructed = model.decode(model.encode(batch["pixels"])[1])
        real, fake = network(batch["pixels"]), network(reconstructed)
        return jnp.mean(jnp.maximum(1 - real, 0)) / 2 + jnp.mean(jnp.maximum(1 + fake, 0)) / 2

    value, expected = jax.jit(jax.value_and_grad(hinge))(params["discriminator"])
    np.testing.assert_allclose(metrics["discriminator"], value, rtol=1e-5)
    close(both["discriminator"], expected)


@pytest.mark.slow
def test_before_the_start_step_adversarial_training_has_no_effect(state, batch):
    early = gradient(BOTH, state, batch, START - 1)[2]
    plain = gradient(PLAIN, state, batch)[2]
    close(early["model"], plain["model"], 1e-6)
    assert optax.tree.norm(early["discriminator"]) == 0


@pytest.mark.slow
def test_eight_devices_give_the_results_of_one(state, batch):
    """Up to rounding, which gradient descent does not amplify.

    Adam does: the hinge loss has no gradient by the discriminator's last bias while all logits are in -1..1, and Adam
    makes a full step of what rounding leaves.
    """
    rate = optax.constant_schedule(0.02)
    optimizer = Optimizer(optax.sgd(rate), functools.partial(learning_rate, rate))
    step = make_train_step(BOTH.loss_and_gradients, optimizer, seed=0)
    params, extra = state
    rows = []
    for devices in (jax.devices(), jax.devices()[:1]):
        mesh = make_mesh("1,-1,1", devices)
        train_state = TrainState(jnp.int32(0), params, optimizer.init(params), extra)
        placement = shardings(mesh, ((".*", jax.sharding.PartitionSpec()),), train_state)
        train_state = jax.device_put(jax.tree.map(jnp.copy, train_state), placement)  # the step donates its buffers
        jitted = jit_train_step(step, placement, mesh)
        pixels = jax.device_put(batch, batch_sharding(mesh))
        metrics_of_steps = []
        for _ in range(6):
            train_state, metrics = jitted(train_state, pixels)
            metrics_of_steps.append(jax.device_get(metrics))
        rows.append(metrics_of_steps)
    for one, other in zip(*rows, strict=True):
        for name in ("loss", "gradient_norm", "generator", "discriminator", "adaptive_weight", "code_perplexity"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, err_msg=name)
    losses = [row["discriminator"] for row in rows[0]]
    assert losses[5] < losses[3]  # trained from step 3 on


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 48}, "channels=48: must be 1..32 or a multiple of 32"),
        ({"layers": 3}, "layers=3: too many for images of 8 pixels"),
    ],
)
def test_invalid_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ADVERSARIAL, **settings)


@pytest.mark.slow
def test_the_average_follows_the_network(state, batch):
    """Every parameter becomes 0.9 old + 0.1 network, with the network before the step."""
    params, extra = state
    _, _, _, updated = jax.jit(PLAIN.loss_and_gradients)({"model": params["model"]}, extra, batch, START, KEY)
    assert updated["average"].keys() == params["model"].keys()
    for name, old in extra["average"].items():
        expected = 0.9 * old + 0.1 * params["model"][name]
        np.testing.assert_allclose(updated["average"][name], expected, rtol=0, atol=1e-6, err_msg=name)
        assert np.abs(old - params["model"][name]).max() > 0.01
