"""The codebook as running means (VQ-VAE, arXiv 1711.00937, appendix A.1), and the replacement of unused codes.

The state is `{"share": [K], "sum": [K,Z]}`: the share of vectors that choose each code, and their sum divided by the
number of all vectors. A code is the mean of the vectors that chose it.
"""

import jax
import jax.numpy as jnp
import optax

DECAY = 0.99  # of the running means, per step
# In units of the uniform share 1/K: a code whose share is below _UNUSED is replaced and gets the share _REPLACED. An
# unused code is thus replaced every 120 steps, while the encoder still changes; a rarely used code is kept.
_UNUSED, _REPLACED = 0.03, 0.1

Codebook = dict[str, jax.Array]


def empty_codebook(num_codes: int, length: int) -> Codebook:
    """Returns a codebook of unused codes. The first update places every code on a vector of its batch."""
    return {"share": jnp.zeros(num_codes), "sum": jnp.zeros((num_codes, length))}


def code_vectors(codebook: Codebook) -> jax.Array:
    """Returns the codes [K,Z]."""
    return codebook["sum"] / jnp.maximum(codebook["share"], 1e-12)[:, None]


def update_codebook(codebook: Codebook, hidden_MZ: jax.Array, codes_M: jax.Array, key: jax.Array) -> Codebook:
    """Returns the codebook after a batch.

    Used codes move by their running means. Unused codes are replaced by vectors of the batch (as in Jukebox, arXiv
    2005.00341), sampled with a probability proportional to the squared distance from their code (as in k-means++).
    Uniform sampling would place most of them in dense regions, such as many codes for a uniform wall.

    Args:
      hidden_MZ: the encoder's vectors.
      codes_M: the code of each vector.
    """
    num_codes = len(codebook["share"])
    chosen_MK = jax.nn.one_hot(codes_M, num_codes)
    batch = {
        "share": jnp.mean(chosen_MK, axis=0),
        "sum": jnp.einsum("MK,MZ->KZ", chosen_MK, hidden_MZ, precision="highest") / len(hidden_MZ),
    }
    updated = optax.incremental_update(batch, codebook, 1 - DECAY)
    error_M = jnp.cumsum(jnp.sum((hidden_MZ - code_vectors(codebook)[codes_M]) ** 2, axis=-1))
    sampled_K = jnp.searchsorted(error_M, error_M[-1] * jax.random.uniform(key, (num_codes,)))
    sampled_KZ = hidden_MZ[jnp.minimum(sampled_K, len(hidden_MZ) - 1)]
    unused_K = updated["share"] < _UNUSED / num_codes
    share = _REPLACED / num_codes
    return {
        "share": jnp.where(unused_K, share, updated["share"]),
        "sum": jnp.where(unused_K[:, None], share * sampled_KZ, updated["sum"]),
    }
