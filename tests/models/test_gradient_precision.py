"""Gradients in each compute type against float32, for few and many tokens per step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama_kit import changed

from EasyLM.models.llama import llama_model

SEQ_LENGTH = 64
pytestmark = pytest.mark.slow


@functools.cache
def gradients(tokens: int, dtype, wide: bool = False) -> dict[str, np.ndarray]:
    """The gradient of each parameter for a random batch of the full vocabulary."""
    config = changed(vocab_size=8292)
    params = llama_model.init_params(config, jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, 8192, (tokens // SEQ_LENGTH, SEQ_LENGTH + 1))
    masks = np.ones((len(ids), SEQ_LENGTH), np.float32)
    batch = {"input_tokens": ids[:, :-1], "target_tokens": ids[:, 1:], "loss_masks": masks}
    loss = llama_model.make_loss_fn(config, dtype, wide_gradients=wide)
    gradient = jax.jit(jax.grad(lambda params: loss(params, batch, None)[0]))(params)
    return {jax.tree_util.keystr(path): np.float32(x) for path, x in jax.tree_util.tree_leaves_with_path(gradient)}


@pytest.mark.parametrize("tokens", [64, 1024, 8192])
def test_bf16_gradients_are_near_float32(tokens):
    exact, rounded = gradients(tokens, jnp.float32), gradients(tokens, jnp.bfloat16)
    for name, gradient in exact.items():
        error = np.linalg.norm(rounded[name] - gradient) / np.linalg.norm(gradient)
        assert error < 0.03, f"{name}: relative error {error:.3f}"
        lost = np.mean((rounded[name] == 0) & (gradient != 0))
        assert lost < 1e-3, f"{name}: {lost:.1%} of the gradient underflows"


def test_wide_gradients_are_not_rounded_to_bf16():
    """Those of kernels. Those of norms and of the embedding are float32 in any case."""
    exact, narrow, wide = (gradients(1024, *how) for how in ((jnp.float32,), (jnp.bfloat16,), (jnp.bfloat16, True)))
    for name in exact:
        if "norm" in name or "wte" in name or "ln_f" in name:
            continue
        error, wide_error = (np.linalg.norm(x[name] - exact[name]) for x in (narrow, wide))
        assert wide_error < error
        rounded, wide_rounded = (np.mean(x[name] == x[name].astype(jnp.bfloat16)) for x in (narrow, wide))
        assert rounded == 1 and wide_rounded < 0.1, name


def test_fp16_gradients_underflow():
    """The reason why the trainer refuses fp16."""
    exact, rounded = gradients(8192, jnp.float32), gradients(8192, jnp.float16)
    (head,) = (name for name in exact if "lm_head" in name)
    assert np.mean((rounded[head] == 0) & (exact[head] != 0)) > 0.1
