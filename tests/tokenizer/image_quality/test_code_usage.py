"""Share of the codebook in use and perplexity of the codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenizer.image_quality import code_usage


def test_code_usage_equals_its_definition():
    assert code_usage(np.array([5, 0, 5, 0])) == {"codes_used": 0.5, "code_perplexity": pytest.approx(2)}
    assert code_usage(np.array([0, 0]))["code_perplexity"] == 1
    counts_K = np.random.default_rng(0).integers(0, 9, 50)
    share_K = counts_K[counts_K > 0] / counts_K.sum()
    assert code_usage(counts_K)["code_perplexity"] == pytest.approx(np.exp(-(share_K * np.log(share_K)).sum()))


def test_code_usage_under_jit_equals_numpy():
    counts_K = np.array([1, 0, 7, 3])
    jitted = jax.jit(code_usage)(jnp.asarray(counts_K))
    assert {name: float(value) for name, value in jitted.items()} == pytest.approx(code_usage(counts_K))
