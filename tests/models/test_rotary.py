"""The rotary position embedding."""

import importlib.util
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from EasyLM.models.llama import rotary
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.planning.topologies import make_topology


def rope(length, head_dim):
    config = LLaMAConfig(hidden_size=2 * head_dim, num_attention_heads=2)
    return rotary.rotary_table(config, jnp.arange(length)[None])


@partial(jax.jit, static_argnums=2)
def rotated_and_gradient(x_BTHK, weights, platform):
    """Returns the rotated array and the gradient of its weighted sum."""
    rotated, gradient_of = jax.vjp(lambda x: rotary.rotate(x, rope(5, 8), platform), x_BTHK)
    return rotated, gradient_of(weights)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_pairs_are_rotated_by_their_angles_on_every_platform(dtype, tolerance):
    values = np.random.default_rng(0).normal(size=(2, 2, 5, 3, 8))
    x_BTHK, weights = jnp.asarray(values, dtype)
    angles = np.arange(5)[:, None, None] / 10000 ** (np.arange(4) / 4)

    def turned(x, angles):
        pairs = np.asarray(x, np.float64).reshape(2, 5, 3, 4, 2)
        complex_pairs = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
        return np.stack((complex_pairs.real, complex_pairs.imag), -1).reshape(x.shape)

    for platform in (None, "tpu"):
        rotated, gradient = rotated_and_gradient(x_BTHK, weights, platform)
        assert rotated.dtype == gradient.dtype == dtype
        for value, expected in ((rotated, turned(x_BTHK, angles)), (gradient, turned(weights, -angles))):
            np.testing.assert_allclose(np.asarray(value, np.float64), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (extra `tpu`)")
@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cpu"])
def test_no_array_of_pairs_on_tpus(platform):
    """The step of a TPU has no array [..., K/2, 2]. The way of other platforms has, if it is compiled for a TPU."""
    device = make_topology("v5e:2x2").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    x_BTHK = jax.ShapeDtypeStruct((2, 256, 2, 128), jnp.bfloat16, sharding=sharding)

    def gradient(x_BTHK):
        return jax.grad(lambda x: jnp.square(rotary.rotate(x, rope(256, 128), platform).astype(jnp.float32)).sum())(
            x_BTHK
        )

    text = jax.jit(gradient).trace(x_BTHK).lower(lowering_platforms=("tpu",)).compile().as_text()
    assert bool(re.search(r"\[2,256,2,64,2\]", text)) == (platform != "tpu")
