"""The codebook's running means, and the replacement of unused codes."""

import jax
import jax.numpy as jnp
import numpy as np

from tokenizer.training.codebook import DECAY, code_vectors, update_codebook

update = jax.jit(update_codebook)


def codebook(share, total):
    return {"share": jnp.asarray(share, jnp.float32), "sum": jnp.asarray(total, jnp.float32)}


def test_used_codes_follow_running_means_and_unused_ones_are_replaced():
    vectors = jnp.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    chosen = jnp.asarray([0, 0, 0, 1])
    before = codebook([0.5, 0.5, 0.0], [[0.5, 0.5], [2.0, 2.0], [0.0, 0.0]])
    after = update(before, vectors, chosen, jax.random.key(0))
    d = DECAY
    np.testing.assert_allclose(after["share"][:2], [d * 0.5 + (1 - d) * 0.75, d * 0.5 + (1 - d) * 0.25], rtol=1e-6)
    np.testing.assert_allclose(after["sum"][0], d * 0.5 + (1 - d) * vectors[:3].sum(0) / 4, rtol=1e-6)
    replaced = code_vectors(after)[2]
    assert np.min(np.abs(vectors - replaced[None, :]).sum(axis=1)) < 1e-4


def test_unused_codes_move_to_vectors_far_from_their_code():
    vectors = jnp.concatenate([jnp.full((60, 2), 1.0), jnp.asarray([[9.0, 9.0], [7.0, 8.0]])])
    before = codebook([1.0, *[0.0] * 7], [[1.0, 1.0], *[[0.0, 0.0]] * 7])
    after = update(before, vectors, jnp.zeros(62, int), jax.random.key(0))
    np.testing.assert_array_less(6.9, code_vectors(after)[1:])  # the 60 vectors on their code are not sampled
