"""The LLaMA as `EasyLM.generate` uses it: each layer's weights and caches by themselves, layer after layer unrolled.

Shapes: P prompts, N candidates of each, S prompt tokens, D hidden size, H heads, K head dimension, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from EasyLM.attention import Pattern
from EasyLM.generate import Decoder
from EasyLM.models.llama import llama_model
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.models.llama.llama_model import Block, Context, RMSNorm


@functools.lru_cache
def decoder(config: LLaMAConfig, dtype=jnp.float32) -> Decoder:
    """Generation with this model, computing in `dtype`. `prepare` takes the parameters as training has them."""
    block_graph, norm_graph = (
        nnx.split(nnx.eval_shape(make))[0] for make in (lambda: Block(config, nnx.Rngs(0)), lambda: RMSNorm(config))
    )

    @jax.jit
    def prepare(params):
        params = llama_model.with_dtype(params["params"], dtype)
        inner = params["transformer"]
        embedding = inner["wte"]["embedding"]
        return {
            "embedding": embedding.astype(dtype),
            "layers": llama_model.unstack(inner["h"], config.num_hidden_layers),
            "norm": inner["ln_f"],
            "head": embedding.T.astype(dtype) if config.tie_word_embeddings else params["lm_head"]["kernel"],
        }

    def context(valid, position_ids):
        return Context(llama_model.rotary_table(config, position_ids), Pattern(valid), None)

    def to_logits(weights, x):
        return llama_model.logits(nnx.merge(norm_graph, weights["norm"])(x), weights["head"])

    def prefill(weights, tokens_PS, valid_PS):
        shared = context(valid_PS, llama_model.positions(tokens_PS.shape[1], valid_PS))
        x_PSD, keys_and_values = jnp.take(weights["embedding"], tokens_PS, axis=0), []
        for layer in weights["layers"]:
            x_PSD, key_and_value = nnx.merge(block_graph, layer)(x_PSD, shared)
            keys_and_values.append(key_and_value)
        return to_logits(weights, x_PSD[:, -1:])[:, 0], keys_and_values

    def step(weights, tokens_PN, positions_P, caches, valid_PS, index):
        shared = context(valid_PS, positions_P[:, None])
        x_PND, new_caches = jnp.take(weights["embedding"], tokens_PN, axis=0), []
        for layer, cache in zip(weights["layers"], caches, strict=True):
            x_PND, cache = nnx.merge(block_graph, layer).decode(x_PND, shared, cache, index)
            new_caches.append(cache)
        return to_logits(weights, x_PND), new_caches

    return Decoder(prepare, prefill, step, config.max_sequence_length)
