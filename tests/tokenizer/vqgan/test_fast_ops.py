"""The operations rewritten for CPUs equal their plain versions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokenizer.vqgan import fast_ops


@pytest.fixture
def x_BHWC():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 12, 6)), jnp.float32)


@pytest.fixture
def conv():
    layer = nnx.Conv(6, 5, (3, 3), precision="highest", rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(5.0)
    return layer


def compiled(operation, x_BHWC, *others):
    """As in the model. One operation after the other, each is compiled on its own."""
    return jax.jit(lambda x_BHWC: operation(x_BHWC, *others))(x_BHWC)


def test_conv_pool_equals_plain_version(x_BHWC, conv):
    ours, plain = (compiled(op, x_BHWC, conv) for op in (fast_ops.conv_pool, fast_ops.plain_conv_pool))
    assert ours.shape == (2, 4, 6, 5)
    np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5)


def test_upsample_conv_equals_plain_version(x_BHWC, conv):
    ours, plain = (compiled(op, x_BHWC, conv) for op in (fast_ops.upsample_conv, fast_ops.plain_upsample_conv))
    assert ours.shape == (2, 16, 24, 5)
    np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm_equals_plain_version(x_BHWC, groups):
    settings = (jnp.arange(1.0, 7.0), jnp.arange(6.0), groups, 1e-6)
    operations = fast_ops.group_norm, fast_ops.plain_group_norm
    ours, plain = (compiled(operation, 5 + 3 * x_BHWC, *settings) for operation in operations)
    np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("codes", [1, 5, 32, 96])
def test_nearest_code_equals_plain_version_and_definition(codes):
    rng = np.random.default_rng(0)
    table_KZ = rng.normal(size=(codes, 4)).astype(np.float32)
    vectors_MZ = rng.normal(size=(400, 4)).astype(np.float32)
    ours_M = jax.jit(fast_ops.nearest_code)(vectors_MZ, table_KZ)
    distance_MK = ((vectors_MZ[:, None].astype(np.float64) - table_KZ) ** 2).sum(-1)
    np.testing.assert_array_equal(ours_M, distance_MK.argmin(-1))
    np.testing.assert_array_equal(ours_M, jax.jit(fast_ops.plain_nearest_code)(vectors_MZ, table_KZ))
    assert ours_M.dtype == jnp.int32 and len(np.unique(ours_M)) >= 0.9 * codes


def test_nearest_code_takes_the_lowest_on_a_tie_and_stays_in_range_for_nan():
    table_KZ = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    table_KZ[5] = table_KZ[3]
    nearest_code = jax.jit(fast_ops.nearest_code)
    assert nearest_code(table_KZ[3:4], table_KZ) == 3
    assert 0 <= int(nearest_code(table_KZ[3:4] * np.float32("nan"), table_KZ)[0]) < 8
