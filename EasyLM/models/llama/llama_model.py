"""The LLaMA model (arXiv 2302.13971), and pure functions of its parameters.

The parameters are a nested dict `{"params": {"transformer": ..., "lm_head": ...}}`. Each array below `transformer/h`
stacks all layers along the leading axis.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from EasyLM.models import losses
from EasyLM.models.attention import AttentionMask
from EasyLM.models.llama.gathered_matmul import split_matmul
from EasyLM.models.llama.layers import Adapter, Block, Context, Embedding, Linear, RMSNorm, dropout, remat
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.models.llama.lora import TARGETS, LoRAConfig
from EasyLM.models.llama.rotary import first_tokens, positions, rotary_table
from EasyLM.models.tuning import LANES
from EasyLM.parallel import BATCH_AXES, TOKEN_AXES, axis_size, constrain

# Tokens per device whose float32 logits are in memory at once. A vocabulary of 8292 needs 270 MB.
LOGITS_TOKENS = 8192


class Transformer(nnx.Module):
    """The embedding, the blocks and the final norm."""

    def __init__(self, config: LLaMAConfig, rngs: nnx.Rngs):
        self.config = config
        self.wte = Embedding(config, rngs)
        self.h = nnx.vmap(lambda key: Block(config, nnx.Rngs(key)))(jax.random.split(rngs(), config.num_hidden_layers))
        self.ln_f = RMSNorm(config, config.hidden_size)

    def __call__(self, tokens_BT: jax.Array, context: Context, dtype: DTypeLike) -> jax.Array:
        """Returns the last hidden states [B, T, D] after the final norm."""
        c = self.config
        keys = None if context.key is None else jax.random.split(context.key, c.num_hidden_layers + 1)
        x_BTD = constrain(self.wte(tokens_BT, context.mesh).astype(dtype), context.mesh, BATCH_AXES, "sp")
        x_BTD = dropout(x_BTD, None if keys is None else keys[-1], c.embd_pdrop)
        graph, stacked = nnx.split(self.h)

        def block(x_BTD, layer):
            params, key = layer
            return nnx.merge(graph, params)(x_BTD, dataclasses.replace(context, key=key))[0]

        block = remat(block, c.remat_block, scanned=c.scan_layers)
        keys = None if keys is None else keys[:-1]
        if c.scan_layers:
            x_BTD = jax.lax.scan(lambda x_BTD, layer: (block(x_BTD, layer), None), x_BTD, (stacked, keys))[0]
        else:
            # Without the barrier, XLA fuses the concatenation of the layers' gradients into the optimizer's kernels,
            # which then search the layer of each element (vqlm_3b on an H100: 93 instead of 29 ms).
            stacked = jax.lax.optimization_barrier(stacked)
            for layer in unstack((stacked, keys), c.num_hidden_layers):
                x_BTD = block(x_BTD, layer)
        return self.ln_f(x_BTD)


class LLaMA(nnx.Module):
    """A transformer with an output head."""

    def __init__(self, config: LLaMAConfig, rngs: nnx.Rngs):
        self.config = config
        self.transformer = Transformer(config, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config, config.hidden_size, config.vocab_size, rngs)

    @property
    def head_DV(self) -> jax.Array:
        """The kernel of the head. With tied embeddings it is the transposed embedding."""
        if self.config.tie_word_embeddings:
            return self.transformer.wte.embedding[...].T
        return self.lm_head.kernel[...]


def init_params(config: LLaMAConfig, key: jax.Array) -> dict:
    """Returns initial float32 parameters. Norms are 1; others are normal with deviation `initializer_range`."""
    return {"params": nnx.to_pure_dict(nnx.state(LLaMA(config, nnx.Rngs(key))))}


def apply(
    config: LLaMAConfig, params: dict, tokens_BT: jax.Array, *, mesh: Mesh | None = None, **options: Any
) -> jax.Array:
    """Returns logits [B, T, V] in `dtype`. The logits at t predict the token at t + 1.

    All arguments are those of `hidden_states`.
    """
    return logits(*hidden_states(config, params, tokens_BT, mesh=mesh, **options), mesh)


def hidden_states(
    config: LLaMAConfig,
    params: dict,
    tokens_BT: jax.Array,
    *,
    attention_mask_BT: jax.Array | None = None,
    position_ids_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    dtype: DTypeLike = jnp.float32,
    key: jax.Array | None = None,
    mesh: Mesh | None = None,
    lora: LoRAConfig | None = None,
    wide_gradients: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns the last hidden states [B, T, D] after the final norm, and the head's kernel [D, V], in `dtype`.

    Args:
      attention_mask_BT: 1 for a token, 0 for padding on the left. None means no padding.
      position_ids_BT: positions, counted from 0. By default, the index of a token among the unpadded tokens, or in its
        document.
      segment_ids_BT: the document of each token; the tokens of a document are consecutive. A token attends to its own
        document only. None means that a row is one document.
      dtype: the type of activations and kernels. Norms, rotary angles and softmax are float32.
      key: PRNG key of dropout and of the forgetful causal mask. None disables both.
      mesh: the mesh of the activations. The batch is split over dp and fsdp, its tokens over sp; heads and feed-forward
        over mp.
      lora: the settings of the adapters in `params`; None: it holds none.
      wide_gradients: kernels keep their type, float32, until each product, and so do their gradients while devices sum
        them. The head's kernel has this type too.
    """
    assert tokens_BT.shape[1] <= config.max_sequence_length, "the caller checks the length"
    keys = (None, None) if key is None else jax.random.split(key)
    forgets = config.fcm_max_ratio > 0
    ratios = config.fcm_min_ratio, config.fcm_max_ratio
    first_BT = None if segment_ids_BT is None else first_tokens(segment_ids_BT)
    mask = AttentionMask(attention_mask_BT, keys[1] if forgets else None, ratios, first_BT=first_BT)
    if position_ids_BT is None:
        position_ids_BT = positions(tokens_BT.shape[1], attention_mask_BT, first_BT)
    cos, sin = (constrain(table_BTk, mesh, BATCH_AXES, "sp") for table_BTk in rotary_table(config, position_ids_BT))
    context = Context((cos, sin), mask, mesh, keys[0])
    model = with_params(config, params, None if wide_gradients else dtype, lora)
    head_DV = model.head_DV if wide_gradients else model.head_DV.astype(dtype)
    return model.transformer(tokens_BT, context, dtype), head_DV


def logits(hidden_BTD: jax.Array, head_DV: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """Returns hidden @ head, [B, T, V]. Types other than float32 use a padded vocabulary, except on TPUs."""
    vocab_size = head_DV.shape[1]
    # TPUs pad arrays in memory by themselves. Their compiler fails on the gradient of the padding with chunks of logits
    # and a mesh such as 2,4,1: it scatters sums with the padding where it needs sums without it (libtpu 0.0.42).
    is_padded_in_memory = mesh is not None and mesh.devices.flat[0].platform == "tpu"
    if hidden_BTD.dtype != jnp.float32 and not is_padded_in_memory:
        head_DV = jnp.pad(head_DV, ((0, 0), (0, -vocab_size % LANES)))
    return constrain(split_matmul(hidden_BTD, head_DV, mesh)[..., :vocab_size], mesh, BATCH_AXES, "sp", "mp")


def make_loss_fn(
    config: LLaMAConfig,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    lora: LoRAConfig | None = None,
    wide_gradients: bool = False,
) -> Callable:
    """Returns `loss_fn(params, batch, key) -> (loss, metrics)`; `accuracy` is a metric.

    With a z-loss, the metric `loss` is the cross-entropy alone, and `z_loss` the mean of log^2 Z.

    A batch holds `input_tokens`, `target_tokens` and `loss_masks`, [B, T] each. With a document mask it also holds
    `segment_ids`.

    The other arguments are those of `hidden_states`.
    """
    parts, num_shards = (1, 1) if mesh is None else (mesh.shape["sp"], axis_size(mesh, TOKEN_AXES))

    def loss_fn(params, batch, key):
        tokens_BT, targets_BT, masks_BT = batch["input_tokens"], batch["target_tokens"], batch["loss_masks"]
        hidden_BTD, head_DV = hidden_states(
            config,
            params,
            tokens_BT,
            segment_ids_BT=batch.get("segment_ids"),
            dtype=dtype,
            key=key,
            mesh=mesh,
            lora=lora,
            wide_gradients=wide_gradients,
        )
        chunk = tokens_BT.shape[1] * LOGITS_TOKENS * num_shards // tokens_BT.size
        to_logits = functools.partial(logits, mesh=mesh)
        if chunk < tokens_BT.shape[1]:
            chunk = max(chunk // parts, 1) * parts
            loss, accuracy, *z_loss = losses.chunked_cross_entropy_and_accuracy(
                to_logits, hidden_BTD, head_DV, targets_BT, masks_BT, chunk, config.z_loss_weight, parts
            )
        else:
            logits_BTV = to_logits(hidden_BTD, head_DV)
            loss, accuracy, *z_loss = losses.cross_entropy_and_accuracy(
                logits_BTV, targets_BT, masks_BT, config.z_loss_weight
            )
        if not z_loss:
            return loss, {"accuracy": accuracy}
        cross_entropy = loss - config.z_loss_weight * z_loss[0]
        return loss, {"accuracy": accuracy, "loss": cross_entropy, "z_loss": z_loss[0]}

    return loss_fn


def unstack(tree: Any, num_layers: int) -> list:
    """Splits stacked arrays into one tree per layer. The gradient of a split is a single concatenation."""
    leaves, structure = jax.tree.flatten(tree)
    layers = zip(*(jax.lax.split(leaf, (1,) * num_layers) for leaf in leaves), strict=True)
    return [jax.tree.unflatten(structure, [leaf[0] for leaf in layer]) for layer in layers]


def with_params(config: LLaMAConfig, params: dict, dtype: DTypeLike | None, lora: LoRAConfig | None = None) -> LLaMA:
    """Returns the model with these parameters. Kernels are cast to `dtype`, or keep their type if it is None."""
    params = params["params"]
    return nnx.merge(_graph(config, lora), params if dtype is None else with_kernels(params, dtype))


@functools.lru_cache
def _graph(config: LLaMAConfig, lora: LoRAConfig | None) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: new_model(config, lora)))[0]


def new_model(config: LLaMAConfig, lora: LoRAConfig | None) -> LLaMA:
    """Returns a model with adapters of zeros beside the kernels that `lora` names."""
    model = LLaMA(config, nnx.Rngs(0))
    if lora is None:
        return model
    for index, name in enumerate(lora.targets):
        part, layer = TARGETS[name]
        linear = getattr(getattr(model.transformer.h, part), layer)
        num_layers, inputs, outputs = linear.kernel.shape
        a_LIR, b_LRO = jnp.zeros((num_layers, inputs, lora.rank)), jnp.zeros((num_layers, lora.rank, outputs))
        linear.adapter = Adapter(a_LIR, b_LRO, lora.scale, lora.dropout, index)
    return model


def with_kernels(params: dict, dtype: DTypeLike) -> dict:
    """Casts the stacked kernels to `dtype`, so the copies and the gradients of the stack have this type.

    Norms, the embedding (whose gradient sums many rows), int8 kernels and their scales keep their type.
    """

    def cast(path, array):
        names = {key.key for key in path}
        kept = {"wte", "ln_f", "attention_norm", "ffn_norm", "q_norm", "k_norm", "scale"}
        return array if names & kept or array.dtype == jnp.int8 else array.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)
