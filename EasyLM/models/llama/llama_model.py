"""LLaMA (arXiv 2302.13971) as plain Flax NNX classes over a frozen config, and pure functions over its parameters.

Shapes: B batch, T tokens of a row, D hidden size, F feed-forward size, H heads, K head dimension, V vocabulary.
Parameters are a nested dict `{"params": {"transformer": ..., "lm_head": ...}}`; each array of `transformer/h` has all
layers, stacked along a leading axis.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM.models import losses
from EasyLM.models.attention import Pattern, attention
from EasyLM.models.llama.llama_config import REMAT_POLICIES, LLaMAConfig
from EasyLM.parallel import BATCH_AXES

_LOSS_TOKENS = 8192  # of one device, whose float32 logits exist at once: 270 MB
_LANES = 128  # kernels want matrix dimensions that are multiples of this; 8292 is not even one of 8


@dataclasses.dataclass(frozen=True)
class Context:
    """What a forward pass shares among its blocks."""

    rope: tuple[jax.Array, jax.Array]  # cosines and sines [B or 1, T, K/2], float32
    pattern: Pattern
    mesh: Mesh | None
    key: jax.Array | None = None  # of dropout; None: none


class RMSNorm(nnx.Module):
    def __init__(self, config: LLaMAConfig):
        self.config = config
        self.kernel = nnx.Param(jnp.ones(config.hidden_size))

    def __call__(self, x_BTD):
        y_BTD = x_BTD.astype(jnp.float32)
        y_BTD *= jax.lax.rsqrt(jnp.square(y_BTD).mean(-1, keepdims=True) + self.config.rms_norm_eps)
        return (y_BTD * self.kernel[...][None, None, :]).astype(x_BTD.dtype)


class Linear(nnx.Module):
    def __init__(self, config: LLaMAConfig, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(config.initializer_range * jax.random.normal(rngs(), (inputs, outputs)))

    def __call__(self, x_BTD):
        return matmul(x_BTD, self.kernel[...].astype(x_BTD.dtype))


class Embedding(nnx.Module):
    def __init__(self, config: LLaMAConfig, rngs: nnx.Rngs):
        shape = config.vocab_size, config.hidden_size
        self.embedding = nnx.Param(config.initializer_range * jax.random.normal(rngs(), shape))

    def __call__(self, tokens_BT):
        return jnp.take(self.embedding[...], tokens_BT, axis=0)


class Attention(nnx.Module):
    def __init__(self, config: LLaMAConfig, rngs: nnx.Rngs):
        self.config = config
        self.wq, self.wk, self.wv, self.wo = (
            Linear(config, config.hidden_size, config.hidden_size, rngs) for _ in range(4)
        )

    def __call__(self, x_BTD, context: Context):
        """Returns the attention's output [B, T, D], and its keys and values [B, T, H, K] for a cache."""
        c = self.config
        q_BTHK, k_BTHK, v_BTHK = self.project(x_BTD, context)
        out_BTHK = attention(
            q_BTHK,
            k_BTHK,
            v_BTHK,
            context.pattern,
            implementation="blockwise" if c.scan_attention else c.attention_implementation,
            query_chunk=c.scan_query_chunk_size,
            key_chunk=c.scan_key_chunk_size,
        )
        return self.wo(out_BTHK.reshape(x_BTD.shape)), (k_BTHK, v_BTHK)

    def project(self, x_BTD, context: Context):
        """Queries and keys, both rotated, and values."""
        heads = (*x_BTD.shape[:2], self.config.num_attention_heads, self.config.head_dim)
        q_BTHK, k_BTHK, v_BTHK = (
            constrain(w(x_BTD).reshape(heads), context.mesh, BATCH_AXES, None, "mp")
            for w in (self.wq, self.wk, self.wv)
        )
        return rotate(q_BTHK, context.rope), rotate(k_BTHK, context.rope), v_BTHK


class FeedForward(nnx.Module):
    def __init__(self, config: LLaMAConfig, rngs: nnx.Rngs):
        self.config = config
        self.w1 = Linear(config, config.hidden_size, config.intermediate_size, rngs)  # gate
        self.w2 = Linear(config, config.intermediate_size, config.hidden_size, rngs)  # down
        self.w3 = Linear(config, config.hidden_size, config.intermediate_size, rngs)  # up

    def __call__(self, x_BTD, context: Context):
        chunk = min(self.config.scan_mlp_chunk_size, x_BTD.shape[1])
        if not self.config.scan_mlp:
            return self._swiglu(x_BTD, context.mesh)
        x_BTD, length = jnp.pad(x_BTD, ((0, 0), (0, -x_BTD.shape[1] % chunk), (0, 0))), x_BTD.shape[1]
        x_CBtD = x_BTD.reshape(x_BTD.shape[0], -1, chunk, x_BTD.shape[2]).swapaxes(0, 1)
        y_CBtD = jax.lax.map(jax.checkpoint(lambda x_BtD: self._swiglu(x_BtD, context.mesh)), x_CBtD)
        return y_CBtD.swapaxes(0, 1).reshape(x_BTD.shape)[:, :length]

    def _swiglu(self, x_BTD, mesh):
        gate_BTF, up_BTF = (constrain(w(x_BTD), mesh, BATCH_AXES, None, "mp") for w in (self.w1, self.w3))
        return self.w2(jax.nn.silu(gate_BTF) * up_BTF)


class Block(nnx.Module):
    def __init__(self, config: LLaMAConfig, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs)
        self.ffn_norm = RMSNorm(config)
        self.feed_forward = FeedForward(config, rngs)

    def __call__(self, x_BTD, context: Context):
        """Returns the residual stream [B, T, D], and the attention's keys and values [B, T, H, K]."""
        c = self.config
        keys = (None,) * 3 if context.key is None else jax.random.split(context.key, 3)
        context = dataclasses.replace(context, pattern=context.pattern.with_dropout(keys[0], c.attn_pdrop))
        attend = _remat(lambda x: self.attention(self.attention_norm(x), context), c.remat_attention)
        feed_forward = _remat(lambda x: self.feed_forward(self.ffn_norm(x), context), c.remat_mlp)
        added_BTD, cache = attend(x_BTD)
        x_BTD = x_BTD + dropout(added_BTD, keys[1], c.resid_pdrop)
        x_BTD = x_BTD + dropout(feed_forward(x_BTD), keys[2], c.resid_pdrop)
        return constrain(x_BTD, context.mesh, BATCH_AXES), cache


class Transformer(nnx.Module):
    def __init__(self, config: LLaMAConfig, rngs: nnx.Rngs):
        self.config = config
        self.wte = Embedding(config, rngs)
        self.h = nnx.vmap(lambda key: Block(config, nnx.Rngs(key)))(jax.random.split(rngs(), config.num_hidden_layers))
        self.ln_f = RMSNorm(config)

    def __call__(self, tokens_BT, context: Context, dtype):
        """The normalised last hidden states [B, T, D]."""
        c = self.config
        keys = None if context.key is None else jax.random.split(context.key, c.num_hidden_layers + 1)
        x_BTD = constrain(self.wte(tokens_BT).astype(dtype), context.mesh, BATCH_AXES)
        x_BTD = dropout(x_BTD, None if keys is None else keys[-1], c.embd_pdrop)
        graph, stacked = nnx.split(self.h)

        def block(x_BTD, layer):
            params, key = layer
            return nnx.merge(graph, params)(x_BTD, dataclasses.replace(context, key=key))[0]

        block = _remat(block, c.remat_block, scanned=c.scan_layers)
        layers = stacked, None if keys is None else keys[:-1]
        if c.scan_layers:
            x_BTD = jax.lax.scan(lambda x_BTD, layer: (block(x_BTD, layer), None), x_BTD, layers)[0]
        else:
            for layer in unstack(layers, c.num_hidden_layers):
                x_BTD = block(x_BTD, layer)
        return self.ln_f(x_BTD)


class LLaMA(nnx.Module):
    def __init__(self, config: LLaMAConfig, rngs: nnx.Rngs):
        self.config = config
        self.transformer = Transformer(config, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config, config.hidden_size, config.vocab_size, rngs)

    @property
    def head_DV(self):
        if self.config.tie_word_embeddings:
            return self.transformer.wte.embedding[...].T
        return self.lm_head.kernel[...]


def init_params(config: LLaMAConfig, key: jax.Array) -> dict:
    """Fresh float32 parameters: normal with deviation `initializer_range`, norms 1."""
    return {"params": nnx.to_pure_dict(nnx.state(LLaMA(config, nnx.Rngs(key))))}


def apply(
    config: LLaMAConfig,
    params: dict,
    tokens_BT: jax.Array,
    *,
    attention_mask_BT: jax.Array | None = None,
    position_ids_BT: jax.Array | None = None,
    dtype=jnp.float32,
    key: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Logits [B, T, V] in `dtype`; logits at t are of the token at t + 1.

    Args:
      attention_mask_BT: 1 for a token, 0 for padding (on the left); None: no padding.
      position_ids_BT: positions from 0; by default they count the tokens of the mask.
      dtype: of activations and of the kernels' copies; norms, rotary angles and softmax are float32 always.
      key: PRNG key of dropout and of the forgetful causal mask; None: neither.
      mesh: where activations are split: the batch over dp and fsdp, heads and feed-forward over mp.
    """
    hidden_BTD, head_DV = hidden_states(
        config,
        params,
        tokens_BT,
        attention_mask_BT=attention_mask_BT,
        position_ids_BT=position_ids_BT,
        dtype=dtype,
        key=key,
        mesh=mesh,
    )
    return logits(hidden_BTD, head_DV, mesh)


def hidden_states(
    config, params, tokens_BT, *, attention_mask_BT=None, position_ids_BT=None, dtype=jnp.float32, key=None, mesh=None
) -> tuple[jax.Array, jax.Array]:
    """The normalised last hidden states [B, T, D] and the head's kernel [D, V], both in `dtype`; see `apply`."""
    assert tokens_BT.shape[1] <= config.max_sequence_length, "checked by whoever builds batches"
    keys = (None, None) if key is None else jax.random.split(key)
    forgets = config.fcm_max_ratio > 0
    pattern = Pattern(attention_mask_BT, keys[1] if forgets else None, (config.fcm_min_ratio, config.fcm_max_ratio))
    if position_ids_BT is None:
        position_ids_BT = positions(tokens_BT.shape[1], attention_mask_BT)
    context = Context(rotary_table(config, position_ids_BT), pattern, mesh, keys[0])
    model = with_params(config, params, dtype)
    return model.transformer(tokens_BT, context, dtype), model.head_DV.astype(dtype)


def logits(hidden_BTD: jax.Array, head_DV: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """hidden @ head. In half precision the vocabulary is filled up to whole lanes for the product, then cut again."""
    vocab_size = head_DV.shape[1]
    if head_DV.dtype != jnp.float32:
        head_DV = jnp.pad(head_DV, ((0, 0), (0, -vocab_size % _LANES)))
    return constrain(matmul(hidden_BTD, head_DV)[..., :vocab_size], mesh, BATCH_AXES, None, "mp")


def make_loss_fn(config: LLaMAConfig, dtype, mesh: Mesh | None = None):
    """`loss_fn(params, batch, key) -> (loss, {"accuracy": ...})` for batches as data rows have them."""

    ways = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)

    def loss_fn(params, batch, key):
        tokens_BT, targets_BT, masks_BT = batch["input_tokens"], batch["target_tokens"], batch["loss_masks"]
        hidden_BTD, head_DV = hidden_states(config, params, tokens_BT, dtype=dtype, key=key, mesh=mesh)
        chunk = tokens_BT.shape[1] * _LOSS_TOKENS * ways // tokens_BT.size
        to_logits = functools.partial(logits, mesh=mesh)
        if chunk < tokens_BT.shape[1]:
            loss, accuracy = losses.chunked_cross_entropy_and_accuracy(
                to_logits, hidden_BTD, head_DV, targets_BT, masks_BT, max(chunk, 1)
            )
        else:
            logits_BTV = to_logits(hidden_BTD, head_DV)
            loss, accuracy = losses.cross_entropy_and_accuracy(logits_BTV, targets_BT, masks_BT)
        return loss, {"accuracy": accuracy}

    return loss_fn


def positions(length: int, attention_mask_BT: jax.Array | None) -> jax.Array:
    """Position ids [B or 1, T]: a token's count among the tokens of its row, from 0; padding on the left has 0."""
    if attention_mask_BT is None:
        return jnp.arange(length)[None]
    return jnp.clip(jnp.cumsum(attention_mask_BT, axis=-1) - 1, 0)


def rotary_table(config: LLaMAConfig, position_ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, K/2] of RoPE's angles (arXiv 2104.09864), float32: bf16 has 524 values below 4096."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angles_BTk = position_ids_BT[..., None].astype(jnp.float32) / (config.rope_theta**exponents)[None, None, :]
    return jnp.cos(angles_BTk), jnp.sin(angles_BTk)


def rotate(x_BTHK: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each interleaved pair (2i, 2i+1) of a head by its angle."""
    cos, sin = (table_BTk[:, :, None, :] for table_BTk in rope)
    pairs = x_BTHK.astype(jnp.float32).reshape(*x_BTHK.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return jnp.stack((even * cos - odd * sin, even * sin + odd * cos), -1).reshape(x_BTHK.shape).astype(x_BTHK.dtype)


def matmul(x_BTD: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    """x @ kernel over flat tokens: contracting two token axes, XLA's CPU backend copies the gradient, transposed."""
    return (x_BTD.reshape(-1, x_BTD.shape[-1]) @ kernel_DF).reshape(*x_BTD.shape[:-1], -1)


def dropout(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    """Zeroes a share `rate` of x and scales the rest up; nothing without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def unstack(tree, num_layers: int) -> list:
    """One tree per layer. Split, not sliced: a split's gradient is one concatenation, slices' as many additions."""
    leaves, structure = jax.tree.flatten(tree)
    layers = zip(*(jax.lax.split(leaf, (1,) * num_layers) for leaf in leaves), strict=True)
    return [structure.unflatten(leaf[0] for leaf in layer) for layer in layers]


def with_params(config: LLaMAConfig, params: dict, dtype) -> LLaMA:
    """The model over these parameters, its kernels cast to `dtype`."""
    return nnx.merge(_graph(config), with_kernels(params["params"], dtype))


@functools.lru_cache
def _graph(config: LLaMAConfig):
    return nnx.split(nnx.eval_shape(lambda: LLaMA(config, nnx.Rngs(0))))[0]


def with_kernels(params: dict, dtype) -> dict:
    """The parameters with kernels in the compute dtype, cast once: stacked copies and their gradients then have its
    size. Not so norms and the embedding, whose gradient adds up many rows."""

    def cast(path, array):
        names = {key.key for key in path}
        return array if names & {"wte", "ln_f", "attention_norm", "ffn_norm"} else array.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def _remat(function, policy: str, scanned: bool = False):
    if not policy:
        return function
    return jax.checkpoint(function, policy=REMAT_POLICIES[policy], prevent_cse=not scanned)


def constrain(x: jax.Array, mesh: Mesh | None, *axes) -> jax.Array:
    """Splits the leading dimensions of x over mesh axes, where they divide."""
    if mesh is None:
        return x
    fitting = [
        axis
        if axis is None or size % math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis)) == 0
        else None
        for size, axis in zip(x.shape, axes, strict=False)
    ]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*fitting)))
