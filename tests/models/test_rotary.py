"""The rotary position embedding."""

import importlib.util
import re

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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pairs_are_rotated_by_their_angles_on_every_platform(dtype):
    x_BTHK = jax.random.normal(jax.random.key(0), (2, 5, 3, 8), dtype)
    pairs = np.asarray(x_BTHK, np.float64).reshape(2, 5, 3, 4, 2)
    angles = np.arange(5)[:, None, None] / 10000 ** (np.arange(4) / 4)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    expected = np.stack((turned.real, turned.imag), -1).reshape(x_BTHK.shape)
    for platform in (None, "tpu"):
        rotated = rotary.rotate(x_BTHK, rope(5, 8), platform)
        assert rotated.dtype == dtype
        tolerance = 2e-6 if dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(np.asarray(rotated, np.float64), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_gradients_are_the_same_on_every_platform(dtype, tolerance):
    x_BTHK, weights = jax.random.normal(jax.random.key(0), (2, 2, 5, 3, 8), dtype)

    def gradient(platform):
        product = jax.grad(lambda x: (rotary.rotate(x, rope(5, 8), platform) * weights).sum())(x_BTHK)
        return np.asarray(product, np.float32)

    np.testing.assert_allclose(gradient("tpu"), gradient(None), rtol=tolerance, atol=tolerance)


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
