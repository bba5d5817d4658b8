"""Decodes with a LLaMA and a key-value cache, for `EasyLM.models.generate`. Scores given tokens.

Weights and caches have separate arrays for each layer (see `inference_model`). Parameters may be stacked, as in
training: `generate` then copies them once for each call.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from EasyLM.errors import UserError
from EasyLM.models.attention import MASKED_SCORE, AttentionMask
from EasyLM.models.chunks import join_time, split_time
from EasyLM.models.generate import check_tokens
from EasyLM.models.llama import inference_model, llama_model
from EasyLM.models.llama.layers import Context, merge_heads
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.models.llama.rotary import rotary_table
from EasyLM.models.tuning import after
from EasyLM.parallel import BATCH_AXES, axis_size, constrain, shardings

LOGITS_TOKENS = 2048  # tokens whose logits `score` holds in memory at once
# For decoding, weights are split over mp only. Other axes would need a gather in each step, which would dominate it.
_DECODE_RULES = tuple((path, P(*(axis if axis == "mp" else None for axis in spec))) for path, spec in PARTITION_RULES)


@dataclasses.dataclass(frozen=True)
class LLaMADecoder:
    """Implements `EasyLM.models.generate.Decoder` for a LLaMA.

    Attributes:
      dtype: the type of activations, kernels and caches. Norms, rotary angles and softmax are float32.
      mesh: the mesh of the parameters. Prompts are split over dp and fsdp; heads and feed-forward over mp.
    """

    config: LLaMAConfig
    dtype: DTypeLike = jnp.float32
    mesh: Mesh | None = None

    @property
    def vocab_size(self) -> int:
        """See `Decoder`."""
        return self.config.vocab_size

    @property
    def max_sequence_length(self) -> int:
        """See `Decoder`."""
        return self.config.max_sequence_length

    def prepare(self, params: dict, allowed_ids: int) -> dict:
        """See `Decoder`."""
        params = inference_model.separate_layers(params, self.config.num_hidden_layers)
        head_DV = inference_model.with_params(self.config, params, self.dtype).head[:, :allowed_ids]
        weights = {**llama_model.with_kernels(params["params"], self.dtype), "lm_head": {"kernel": head_DV}}
        if self.mesh is None or axis_size(self.mesh, "fsdp") == 1:
            return weights
        return _replicated_over_fsdp(weights, self.mesh)

    def prefill(
        self, params: dict, prompts_BP: jax.Array, mask_BP: jax.Array | None, allowed_ids: int
    ) -> tuple[jax.Array, dict]:
        """See `Decoder`."""
        model = inference_model.with_params(self.config, params, self.dtype)
        x_BPD, layers, positions_BP = model(prompts_BP, mask_BP, self.mesh)
        logits_B1V = llama_model.logits(x_BPD[:, -1:], model.head, self.mesh)
        cache = {
            "layers": [
                tuple(constrain(_heads_first(x_BPGK), self.mesh, BATCH_AXES, "mp") for x_BPGK in layer)
                for layer in layers
            ],
            "next_B": positions_BP[:, -1] + 1,
            "mask_BP": mask_BP,
        }
        return logits_B1V[:, 0, :allowed_ids], cache

    def empty_cache(self, batch: int, candidates: int, slots: int) -> list:
        """See `Decoder`."""
        c = self.config
        shape = batch, c.kv_heads, candidates, slots, c.head_dim

        def empty():
            return constrain(jnp.zeros(shape, self.dtype), self.mesh, BATCH_AXES, "mp")

        return [(empty(), empty()) for _ in range(c.num_hidden_layers)]

    def step(
        self, weights: dict, prompt_cache: dict, cache: list, tokens_BC: jax.Array, slot: jax.Array
    ) -> tuple[jax.Array, list]:
        """See `Decoder`. The layers process the C candidates of a prompt along the axis for the tokens of a row."""
        model = inference_model.with_params(self.config, {"params": weights}, self.dtype)
        rope = rotary_table(self.config, (prompt_cache["next_B"] + slot)[:, None])
        context = Context(rope, AttentionMask(), self.mesh)
        x_BCD = model.wte(tokens_BC).astype(self.dtype)
        new = []
        for block, prompt, own in zip(model.blocks, prompt_cache["layers"], cache, strict=True):
            projected = block.attention.project(block.attention_norm(x_BCD), context)
            q, k, v = (_heads_first(x_BCHK) for x_BCHK in projected)
            out_BHCK = _attend(q, k, v, prompt, prompt_cache["mask_BP"], own, slot)
            x_BCD += block.attention.wo(merge_heads(rearrange(out_BHCK, "B H C K -> B C H K")))
            x_BCD += block.feed_forward(block.ffn_norm(x_BCD), context)
            new.append((k, v))
        x_BCD = model.ln_f(x_BCD)
        logits_BCV = llama_model.logits(x_BCD, model.head, self.mesh)
        slot = after(slot, x_BCD)  # lets XLA update the caches in place
        return logits_BCV, jax.tree.map(
            lambda old_BGCSK, new_BGCK: jax.lax.dynamic_update_slice_in_dim(
                old_BGCSK, new_BGCK[:, :, :, None], slot, 3
            ),
            cache,
            new,
        )


def score(
    config: LLaMAConfig,
    params: dict,
    tokens_BT: np.ndarray,
    from_position: int,
    *,
    mask_BT: np.ndarray | None = None,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores each token given all earlier tokens.

    Returns:
      Log-likelihoods in nats, float32 [B, T - from_position], and whether no token is more likely, bool of this shape.

    Args:
      from_position: the position of the first evaluated token, at least 1.
      mask_BT: 1 for a token, 0 for padding on the left. None means no padding.

    Raises:
      UserError: if tokens are malformed or exceed the maximum length, or `from_position` is out of range.
    """
    tokens_BT = check_tokens(config, tokens_BT, mask_BT)
    if not 1 <= from_position < tokens_BT.shape[1]:
        raise UserError(f"from_position={from_position}: must be from 1 to {tokens_BT.shape[1] - 1}")
    mask_BT = None if mask_BT is None or np.all(mask_BT) else np.asarray(mask_BT, np.int32)
    scores = _score(config, params, tokens_BT, from_position, mask_BT, dtype, mesh)
    return np.asarray(scores[0]), np.asarray(scores[1])


@functools.partial(jax.jit, static_argnames=("config", "from_position", "dtype", "mesh"))
def _score(config, params, tokens_BT, from_position, mask_BT, dtype, mesh):
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, from_position:]
    model = inference_model.with_params(config, params, dtype)
    hidden_BTD = model(inputs_BT, None if mask_BT is None else mask_BT[:, :-1], mesh).hidden
    batch, length = targets_BT.shape
    chunk_length = min(max(LOGITS_TOKENS // batch, 1), length)

    def score_of_chunk(chunk):
        hidden_BtD, targets_Bt = chunk
        logits_BtV = llama_model.logits(hidden_BtD, model.head, mesh).astype(jnp.float32)
        logits_Bt = jnp.take_along_axis(logits_BtV, targets_Bt[..., None], -1)[..., 0]
        return logits_Bt - jax.nn.logsumexp(logits_BtV, -1), logits_Bt == logits_BtV.max(-1)

    arrays = hidden_BTD[:, from_position - 1 :], targets_BT
    scores_CBt = jax.lax.map(score_of_chunk, tuple(split_time(x_BT, chunk_length) for x_BT in arrays))
    return tuple(join_time(x_CBt, length) for x_CBt in scores_CBt)


@functools.partial(jax.jit, static_argnames="mesh")
def _replicated_over_fsdp(weights: dict, mesh: Mesh) -> dict:
    return jax.lax.with_sharding_constraint(weights, shardings(mesh, _DECODE_RULES, weights))


def _attend(q_BHCK, k_BGCK, v_BGCK, prompt, mask_BP, own, slot):
    """Attends from the new token of each candidate to the prompt, to the candidate's earlier tokens, and to itself."""
    (k_BGPK, v_BGPK), (k_BGCSK, v_BGCSK) = prompt, own
    q_BGRCK = rearrange(q_BHCK * q_BHCK.shape[-1] ** -0.5, "B (G R) C K -> B G R C K", G=k_BGCK.shape[1])
    scores_BGRCP = _einsum("BGRCK,BGPK->BGRCP", q_BGRCK, k_BGPK)
    if mask_BP is not None:
        scores_BGRCP = jnp.where(mask_BP[:, None, None, None, :] != 0, scores_BGRCP, MASKED_SCORE)
    scores_BGRCS = _einsum("BGRCK,BGCSK->BGRCS", q_BGRCK, k_BGCSK)
    written_S = jnp.arange(scores_BGRCS.shape[-1]) < slot
    scores_BGRCS = jnp.where(written_S[None, None, None, None, :], scores_BGRCS, MASKED_SCORE)
    score_BGRC1 = (q_BGRCK.astype(jnp.float32) * k_BGCK[:, :, None].astype(jnp.float32)).sum(-1, keepdims=True)
    scores = scores_BGRCP, scores_BGRCS, score_BGRC1
    max_BGRC1 = functools.reduce(jnp.maximum, (x.max(-1, keepdims=True) for x in scores))
    weights_BGRCP, weights_BGRCS, weight_BGRC1 = (jnp.exp(x - max_BGRC1) for x in scores)
    norm_BGRC1 = weights_BGRCP.sum(-1, keepdims=True) + weights_BGRCS.sum(-1, keepdims=True) + weight_BGRC1
    out_BGRCK = _einsum("BGRCP,BGPK->BGRCK", weights_BGRCP.astype(v_BGPK.dtype), v_BGPK)
    out_BGRCK += _einsum("BGRCS,BGCSK->BGRCK", weights_BGRCS.astype(v_BGPK.dtype), v_BGCSK)
    out_BGRCK += weight_BGRC1 * v_BGCK[:, :, None].astype(jnp.float32)
    return rearrange((out_BGRCK / norm_BGRC1).astype(q_BHCK.dtype), "B G R C K -> B (G R) C K")


def _heads_first(x_BTHK: jax.Array) -> jax.Array:
    return rearrange(x_BTHK, "B T H K -> B H T K")


def _einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    """Computes `jnp.einsum` in float32, without the axis R if its size is 1.

    For products with a free axis of size 1, XLA's CPU backend generates slower code: a decoding step of vqlm_100m then
    takes 1.3 times as long.
    """
    *inputs, output = subscripts.replace("->", ",").split(",")
    if operands[0].shape[inputs[0].index("R")] > 1:
        return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)
    squeezed = [x.squeeze(axes.index("R")) if "R" in axes else x for x, axes in zip(operands, inputs, strict=True)]
    result = jnp.einsum(subscripts.replace("R", ""), *squeezed, preferred_element_type=jnp.float32)
    return jnp.expand_dims(result, output.index("R"))
