"""The layers of a LLaMA as Flax NNX classes over a frozen config."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from EasyLM.errors import UserError
from EasyLM.models.attention import AttentionMask, attention
from EasyLM.models.chunks import join_time, split_time
from EasyLM.models.llama.gathered_matmul import gathered_matmul, split_matmul
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.models.llama.remat_policies import AUTO, AUTOMATIC_POLICIES, REMAT_POLICIES
from EasyLM.models.llama.rotary import rotate
from EasyLM.models.tuning import converted_late
from EasyLM.parallel import BATCH_AXES, GROUP_AXIS, HEAD_AXES, SHARD_AXES, axis_size, constrain

KeysAndValues = tuple[jax.Array, jax.Array]  # [B, T, G, K] each; the keys are rotated


@dataclasses.dataclass(frozen=True)
class Context:
    """The arguments of a forward pass that all blocks share."""

    rope: tuple[jax.Array, jax.Array]  # cosines and sines [B or 1, T, K/2], float32
    mask: AttentionMask
    mesh: Mesh | None
    key: jax.Array | None = None  # PRNG key of dropout; None disables dropout

    @property
    def platform(self) -> str | None:
        """Platform of the mesh's devices, which need not be this process's default backend. None without a mesh."""
        return None if self.mesh is None else self.mesh.devices.flat[0].platform


class RMSNorm(nnx.Module):
    """Root mean square normalization (arXiv 1910.07467) with a learned scale, computed in float32."""

    def __init__(self, config: LLaMAConfig, size: int):
        self.config = config
        self.kernel = nnx.Param(jnp.ones(size))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes the last axis, which has the given size."""
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.config.rms_norm_eps)
        return (y * jnp.expand_dims(self.kernel[...], range(x.ndim - 1))).astype(x.dtype)


class Adapter(nnx.Module):
    """A low-rank product that is added to the output of a linear layer; see `lora`.

    Args:
      a_LIR, b_LRO: the matrices of all layers.
      scale: the factor of the output.
      rate: the rate of dropout on the input.
      index: a number that no other adapter of the block has.
    """

    def __init__(self, a_LIR: jax.Array, b_LRO: jax.Array, scale: float, rate: float, index: int):
        self.lora_a, self.lora_b = nnx.Param(a_LIR), nnx.Param(b_LRO)
        self.scale, self.rate, self.index = scale, rate, index

    def __call__(self, x_BTD: jax.Array, key: jax.Array | None, mesh: Mesh | None) -> jax.Array:
        x_BTD = dropout(x_BTD, None if key is None else jax.random.fold_in(key, self.index), self.rate)
        a_IR, b_RO = self.lora_a[...], self.lora_b[...]
        return self.scale * split_matmul(split_matmul(x_BTD, a_IR, mesh), b_RO, mesh)


class Linear(nnx.Module):
    """Matrix product with a kernel [inputs, outputs], without bias; with an adapter, plus its output.

    The kernel may be int8, with a scale for each output; see `int8_kernels`.

    Args:
      axes: the mesh axes that split inputs and outputs (see `gathered_matmul`).
    """

    def __init__(
        self,
        config: LLaMAConfig,
        inputs: int,
        outputs: int,
        rngs: nnx.Rngs,
        axes: tuple[str, str] = ("fsdp", "mp"),
    ):
        self.axes = axes
        self.kernel = nnx.Param(config.initializer_range * jax.random.normal(rngs(), (inputs, outputs)))
        self.adapter: Adapter | None = nnx.data(None)
        self.scale: nnx.Param | None = nnx.data(None)

    def __call__(self, x_BTD: jax.Array, context: Context | None = None) -> jax.Array:
        """Multiplies. An adapter needs the context's key, that of the block's dropout."""
        mesh, key = (context.mesh, context.key) if context else (None, None)
        kernel_IO = self.kernel[...]
        if self.scale is not None:
            kernel_IO = converted_late(kernel_IO, x_BTD).astype(x_BTD.dtype)
        y_BTD = gathered_matmul(x_BTD, kernel_IO, mesh, self.axes)
        if self.scale is not None:
            y_BTD = (y_BTD * jnp.expand_dims(self.scale[...], (0, 1))).astype(x_BTD.dtype)
        return y_BTD if self.adapter is None else y_BTD + self.adapter(x_BTD, key, mesh)


class Embedding(nnx.Module):
    """Token embeddings [V, D]."""

    def __init__(self, config: LLaMAConfig, rngs: nnx.Rngs):
        shape = config.vocab_size, config.hidden_size
        self.embedding = nnx.Param(config.initializer_range * jax.random.normal(rngs(), shape))

    def __call__(self, tokens_BT: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        """Returns the embeddings [B, T, D]. With an axis sp of the mesh, B and T are split."""
        table_VD = self.embedding[...]
        if mesh is not None and mesh.shape["sp"] > 1:
            # Without this constraint, XLA splits D of the embeddings as it is split in the table, and then exchanges
            # them to split B and T.
            table_VD, tokens_BT = constrain(table_VD, mesh, "mp", None), constrain(tokens_BT, mesh, BATCH_AXES, "sp")
        elif mesh is not None and (GROUP_AXIS in mesh.shape or mesh.shape["dp"] > 1):
            # Without these constraints, XLA exchanges embeddings between the groups or along dp, or gathers them whole.
            tokens_BT = constrain(tokens_BT, mesh, "dp")
            return constrain(jnp.take(table_VD, tokens_BT, axis=0), mesh, "dp", None, SHARD_AXES)
        return jnp.take(table_VD, tokens_BT, axis=0)


class Attention(nnx.Module):
    """Causal self-attention of grouped queries (arXiv 2305.13245), with rotary position embedding."""

    def __init__(self, config: LLaMAConfig, rngs: nnx.Rngs):
        self.config = config
        all_heads, kv_heads = config.hidden_size, config.kv_heads * config.head_dim
        self.wq, self.wk, self.wv = (
            Linear(config, config.hidden_size, outputs, rngs) for outputs in (all_heads, kv_heads, kv_heads)
        )
        self.wo = Linear(config, all_heads, config.hidden_size, rngs, ("mp", "fsdp"))
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(config, config.head_dim) for _ in range(2))

    def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, KeysAndValues]:
        """Returns the output [B, T, D], and the keys and values for a cache."""
        c = self.config
        q_BTHK, k_BTGK, v_BTGK = self.project(x_BTD, context)
        try:
            out_BTHK = attention(
                q_BTHK,
                self._split_like_queries(k_BTGK, context.mesh),
                self._split_like_queries(v_BTGK, context.mesh),
                context.mask,
                platform=context.platform,
                mesh=context.mesh,
                implementation="blockwise" if c.scan_attention else c.attention_implementation,
                query_chunk=c.scan_query_chunk_size,
                key_chunk=c.scan_key_chunk_size,
            )
        except UserError as error:
            raise UserError(f"llama.attention_implementation={c.attention_implementation!r}: {error}") from None
        # Where mp does not divide the heads, cuDNN's custom call gets all of them on each device along mp. Without this
        # constraint, XLA would split them for the product, which it cannot do for that call.
        out_BTHK = constrain(out_BTHK, context.mesh, BATCH_AXES, "sp", "mp")
        return checkpoint_name(self.wo(merge_heads(out_BTHK), context), "output"), (k_BTGK, v_BTGK)

    def project(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns rotated queries [B, T, H, K], rotated keys and values [B, T, G, K]."""

        def heads(linear: Linear, name: str) -> jax.Array:
            x_BTHK = split_heads(linear(x_BTD, context), self.config.head_dim)
            return checkpoint_name(constrain(x_BTHK, context.mesh, BATCH_AXES, "sp", "mp"), name)

        q_BTHK, k_BTGK, v_BTGK = heads(self.wq, "query"), heads(self.wk, "key"), heads(self.wv, "value")
        if self.config.qk_norm:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        q_BTHK, k_BTGK = (rotate(x_BTHK, context.rope, context.platform) for x_BTHK in (q_BTHK, k_BTGK))
        return q_BTHK, k_BTGK, v_BTGK

    def _split_like_queries(self, x_BTGK, mesh):
        """Repeats keys or values for each query head if `mp` x `sp` divides the queries' heads, but not the groups.

        Each device then has the keys of its own queries. Keys that are not split would take the same memory.
        """
        heads, kv_heads = self.config.num_attention_heads, self.config.kv_heads
        ways = 1 if mesh is None or heads == kv_heads else axis_size(mesh, HEAD_AXES)
        if kv_heads % ways == 0 or heads % ways:
            return x_BTGK
        return constrain(jnp.repeat(x_BTGK, heads // kv_heads, axis=2), mesh, BATCH_AXES, "sp", "mp")


def split_heads(x_BTD: jax.Array, head_dim: int) -> jax.Array:
    """Reshapes [B, T, H * K] to [B, T, H, K]."""
    return rearrange(x_BTD, "B T (H K) -> B T H K", K=head_dim)


def merge_heads(x_BTHK: jax.Array) -> jax.Array:
    """Reshapes [B, T, H, K] to [B, T, D]."""
    return rearrange(x_BTHK, "B T H K -> B T (H K)")


class FeedForward(nnx.Module):
    """Feed-forward network with SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LLaMAConfig, rngs: nnx.Rngs):
        self.config = config
        self.w1 = Linear(config, config.hidden_size, config.intermediate_size, rngs)  # gate
        self.w2 = Linear(config, config.intermediate_size, config.hidden_size, rngs, ("mp", "fsdp"))  # down
        self.w3 = Linear(config, config.hidden_size, config.intermediate_size, rngs)  # up

    def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        if not self.config.scan_mlp:
            return self._swiglu(x_BTD, context)
        length, parts = x_BTD.shape[1], 1 if context.mesh is None else context.mesh.shape["sp"]
        chunk = max(min(self.config.scan_mlp_chunk_size, length) // parts, 1) * parts
        x_CBtD = split_time(x_BTD, chunk, parts)
        y_CBtD = jax.lax.map(jax.checkpoint(lambda x_BtD: self._swiglu(x_BtD, context)), x_CBtD)
        return join_time(y_CBtD, length, parts)

    def _swiglu(self, x_BTD, context):
        gate_BTF, up_BTF = (
            checkpoint_name(constrain(w(x_BTD, context), context.mesh, BATCH_AXES, "sp", "mp"), name)
            for name, w in (("gate", self.w1), ("up", self.w3))
        )
        return self.w2(jax.nn.silu(gate_BTF) * up_BTF, context)


class Block(nnx.Module):
    """Attention and a feed-forward network. Each has its own norm and adds its output to the residual stream."""

    def __init__(self, config: LLaMAConfig, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = RMSNorm(config, config.hidden_size)
        self.attention = Attention(config, rngs)
        self.ffn_norm = RMSNorm(config, config.hidden_size)
        self.feed_forward = FeedForward(config, rngs)

    def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, KeysAndValues]:
        """Returns the residual stream [B, T, D], and the keys and values of the attention."""
        c = self.config
        keys = (None,) * 3 if context.key is None else jax.random.split(context.key, 3)
        context = dataclasses.replace(context, mask=context.mask.with_dropout(keys[0], c.attn_pdrop))
        attend = remat(lambda x: self.attention(self.attention_norm(x), context), c.remat_attention)
        feed_forward = remat(lambda x: self.feed_forward(self.ffn_norm(x), context), c.remat_mlp)
        added_BTD, cache = attend(x_BTD)
        x_BTD = x_BTD + dropout(added_BTD, keys[1], c.resid_pdrop)
        x_BTD = x_BTD + dropout(feed_forward(x_BTD), keys[2], c.resid_pdrop)
        return constrain(x_BTD, context.mesh, BATCH_AXES, "sp"), cache


def dropout(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    """Zeroes elements with probability `rate` and scales up the others. Without a key, returns `x`."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def remat(function: Callable, policy: str, scanned: bool = False) -> Callable:
    """Applies `jax.checkpoint` with a policy of REMAT_POLICIES. Policy "" returns the function unchanged.

    An unresolved policy "auto" (see `memory`) means the policy that recomputes the least.
    """
    if not policy:
        return function
    if policy == AUTO:
        policy = next(iter(AUTOMATIC_POLICIES))
    return jax.checkpoint(function, policy=REMAT_POLICIES[policy], prevent_cse=not scanned)
