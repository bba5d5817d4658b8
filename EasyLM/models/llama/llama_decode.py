"""The LLaMA with a cache of keys and values, for `EasyLM.generate`, and the likelihood of given tokens.

Shapes: B prompts, P tokens of a prompt, C candidates of a prompt, S slots of the candidates' cache, D hidden size,
H heads, K head dimension, V vocabulary, T tokens of a row, t tokens of a chunk of it.
A cache is a list over the layers: their weights and caches are arrays of their own, because a slice of a stacked array
would be copied in each step.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from EasyLM.errors import UserError
from EasyLM.models.attention import Pattern
from EasyLM.models.generate import check_tokens
from EasyLM.models.llama import llama_model
from EasyLM.models.llama.llama_config import PARTITION_RULES, LLaMAConfig
from EasyLM.models.llama.llama_model import Block, Context, RMSNorm, constrain
from EasyLM.parallel import BATCH_AXES, shardings

_LOWEST = -1e30
_LOGITS = 2048  # tokens whose logits exist at once in `log_likelihoods`
# While decoding, a device holds its heads' weights whole: fetching them from the others in each step would take longer
# than all the rest.
_DECODE_RULES = tuple(
    (pattern, P(*(axis if axis == "mp" else None for axis in spec))) for pattern, spec in PARTITION_RULES
)


@dataclasses.dataclass(frozen=True)
class LLaMADecoder:
    """`EasyLM.generate.Decoder` of a LLaMA.

    Attributes:
      dtype: of activations, kernels and caches; norms, rotary angles and softmax are float32 always.
      mesh: where the parameters are: prompts are split over dp and fsdp, heads and feed-forward over mp.
    """

    config: LLaMAConfig
    dtype: jnp.dtype = jnp.float32
    mesh: Mesh | None = None

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_sequence_length(self) -> int:
        return self.config.max_sequence_length

    def prepare(self, params, allowed_ids):
        model = llama_model.with_params(self.config, params, self.dtype)
        layers = nnx.to_pure_dict(nnx.state(model.transformer.h))
        weights = {
            "transformer": {
                "wte": {"embedding": model.transformer.wte.embedding[...]},
                "h": llama_model.unstack(layers, self.config.num_hidden_layers),
                "ln_f": {"kernel": model.transformer.ln_f.kernel[...]},
            },
            "lm_head": {"kernel": model.head_DV[:, :allowed_ids].astype(self.dtype)},
        }
        if self.mesh is None:
            return weights
        return jax.lax.with_sharding_constraint(weights, shardings(self.mesh, _DECODE_RULES, weights))

    def prefill(self, params, prompts_BP, mask_BP, allowed_ids):
        model = llama_model.with_params(self.config, params, self.dtype)
        positions_BP = llama_model.positions(prompts_BP.shape[1], mask_BP)
        context = Context(llama_model.rotary_table(self.config, positions_BP), Pattern(mask_BP), self.mesh)
        graph, stacked = nnx.split(model.transformer.h)

        def block(x_BPD, layer):
            x_BPD, cache = nnx.merge(graph, layer)(x_BPD, context)
            return x_BPD, tuple(constrain(x_BPHK.swapaxes(1, 2), self.mesh, BATCH_AXES, "mp") for x_BPHK in cache)

        x_BPD = constrain(model.transformer.wte(prompts_BP).astype(self.dtype), self.mesh, BATCH_AXES)
        x_BPD, stacked_cache = jax.lax.scan(block, x_BPD, stacked)
        last_B1D = model.transformer.ln_f(x_BPD[:, -1:])
        logits_B1V = llama_model.logits(last_B1D, model.head_DV.astype(self.dtype), self.mesh)
        cache = {
            "layers": llama_model.unstack(stacked_cache, self.config.num_hidden_layers),
            "next_B": positions_BP[:, -1] + 1,
            "mask_BP": mask_BP,
        }
        return logits_B1V[:, 0, :allowed_ids], cache

    def empty_cache(self, batch, candidates, slots):
        c = self.config
        shape = batch, c.num_attention_heads, candidates, slots, c.head_dim

        def empty():
            return constrain(jnp.zeros(shape, self.dtype), self.mesh, BATCH_AXES, "mp")

        return [(empty(), empty()) for _ in range(c.num_hidden_layers)]

    def step(self, weights, prompt_cache, cache, tokens_BC, slot):
        transformer = weights["transformer"]
        rope = llama_model.rotary_table(self.config, (prompt_cache["next_B"] + slot)[:, None])
        context = Context(rope, Pattern(), self.mesh)
        block_graph, norm_graph = _graphs(self.config)
        x_BCD = jnp.take(transformer["wte"]["embedding"], tokens_BC, axis=0).astype(self.dtype)
        new = []
        layers = zip(transformer["h"], prompt_cache["layers"], cache, strict=True)
        for layer, prompt, own in layers:  # the candidates stand where the model's tokens of a row do
            block = nnx.merge(block_graph, layer)
            q, k, v = (y.swapaxes(1, 2) for y in block.attention.project(block.attention_norm(x_BCD), context))
            out_BHCK = _attend(q, k, v, *prompt, prompt_cache["mask_BP"], *own, slot)
            x_BCD += block.attention.wo(out_BHCK.swapaxes(1, 2).reshape(x_BCD.shape))
            x_BCD += block.feed_forward(block.ffn_norm(x_BCD), context)
            new.append((k, v))
        x_BCD = nnx.merge(norm_graph, transformer["ln_f"])(x_BCD)
        logits_BCV = llama_model.logits(x_BCD, weights["lm_head"]["kernel"], self.mesh)
        # XLA writes in place only what it knows to come after every read, so the slot seems to depend on the result.
        slot += jnp.isnan(x_BCD[0, 0, 0]).astype(jnp.int32)
        return logits_BCV, jax.tree.map(
            lambda old_BHCSK, new_BHCK: jax.lax.dynamic_update_slice_in_dim(
                old_BHCSK, new_BHCK[:, :, :, None], slot, 3
            ),
            cache,
            new,
        )


def log_likelihoods(
    config: LLaMAConfig,
    params,
    tokens_BT: np.ndarray,
    from_position: int,
    *,
    mask_BT: np.ndarray | None = None,
    dtype=jnp.float32,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """log p of each token from `from_position` (at least 1) on, in nats, given all before it: float32 [B, T - from].

    Args:
      mask_BT: 1 for a token, 0 for padding on the left; None: no padding.

    Raises:
      UserError: for malformed tokens, more than the model's longest sequence, or a position outside the rows.
    """
    tokens_BT = check_tokens(config, tokens_BT, mask_BT)
    if not 1 <= from_position < tokens_BT.shape[1]:
        raise UserError(f"from_position={from_position}: must be from 1 to {tokens_BT.shape[1] - 1}")
    mask_BT = None if mask_BT is None or np.all(mask_BT) else np.asarray(mask_BT, np.int32)
    return np.asarray(_log_likelihoods(config, params, tokens_BT, from_position, mask_BT, dtype, mesh))


@functools.partial(jax.jit, static_argnames=("config", "from_position", "dtype", "mesh"))
def _log_likelihoods(config, params, tokens_BT, from_position, mask_BT, dtype, mesh):
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, from_position:]
    hidden_BTD, head_DV = llama_model.hidden_states(
        config,
        params,
        inputs_BT,
        attention_mask_BT=None if mask_BT is None else mask_BT[:, :-1],
        dtype=dtype,
        mesh=mesh,
    )
    batch, length = targets_BT.shape
    chunk = min(max(_LOGITS // batch, 1), length)

    def chunks(x_BT):
        x_BT = jnp.pad(x_BT, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x_BT.ndim - 2))
        return x_BT.reshape(batch, -1, chunk, *x_BT.shape[2:]).swapaxes(0, 1)

    def score(chunk):
        hidden_BtD, targets_Bt = chunk
        logits_BtV = llama_model.logits(hidden_BtD, head_DV, mesh).astype(jnp.float32)
        return jnp.take_along_axis(logits_BtV, targets_Bt[..., None], -1)[..., 0] - jax.nn.logsumexp(logits_BtV, -1)

    scores = jax.lax.map(score, (chunks(hidden_BTD[:, from_position - 1 :]), chunks(targets_BT)))
    return scores.swapaxes(0, 1).reshape(batch, -1)[:, :length]


def _attend(q_BHCK, k_BHCK, v_BHCK, k_BHPK, v_BHPK, mask_BP, k_BHCSK, v_BHCSK, slot):
    """Attention of each candidate's new token to its prompt, which the candidates share, to its tokens before `slot`,
    and to itself."""
    q_BHCK = q_BHCK * q_BHCK.shape[-1] ** -0.5
    scores_BHCP = _einsum("BHCK,BHPK->BHCP", q_BHCK, k_BHPK)
    if mask_BP is not None:
        scores_BHCP = jnp.where(mask_BP[:, None, None, :] != 0, scores_BHCP, _LOWEST)
    scores_BHCS = _einsum("BHCK,BHCSK->BHCS", q_BHCK, k_BHCSK)
    written_S = jnp.arange(scores_BHCS.shape[-1]) < slot
    scores_BHCS = jnp.where(written_S[None, None, None, :], scores_BHCS, _LOWEST)
    score_BHC1 = (q_BHCK.astype(jnp.float32) * k_BHCK.astype(jnp.float32)).sum(-1, keepdims=True)
    scores = scores_BHCP, scores_BHCS, score_BHC1
    top_BHC1 = functools.reduce(jnp.maximum, (x.max(-1, keepdims=True) for x in scores))
    weights_BHCP, weights_BHCS, weight_BHC1 = (jnp.exp(x - top_BHC1) for x in scores)
    norm_BHC1 = weights_BHCP.sum(-1, keepdims=True) + weights_BHCS.sum(-1, keepdims=True) + weight_BHC1
    out_BHCK = _einsum("BHCP,BHPK->BHCK", weights_BHCP.astype(v_BHPK.dtype), v_BHPK)
    out_BHCK += _einsum("BHCS,BHCSK->BHCK", weights_BHCS.astype(v_BHPK.dtype), v_BHCSK)
    out_BHCK += weight_BHC1 * v_BHCK.astype(jnp.float32)
    return (out_BHCK / norm_BHC1).astype(q_BHCK.dtype)


_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@functools.lru_cache
def _graphs(config: LLaMAConfig):
    """The structure of one block and of a norm, without their arrays."""
    block = nnx.eval_shape(lambda: Block(config, nnx.Rngs(0)))
    return nnx.split(block)[0], nnx.split(nnx.eval_shape(lambda: RMSNorm(config)))[0]
