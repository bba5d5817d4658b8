"""The quantizers, which map vectors to codes, and codes to vectors.

Each one is a table of code vectors and a projection of the encoder's vectors. The code of a vector is that of the
nearest row of the table to its projection.

    quantizer   table                               projection
    vq          learned                             none; with `normalize_codes`, to length 1, as for the table
    fsq         all combinations of `fsq_levels`    into the box of the table, by tanh
                equidistant values (arXiv 2309.15505)
    lfq         all combinations of -1 and 1        none
                (arXiv 2310.05737)

The tables of fsq and lfq are constant grids: the nearest row follows by rounding, without a search. Files store them
like a learned table. Thus every reader of open-muse's layout can decode both, and encode with lfq. To encode with fsq
it also needs `bounded`.

Shapes: see `tokenizer.vqgan`; ... are any axes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from tokenizer.vqgan import fast_ops
from tokenizer.vqgan.config import VQGANConfig

_FSQ_EPSILON = 1e-3  # keeps the ends of tanh from being rounded outwards


class Codebook(nnx.Module):
    """The table of code vectors, [K,Z] float32, and the mapping from vectors to codes."""

    def __init__(self, config: VQGANConfig, rngs: nnx.Rngs):
        if config.quantizer == "vq":
            bound = 1.0 / config.num_embeddings
            shape = (config.num_embeddings, config.quantized_embed_dim)
            init_KZ = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
        else:
            init_KZ = jnp.asarray(grid_vectors(config))
        self.embedding = nnx.Param(init_KZ)
        self.config = config

    def __call__(self, codes: jax.Array) -> jax.Array:
        """Returns the vectors of codes: [..., Z]."""
        return self.table()[codes]

    def table(self) -> jax.Array:
        """Returns the vectors of all codes, [K,Z]."""
        return _unit(self.embedding[...]) if self.config.normalize_codes else self.embedding[...]

    def project(self, hidden: jax.Array) -> jax.Array:
        """Returns the encoder's vectors [...,Z] in the space of the codes, as float32 for every dtype of the model."""
        vectors = hidden.astype(jnp.float32)
        if self.config.normalize_codes:
            return _unit(vectors)
        return bounded(vectors, self.config.fsq_levels) if self.config.quantizer == "fsq" else vectors

    def nearest(self, hidden_BhwZ: jax.Array) -> jax.Array:
        """Returns the codes of the encoder's vectors, [B,N] int32."""
        vectors_MZ = self.project(rearrange(hidden_BhwZ, "B h w Z -> (B h w) Z"))
        if self.config.quantizer == "vq":
            codes_M = fast_ops.nearest_code(vectors_MZ, self.table())
        else:
            codes_M = grid_codes(vectors_MZ, self.config)
        return rearrange(codes_M, "(B N) -> B N", B=len(hidden_BhwZ))


def bounded(vectors: jax.Array, levels: tuple[int, ...]) -> jax.Array:
    """Maps vectors [...,Z] into the box of FSQ's grid (arXiv 2309.15505, appendix A.1, `bound` divided by L // 2)."""
    levels_Z = np.asarray(levels)
    half_Z = (levels_Z - 1) * (1 - _FSQ_EPSILON) / 2
    offset_Z = np.where(levels_Z % 2 == 1, 0.0, 0.5)  # an even number of values is not symmetric: -1, -0.5, 0, 0.5
    half, offset, shift, width = (
        np.reshape(array, (1,) * (vectors.ndim - 1) + (-1,)).astype(np.float32)
        for array in (half_Z, offset_Z, np.tan(offset_Z / half_Z), levels_Z // 2)
    )
    return (jnp.tanh(vectors + shift) * half - offset) / width


def grid_vectors(config: VQGANConfig) -> np.ndarray:
    """Returns the code vectors of a grid, [K,Z] float32. The first dimension changes fastest from code to code."""
    levels_Z, step_Z, radix_Z = _grid(config)
    digits_KZ = np.arange(config.num_embeddings)[:, None] // radix_Z % levels_Z
    return (digits_KZ * step_Z - 1).astype(np.float32)


def grid_codes(vectors_MZ: jax.Array, config: VQGANConfig) -> jax.Array:
    """Returns the codes of the nearest vectors of a grid, int32 [M]: `nearest_code` without a search."""
    levels_Z, step_Z, radix_Z = _grid(config)
    # The limits come after the conversion, because NaN has none.
    digits_MZ = jnp.round((vectors_MZ + 1) / step_Z.astype(np.float32)[None]).astype(jnp.int32)
    return jnp.sum(jnp.clip(digits_MZ, 0, levels_Z[None] - 1) * radix_Z[None], axis=1)


def _grid(config: VQGANConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns, for each dimension, the number of values, the step between them, and the step between codes."""
    levels_Z = np.asarray(config.grid_levels, np.int32)
    step_Z = 1 / (levels_Z // 2) if config.quantizer == "fsq" else np.full(len(levels_Z), 2.0)
    return levels_Z, step_Z, np.cumprod([1, *levels_Z[:-1]], dtype=np.int32)


def _unit(vectors: jax.Array) -> jax.Array:
    """Scales vectors [...,Z] to length 1."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
