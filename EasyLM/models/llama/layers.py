"""The layers of a LLaMA as Flax NNX classes over a frozen config."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh

from EasyLM.errors import UserError
from EasyLM.models.attention import AttentionMask, attention
from EasyLM.models.chunks import join_time, split_time
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.models.llama.remat_policies import REMAT_POLICIES
from EasyLM.models.llama.rotary import rotate
from EasyLM.models.tuning import flat_matmul
from EasyLM.parallel import BATCH_AXES, constrain

KeysAndValues = tuple[jax.Array, jax.Array]  # [B, T, H, K] each; the keys are rotated


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
    """Root mean square normalisation (arXiv 1910.07467) with a learned scale, computed in float32."""

    def __init__(self, config: LLaMAConfig):
        self.config = config
        self.kernel = nnx.Param(jnp.ones(config.hidden_size))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        y_BTD = x_BTD.astype(jnp.float32)
        y_BTD *= jax.lax.rsqrt(jnp.square(y_BTD).mean(-1, keepdims=True) + self.config.rms_norm_eps)
        return (y_BTD * self.kernel[...][None, None, :]).astype(x_BTD.dtype)


class Linear(nnx.Module):
    """Matrix product with a kernel [inputs, outputs], without bias."""

    def __init__(self, config: LLaMAConfig, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(config.initializer_range * jax.random.normal(rngs(), (inputs, outputs)))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return flat_matmul(x_BTD, self.kernel[...].astype(x_BTD.dtype))


class Embedding(nnx.Module):
    """Token embeddings [V, D]."""

    def __init__(self, config: LLaMAConfig, rngs: nnx.Rngs):
        shape = config.vocab_size, config.hidden_size
        self.embedding = nnx.Param(config.initializer_range * jax.random.normal(rngs(), shape))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return jnp.take(self.embedding[...], tokens_BT, axis=0)


class Attention(nnx.Module):
    """Multi-head causal self-attention with rotary position embedding."""

    def __init__(self, config: LLaMAConfig, rngs: nnx.Rngs):
        self.config = config
        self.wq, self.wk, self.wv, self.wo = (
            Linear(config, config.hidden_size, config.hidden_size, rngs) for _ in range(4)
        )

    def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, KeysAndValues]:
        """Returns the output [B, T, D], and the keys and values for a cache."""
        c = self.config
        q_BTHK, k_BTHK, v_BTHK = self.project(x_BTD, context)
        try:
            out_BTHK = attention(
                q_BTHK,
                k_BTHK,
                v_BTHK,
                context.mask,
                platform=context.platform,
                implementation="blockwise" if c.scan_attention else c.attention_implementation,
                query_chunk=c.scan_query_chunk_size,
                key_chunk=c.scan_key_chunk_size,
            )
        except UserError as error:
            raise UserError(f"llama.attention_implementation={c.attention_implementation!r}: {error}") from None
        return self.wo(merge_heads(out_BTHK)), (k_BTHK, v_BTHK)

    def project(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns rotated queries, rotated keys, and values: [B, T, H, K] each."""
        heads = self.config.num_attention_heads
        q_BTHK, k_BTHK, v_BTHK = (
            constrain(rearrange(w(x_BTD), "B T (H K) -> B T H K", H=heads), context.mesh, BATCH_AXES, None, "mp")
            for w in (self.wq, self.wk, self.wv)
        )
        return rotate(q_BTHK, context.rope), rotate(k_BTHK, context.rope), v_BTHK


def merge_heads(x_BTHK: jax.Array) -> jax.Array:
    """Reshapes [B, T, H, K] to [B, T, D]."""
    return rearrange(x_BTHK, "B T H K -> B T (H K)")


class FeedForward(nnx.Module):
    """Feed-forward network with SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LLaMAConfig, rngs: nnx.Rngs):
        self.config = config
        self.w1 = Linear(config, config.hidden_size, config.intermediate_size, rngs)  # gate
        self.w2 = Linear(config, config.intermediate_size, config.hidden_size, rngs)  # down
        self.w3 = Linear(config, config.hidden_size, config.intermediate_size, rngs)  # up

    def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        if not self.config.scan_mlp:
            return self._swiglu(x_BTD, context.mesh)
        length = x_BTD.shape[1]
        x_CBtD = split_time(x_BTD, min(self.config.scan_mlp_chunk_size, length))
        y_CBtD = jax.lax.map(jax.checkpoint(lambda x_BtD: self._swiglu(x_BtD, context.mesh)), x_CBtD)
        return join_time(y_CBtD, length)

    def _swiglu(self, x_BTD, mesh):
        gate_BTF, up_BTF = (constrain(w(x_BTD), mesh, BATCH_AXES, None, "mp") for w in (self.w1, self.w3))
        return self.w2(jax.nn.silu(gate_BTF) * up_BTF)


class Block(nnx.Module):
    """Attention and a feed-forward network. Each has its own norm and adds its output to the residual stream."""

    def __init__(self, config: LLaMAConfig, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs)
        self.ffn_norm = RMSNorm(config)
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
        return constrain(x_BTD, context.mesh, BATCH_AXES), cache


def dropout(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    """Zeroes elements with probability `rate` and scales up the others. Without a key, returns `x`."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def remat(function: Callable, policy: str, scanned: bool = False) -> Callable:
    """Applies `jax.checkpoint` with a policy of REMAT_POLICIES. Policy "" returns the function unchanged."""
    if not policy:
        return function
    return jax.checkpoint(function, policy=REMAT_POLICIES[policy], prevent_cse=not scanned)
