"""The adversary: pix2pix' discriminator, VQGAN's adaptive weight, two players that keep apart."""

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
from EasyLM.training.step import TrainState, jit_train_step, make_train_step
from tokenizer.training import losses
from tokenizer.training.discriminator import TICK, Adversary, Discriminator
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
ADVERSARY = Adversary(weight=0.5, start_step=3, lr=0.01, channels=4, layers=1, resolution=8)
PLAIN = losses.Objective(CONFIG)
BOTH = dataclasses.replace(PLAIN, adversary=ADVERSARY)
LAST = "decoder.conv_out.kernel"
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def batch():
    return {"pixels": np.random.default_rng(0).random((8, 8, 8, 3), np.float32)}


@pytest.fixture(scope="module")
def params(batch):
    """Parameters whose codes lie on vectors of the batch, and whose clock stands at the start step."""
    rng = np.random.default_rng(0)  # compiling the initializers would take longer than the tests
    shapes = jax.eval_shape(BOTH.init_params, jax.random.key(0))
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape, scale=0.2), jnp.float32), shapes)
    model = losses.make_model(CONFIG, params, "model")
    hidden_MZ = nnx.jit(lambda model, pixels: model.encode(pixels)[0])(model, batch["pixels"]).reshape(-1, 4)
    share = jnp.full(8, 1 / 8)
    return params | {"codebook": {"share": share, "sum": hidden_MZ[::64] / 8}, "clock": jnp.float32(3 * TICK)}


@functools.cache
def compiled(target):
    return jax.jit(jax.value_and_grad(target.loss, has_aux=True))


def gradient(target, params, batch):
    names = ("model", "average", "codebook", *(("discriminator", "clock") if target.adversary else ()))
    own = {name: params[name] for name in names}
    (loss, figures), gradients = compiled(target)(own, batch, KEY)
    return loss, figures, gradients


def close(one, other, rtol=1e-4):
    for name, array in one.items():
        scale = np.abs(other[name]).max()
        np.testing.assert_allclose(array, other[name], rtol=0, atol=rtol * scale + 1e-9, err_msg=name)


def test_discriminator_is_pix2pixs():
    torch = pytest.importorskip("torch")
    from torch import nn

    def conv(a, b, stride, bias):
        return nn.Conv2d(a, b, 4, stride, 1, bias=bias)

    def normal(width):
        return [nn.GroupNorm(8, width, eps=1e-6), nn.LeakyReLU(0.2)]

    layers = [conv(3, 8, 2, True), nn.LeakyReLU(0.2), conv(8, 16, 2, False), *normal(16), conv(16, 32, 2, False)]
    peer = nn.Sequential(*layers, *normal(32), conv(32, 64, 1, False), *normal(64), conv(64, 1, 1, True))
    torch.manual_seed(0)
    arrays = [torch.randn(tensor.shape) * 0.1 for tensor in peer.parameters()]
    for tensor, array in zip(peer.parameters(), arrays):
        tensor.data = array
    names = ["conv_in.kernel", "conv_in.bias"]
    for i in range(3):
        names += [f"convs.{i}.kernel", f"norms.{i}.scale", f"norms.{i}.bias"]
    names += ["conv_out.kernel", "conv_out.bias"]
    ours = {name: jnp.asarray(weights.from_file(array.numpy())) for name, array in zip(names, arrays, strict=True)}
    network = weights.with_parameters(lambda: Discriminator(8, 3, rngs=nnx.Rngs(0)), ours)
    pixels = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    with torch.no_grad():
        expected = peer(2 * torch.tensor(pixels).permute(0, 3, 1, 2) - 1)[:, 0]
    verdicts = nnx.jit(lambda network, pixels: network(pixels))(network, pixels)
    assert verdicts.shape == (2, 2, 2) and expected.abs().max() > 0.1
    np.testing.assert_allclose(verdicts, expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_network_learns_from_both_losses_by_the_adaptive_weight(params, batch):
    loss, figures, both = gradient(BOTH, params, batch)
    plain_loss, _, plain = gradient(PLAIN, params, batch)
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)  # the adversary's terms have no value

    def generator(model):  # independent of the slopes that the objective uses
        network = losses.make_model(CONFIG, params | {"model": model}, "model")
        hidden, codes = network.encode(batch["pixels"])
        chosen = network.quantize(codes).reshape(hidden.shape)
        drawn = network.decode_vectors(hidden + jax.lax.stop_gradient(chosen - hidden))
        return -jnp.mean(ADVERSARY.discriminator(params)(drawn))

    adversarial = jax.jit(jax.grad(generator))(params["model"])
    adaptive = jnp.linalg.norm(plain["model"][LAST]) / (jnp.linalg.norm(adversarial[LAST]) + 1e-4)
    np.testing.assert_allclose(figures["adaptive_weight"], adaptive, rtol=1e-4)
    expected = jax.tree.map(lambda a, b: a + 0.5 * adaptive * b, plain["model"], adversarial)
    close(both["model"], expected)
    assert optax.tree.norm(optax.tree.sub(both["model"], plain["model"])) > 0.1 * optax.tree.norm(plain["model"])

    def hinge(discriminator):
        network = ADVERSARY.discriminator({"discriminator": discriminator})
        model = losses.make_model(CONFIG, params, "model")
        drawn = model.decode(model.encode(batch["pixels"])[1])
        real, fake = network(batch["pixels"]), network(drawn)
        return jnp.mean(jnp.maximum(1 - real, 0)) / 2 + jnp.mean(jnp.maximum(1 + fake, 0)) / 2

    value, expected = jax.jit(jax.value_and_grad(hinge))(params["discriminator"])
    np.testing.assert_allclose(figures["discriminator"], value, rtol=1e-5)
    close(both["discriminator"], expected)


@pytest.mark.slow
def test_before_its_start_the_adversary_does_nothing(params, batch):
    early = gradient(BOTH, params | {"clock": jnp.float32(2 * TICK)}, batch)[2]
    plain = gradient(PLAIN, params, batch)[2]
    close(early["model"], plain["model"], 1e-6)
    assert optax.tree.norm(early["discriminator"]) == 0


@pytest.mark.slow
def test_eight_devices_do_as_one(params, batch):
    optimizer, rate = BOTH.make_optimizer(optax.constant_schedule(1e-3), 1e-4, 1.0, 0.9)
    step = make_train_step(BOTH.loss, optimizer, rate, seed=0)
    rows = []
    for devices in (jax.devices(), jax.devices()[:1]):
        mesh = make_mesh("1,-1,1", devices)
        state = TrainState(jnp.int32(0), params | {"clock": jnp.zeros(())}, optimizer.init(params))
        places = shardings(mesh, ((".*", jax.sharding.PartitionSpec()),), state)
        state = jax.device_put(jax.tree.map(jnp.copy, state), places)  # a copy: the step takes its buffers
        jitted = jit_train_step(step, places, mesh)
        pixels = jax.device_put(batch, batch_sharding(mesh))
        figures = []
        for _ in range(6):
            state, metrics = jitted(state, pixels)
            figures.append(jax.device_get(metrics))
        rows.append(figures)
        assert state.params["clock"] == 6 * TICK
    for one, other in zip(*rows, strict=True):
        for name in ("loss", "gradient_norm", "generator", "discriminator", "adaptive_weight", "code_perplexity"):
            np.testing.assert_allclose(one[name], other[name], rtol=2e-4, err_msg=name)
    verdicts = [row["discriminator"] for row in rows[0]]
    assert verdicts[5] < verdicts[3]  # it learns from step 3 on


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 48}, "--adversary.channels=48"),
        ({"layers": 3}, "--adversary.layers=3: leaves no patch of 8 pixels"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ADVERSARY, **settings)


@pytest.mark.slow
def test_a_step_takes_the_average_to_the_network(params, batch):
    """From old to d old + (1 - d) network, as the network was before the step, for every parameter."""
    decay = 0.9
    own = {name: params[name] for name in ("model", "average", "codebook")}
    _, _, gradients = gradient(PLAIN, params, batch)
    optimizer, _ = PLAIN.make_optimizer(lambda count: 0.1, 0.01, 1.0, decay)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(own), own)
    after = optax.apply_updates(own, updates)
    assert after["average"].keys() == own["model"].keys()
    for name, old in own["average"].items():
        expected = decay * old + (1 - decay) * own["model"][name]
        np.testing.assert_allclose(after["average"][name], expected, rtol=0, atol=1e-6, err_msg=name)
        assert np.abs(old - own["model"][name]).max() > 0.01
