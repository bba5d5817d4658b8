"""Attention with the splash kernel of Pallas, on TPUs.

The kernel computes causal attention block by block (FlashAttention-2, arXiv 2307.08691) and skips blocks of later keys.
It takes one row of one device: rows are vectorized, and devices have their own rows and heads.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from EasyLM.models.attention.mask import AttentionMask
from EasyLM.models.tuning import LANES
from EasyLM.parallel import BATCH_AXES, HEAD_AXES, axis_size

_BLOCK = 512  # queries, and keys, of a block


def splash_applies(platform: str, mask: AttentionMask) -> bool:
    """Whether the kernel supports this platform and mask."""
    return platform == "tpu" and mask.dropout_key is None and mask.forget_key is None


def splash_attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: AttentionMask,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns the attention's output [B, T, H, K] in q's dtype.

    Args:
      mesh: splits B over dp and fsdp, and H and G over mp and sp, where they divide. None means one device.
      interpret: run the kernel's program on any device, slowly, for tests.
    """
    batch, length, heads, head_dim = q_BTHK.shape
    groups = k_BSGK.shape[2]
    block = min(_BLOCK, -(-length // LANES) * LANES)
    # The kernel needs lengths of whole blocks and a head dimension that is a multiple of 128. Padded keys come after
    # all queries, and zeros do not change the scores. The scale uses the unpadded dimension.
    padding = ((0, 0), (0, 0), (0, -length % block), (0, -head_dim % LANES))
    scaled_BTHK = (q_BTHK.astype(jnp.float32) * head_dim**-0.5).astype(q_BTHK.dtype)
    arrays = [jnp.pad(rearrange(x, "B T H K -> B H T K"), padding) for x in (scaled_BTHK, k_BSGK, v_BSGK)]
    segments_BT = _segments(mask)
    if segments_BT is not None:
        arrays.append(jnp.pad(segments_BT, (padding[0], padding[2])))

    def of_device(q_BHTK, k_BGSK, v_BGSK, *segments):
        from jax.experimental.pallas.ops.tpu import splash_attention as splash  # takes a second

        kernel = _kernel(splash, q_BHTK.shape[1], q_BHTK.shape[2], block, interpret)

        def of_row(q_HTK, k_GSK, v_GSK, *segments_T):
            return kernel(q_HTK, k_GSK, v_GSK, *(splash.SegmentIds(ids_T, ids_T) for ids_T in segments_T))

        return jax.vmap(of_row)(q_BHTK, k_BGSK, v_BGSK, *segments)

    if mesh is not None:
        rows = BATCH_AXES if batch % axis_size(mesh, BATCH_AXES) == 0 else None
        split = HEAD_AXES if math.gcd(heads, groups) % axis_size(mesh, HEAD_AXES) == 0 else None
        specs = (P(rows, split), P(rows, split), P(rows, split), P(rows))[: len(arrays)]
        # The kernel does not say how its results vary over the mesh.
        of_device = jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=P(rows, split), check_vma=False)
    out_BTHK = rearrange(of_device(*arrays), "B H T K -> B T H K")[:, :length, :, :head_dim]
    if mask.valid_BS is None:
        return out_BTHK
    v_BSHK = jnp.repeat(v_BSGK, heads // groups, axis=2)
    return jnp.where((mask.valid_BS != 0)[:, :, None, None], out_BTHK, v_BSHK)  # a padded query attends to itself


def _segments(mask: AttentionMask) -> jax.Array | None:
    """Returns a number for each token, [B, T]: tokens attend to tokens of the same number only. None: to all."""
    if mask.valid_BS is None:
        return mask.first_BT
    return jnp.where(mask.valid_BS != 0, 0 if mask.first_BT is None else mask.first_BT, -1)


def _kernel(splash: Any, heads: int, length: int, block: int, interpret: bool):
    """Returns the causal kernel (q_HTK, k_GSK, v_GSK) -> out_HTK, for one row."""
    blocks = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([causal_mask_class()((length, length))] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )


@functools.cache  # the kernel's own cache compares classes
def causal_mask_class() -> type:
    """Returns the class of causal masks, which gives a block of equal values as a single value.

    For each block, the kernel only needs to know whether any and whether all values are true. Computing every value
    would add a minute to the start for 131,072 tokens.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    class CausalMask(splash.CausalMask):
        def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
            queries, keys = index
            if keys.start >= queries.stop or keys.stop <= queries.start + 1:
                return np.full((1, 1), keys.start < queries.stop)
            return super().__getitem__(index)

    return CausalMask
