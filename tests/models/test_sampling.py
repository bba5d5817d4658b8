"""Sampling: the ids that top-k and top-p keep."""

import jax
import jax.numpy as jnp
import pytest

from EasyLM.models.sampling import Sampling, check_sampling, sample

samples = jax.jit(jax.vmap(sample, in_axes=(None, None, 0)))


@pytest.mark.parametrize(
    "sampling, kept",
    [
        (Sampling(1.0), {0, 1, 2, 3, 4}),
        (Sampling(1.0, top_k=2), {3, 1}),
        (Sampling(1.0, top_k=99), {0, 1, 2, 3, 4}),
        (Sampling(1.0, top_p=0.39), {3}),
        (Sampling(1.0, top_p=1e-40), {3}),  # float32 flushes it to 0
        (Sampling(1.0, top_p=0.41), {3, 1}),
        (Sampling(1.0, top_p=0.69), {3, 1}),
        (Sampling(1.0, top_p=0.71), {3, 1, 0}),
        (Sampling(1.0, top_k=2, top_p=0.56), {3}),  # of the two, the first has 4/7
        (Sampling(0.1, top_p=0.9), {3}),
        (Sampling(), {3}),
    ],
)
def test_top_k_and_top_p_keep_the_most_likely_ids(sampling, kept):
    logits_V = jnp.log(jnp.array([0.15, 0.3, 0.05, 0.4, 0.1]))
    keys = jax.random.split(jax.random.key(0), 500)
    assert set(samples(logits_V, sampling, keys).tolist()) == kept


def test_top_k_above_the_vocabulary_is_disabled():
    logits_V = jax.random.normal(jax.random.key(0), 64)
    keys = jax.random.split(jax.random.key(1), 500)
    drawn = [samples(logits_V, check_sampling(1.0, k, 1.0), keys) for k in (0, 65, 2**31, 10**30)]
    assert len({tuple(samples_N.tolist()) for samples_N in drawn}) == 1


@pytest.mark.slow
def test_one_program_serves_all_settings():
    """The first use of a setting must not compile anything: it would hold up a service for seconds."""
    program = jax.jit(jax.vmap(sample, in_axes=(0, None, 0)))
    logits_BV, keys_B = jax.random.normal(jax.random.key(0), (3, 16)), jax.random.split(jax.random.key(1), 3)
    for settings in ((1.0, 0, 1.0), (0, 0, 1.0), (0.7, 3, 1.0), (2.0, 0, 0.5), (1e-6, 16, 1e-9)):
        drawn_B = program(logits_BV, check_sampling(*settings), keys_B)
        for logits_V, key, drawn in zip(logits_BV, keys_B, drawn_B, strict=True):
            assert drawn == sample(logits_V, check_sampling(*settings), key), settings
    assert program._cache_size() == 1
