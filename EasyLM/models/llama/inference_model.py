"""The model for generation and scoring: separate arrays for each layer, and kernels that may be int8.

In training, layers are stacked and scanned. A decoding step would copy a slice of each stacked array, and a second,
unstacked copy of the weights would double their memory.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from EasyLM.models.attention import AttentionMask
from EasyLM.models.llama import int8_kernels, llama_model
from EasyLM.models.llama.layers import Block, Context, Embedding, KeysAndValues, Linear, RMSNorm
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.models.llama.rotary import positions, rotary_table
from EasyLM.parallel import BATCH_AXES, constrain


class ForwardPass(NamedTuple):
    """The results of a forward pass.

    Attributes:
      hidden: the last hidden states after the final norm, [B, T, D].
      layers: keys and values of each layer, [B, T, G, K].
      positions: the position of each token among the unpadded tokens, [B, T].
    """

    hidden: jax.Array
    layers: list[KeysAndValues]
    positions: jax.Array


class InferenceModel(NamedTuple):
    """The modules of a model, one block for each layer.

    Attributes:
      head: the kernel of the head in the compute type, [D, V].
    """

    config: LLaMAConfig
    wte: Embedding
    blocks: list[Block]
    ln_f: RMSNorm
    head: jax.Array

    def __call__(self, tokens_BT: jax.Array, mask_BT: jax.Array | None, mesh: Mesh | None) -> ForwardPass:
        """Computes the hidden states of all tokens. The mask is 1 for a token, 0 for padding on the left."""
        positions_BT = positions(tokens_BT.shape[1], mask_BT)
        context = Context(rotary_table(self.config, positions_BT), AttentionMask(mask_BT), mesh)
        x_BTD = constrain(self.wte(tokens_BT).astype(self.head.dtype), mesh, BATCH_AXES)
        layers = []
        for block in self.blocks:
            x_BTD, keys_and_values = block(x_BTD, context)
            layers.append(keys_and_values)
        return ForwardPass(self.ln_f(x_BTD), layers, positions_BT)


def parameter_shapes(config: LLaMAConfig, dtype: DTypeLike, int8: bool = False) -> dict:
    """Returns the parameters as a tree of `jax.ShapeDtypeStruct`, with the layers "0", "1", ... below `h`.

    Args:
      dtype: type of the kernels. Norms and the embedding are float32.
      int8: the kernels of the layers are int8, with scales.
    """

    def shapes() -> dict:
        params = llama_model.init_params(config, jax.random.key(0))
        return separate_layers({"params": llama_model.with_kernels(params["params"], dtype)}, config.num_hidden_layers)

    tree = jax.eval_shape(shapes)
    return int8_kernels.quantized_shapes(tree) if int8 else tree


def separate_layers(params: Mapping[str, Any], num_layers: int) -> dict:
    """Returns parameters with the layers "0", "1", ... below `h`. Those that have them are returned as they are."""
    transformer = params["params"]["transformer"]
    if "0" in transformer["h"]:
        return dict(params)
    layers = llama_model.unstack(transformer["h"], num_layers)
    transformer = {**transformer, "h": {str(number): layer for number, layer in enumerate(layers)}}
    return {"params": {**params["params"], "transformer": transformer}}


def with_params(config: LLaMAConfig, params: Mapping[str, Any], dtype: DTypeLike) -> InferenceModel:
    """Returns the model with these parameters, stacked or not. Kernels are cast to `dtype`, except those of int8."""
    params = llama_model.with_kernels(separate_layers(params, config.num_hidden_layers)["params"], dtype)
    transformer = params["transformer"]
    layers = [transformer["h"][str(number)] for number in range(config.num_hidden_layers)]
    block_graph, wte_graph, norm_graph = _graphs(config, int8_kernels.is_quantized(layers[0]))
    wte = nnx.merge(wte_graph, transformer["wte"])
    # A decoder's weights have a head of the allowed ids, also if it is tied to the embedding.
    head_DV = params["lm_head"]["kernel"] if "lm_head" in params else wte.embedding[...].T.astype(dtype)
    blocks = [nnx.merge(block_graph, layer) for layer in layers]
    return InferenceModel(config, wte, blocks, nnx.merge(norm_graph, transformer["ln_f"]), head_DV)


@functools.lru_cache
def _graphs(config: LLaMAConfig, int8: bool) -> tuple[nnx.GraphDef, ...]:
    """Returns the NNX structures of a block, of the embedding and of the final norm, without their arrays."""

    def block() -> Block:
        block = Block(config, nnx.Rngs(0))
        if int8:
            for _, module in nnx.iter_modules(block):
                if isinstance(module, Linear):
                    module.scale = nnx.Param(jnp.ones(module.kernel.shape[-1]))
        return block

    makers = block, lambda: Embedding(config, nnx.Rngs(0)), lambda: RMSNorm(config, config.hidden_size)
    return tuple(nnx.split(nnx.eval_shape(make))[0] for make in makers)
