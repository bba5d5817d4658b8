"""Attention of rows whose tokens are split over the mesh axis sp (DeepSpeed-Ulysses, arXiv 2309.14509).

Outside of attention, a device has some tokens of a row, with all heads of its part of mp. For attention, the devices
along sp exchange tokens, so that each has all tokens of some heads. Every implementation and mask applies to them. All
devices do the same work, in contrast to a split of the queries, of which later ones attend to more keys.
"""

from functools import partial

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from EasyLM.parallel import BATCH_AXES, HEAD_AXES

_TOKENS, _HEADS = P(BATCH_AXES, "sp", "mp"), P(BATCH_AXES, None, HEAD_AXES)


def tokens_to_heads(x_BTHK: jax.Array, mesh: Mesh) -> jax.Array:
    """Splits H over mp and sp, in place of T over sp and H over mp. The mesh must divide B, T and H."""
    exchange = partial(jax.lax.all_to_all, axis_name="sp", split_axis=2, concat_axis=1, tiled=True)
    return jax.shard_map(exchange, mesh=mesh, in_specs=_TOKENS, out_specs=_HEADS)(x_BTHK)


def heads_to_tokens(x_BTHK: jax.Array, mesh: Mesh) -> jax.Array:
    """The inverse of `tokens_to_heads`."""
    exchange = partial(jax.lax.all_to_all, axis_name="sp", split_axis=1, concat_axis=2, tiled=True)
    return jax.shard_map(exchange, mesh=mesh, in_specs=_HEADS, out_specs=_TOKENS)(x_BTHK)
