"""The forms of `tuning` equal the plain ones."""

import jax
import jax.numpy as jnp
import numpy as np

from EasyLM.models import tuning

ROW, KERNEL = (np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((1, 1, 16), (16, 24)))


def test_a_single_row_is_copied_on_nvidia_gpus_only():
    """XLA's GPU backend would write the elementwise products of a row and a matrix to memory."""
    traced = jax.jit(tuning.flat_matmul).trace(ROW, KERNEL)
    texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda")}
    assert {name for name, text in texts.items() if "tensor<8x16xf32>, tensor<16x24xf32>" in text} == {"cuda"}
    several = jax.jit(tuning.flat_matmul).trace(np.repeat(ROW, 2, axis=1), KERNEL).lower(lowering_platforms=("cuda",))
    assert "tensor<2x16xf32>, tensor<16x24xf32>" in several.as_text()


def test_a_product_of_copies_equals_the_plain_product(monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, cuda, default: cuda(*arrays))
    product = tuning.flat_matmul(jnp.asarray(ROW), jnp.asarray(KERNEL))
    assert product.shape == (1, 1, 24)
    np.testing.assert_allclose(product, ROW @ KERNEL, atol=1e-5)
