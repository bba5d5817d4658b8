"""Models that train low-rank adapters beside frozen parameters, and trees of both. `lora` has the settings.

Shapes: L layers, I inputs and O outputs of a kernel, R the rank.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from EasyLM.models.llama import llama_model
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.models.llama.lora import LoRAConfig
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.parallel import group_mesh
from EasyLM.training import Model


def make_model(
    config: LLaMAConfig,
    lora: LoRAConfig,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    wide_gradients: bool = False,
) -> Model:
    """Returns the model whose parameters are adapters, float32, and whose frozen kernels have the type `dtype`.

    Args:
      wide_gradients: see `llama_model.hidden_states`.
    """
    loss_fn = llama_model.make_loss_fn(config, dtype, mesh, lora, wide_gradients)

    def gradients_of(loss_fn):
        def loss_and_gradients(adapters, frozen, batch, step, key):
            def loss_of(adapters):
                return loss_fn(with_adapters(frozen, adapters), batch, key)

            (value, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(adapters)
            return value, gradients, metrics, frozen

        return loss_and_gradients

    def evaluate(adapters, frozen, batch):
        value, metrics = loss_fn(with_adapters(frozen, adapters), batch, None)
        return {"loss": value, **metrics}

    def init(key):
        return init_adapters(config, lora, key), {}

    groups = mesh and group_mesh(mesh)
    of_group = gradients_of(llama_model.make_loss_fn(config, dtype, groups, lora, wide_gradients))
    return Model(init, gradients_of(loss_fn), evaluate, PARTITION_RULES, of_group, frozen=_frozen_shapes(config, dtype))


def _frozen_shapes(config: LLaMAConfig, dtype: DTypeLike) -> dict:
    def init() -> dict:
        return llama_model.with_kernels(llama_model.init_params(config, jax.random.key(0)), dtype)

    return jax.eval_shape(init)


def adapter_shapes(config: LLaMAConfig, lora: LoRAConfig) -> dict:
    """Returns the tree of adapters as `jax.ShapeDtypeStruct`."""
    model = nnx.eval_shape(lambda: llama_model.new_model(config, lora))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), nnx.to_pure_dict(nnx.state(model)))
    return {"params": _adapters_of(shapes)}


def _adapters_of(tree: Mapping[str, Any]) -> dict:
    """Returns the branches of a tree of parameters that lead to adapters."""
    branches = {}
    for name, branch in tree.items():
        if name == "adapter":
            branches[name] = branch
        elif isinstance(branch, Mapping) and (below := _adapters_of(branch)):
            branches[name] = below
    return branches


def init_adapters(config: LLaMAConfig, lora: LoRAConfig, key: jax.Array) -> dict:
    """Returns initial adapters, float32: A is uniform between -1 / sqrt(I) and 1 / sqrt(I), as in PEFT, and B is 0."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(adapter_shapes(config, lora))

    def init(path, shape, key):
        if path[-1].key == "lora_b":
            return jnp.zeros(shape.shape)
        bound = 1 / math.sqrt(shape.shape[1])
        return jax.random.uniform(key, shape.shape, minval=-bound, maxval=bound)

    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [init(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)])


def with_adapters(params: Mapping[str, Any], adapters: Mapping[str, Any]) -> dict:
    """Returns the tree of parameters that has these adapters beside its kernels."""
    joined = dict(params)
    for name, branch in adapters.items():
        joined[name] = branch if name == "adapter" else with_adapters(params[name], branch)
    return joined
