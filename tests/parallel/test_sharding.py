"""Partition rules cover every array of every preset's train state, and every rule is used; `--mesh_dim` is parsed."""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from EasyLM import flags
from EasyLM.errors import UserError
from EasyLM.models.llama import adapters, llama_config, llama_model
from EasyLM.models.llama.lora import TARGETS, LoRAConfig
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.parallel import SHARD_AXES, check_batch_size, check_whole_sequences, make_mesh, partition, shardings
from EasyLM.parallel.mesh import parse_mesh_dim
from EasyLM.parallel.partition import match_partition_rules
from EasyLM.training import OPTIMIZER_FLAGS, make_optimizer
from EasyLM.training.step import state_shapes

OPTIMIZERS = [("adamw", 1), ("adamw", 4), ("palm", 1)]


def shapes_of_state(preset, optimizer="adamw", accumulate=1):
    config = llama_config.load_config(preset)
    settings = flags.defaults(OPTIMIZER_FLAGS)
    settings.type, settings.accumulate_gradient_steps = optimizer, accumulate
    optimizer = make_optimizer(settings)
    return state_shapes(lambda key: (llama_model.init_params(config, key), {}), optimizer)


@pytest.mark.parametrize("preset", llama_config.PRESETS)
def test_each_array_has_one_rule_and_each_rule_an_array(preset):
    targets = LoRAConfig(rank=2, alpha=1.0, dropout=0.0, targets=tuple(TARGETS))
    adapter_shapes = adapters.adapter_shapes(llama_config.load_config(preset), targets)
    params = adapters.with_adapters(shapes_of_state(preset).params, adapter_shapes)
    names = ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    used = [[bool(re.search(pattern, name)) for pattern, _ in PARTITION_RULES] for name in names]
    assert (np.sum(used, axis=1) == 1).all(), "each array has one rule"
    assert np.any(used, axis=0).all(), "each rule has an array"


@pytest.mark.parametrize("optimizer, accumulate", OPTIMIZERS)
def test_optimizer_state_is_sharded_like_its_parameters(optimizer, accumulate):
    state = shapes_of_state("vqlm_7b", optimizer, accumulate)
    specs = match_partition_rules(PARTITION_RULES, state)
    expected = {
        "wq": P(None, SHARD_AXES, "mp"),
        "wo": P(None, "mp", SHARD_AXES),
        "w2": P(None, "mp", SHARD_AXES),
        "embedding": P("mp", SHARD_AXES),
        "lm_head": P(SHARD_AXES, "mp"),
        "ffn_norm": P(),
    }
    checked = 0
    shapes = dict(jax.tree_util.tree_flatten_with_path(state)[0])
    for path, spec in jax.tree_util.tree_flatten_with_path(specs, is_leaf=lambda x: isinstance(x, P))[0]:
        name, placeholder = jax.tree_util.keystr(path), shapes[path].shape[-1:] == (1,)
        for part, wanted in expected.items():
            if part in name:
                assert spec == (P() if placeholder else wanted), name
                checked += not placeholder
    copies = {("adamw", 1): 3, ("adamw", 4): 4, ("palm", 1): 3}[optimizer, accumulate]  # including the parameters
    assert checked == copies * len(expected)


@pytest.mark.slow
def test_initial_weights_do_not_depend_on_the_mesh():
    config = dataclasses.replace(llama_config.load_config("vqlm_debug"), vocab_size=64, num_hidden_layers=3)

    def params(mesh_dim):
        mesh = make_mesh(mesh_dim)
        shapes = jax.eval_shape(lambda: llama_model.init_params(config, jax.random.key(0)))
        placed = shardings(mesh, PARTITION_RULES, shapes)
        return jax.jit(lambda: llama_model.init_params(config, jax.random.key(0)), out_shardings=placed)()

    split, whole = params("1,2,4"), params("8,1,1")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-7), split, whole)
    wq_LDD = split["params"]["transformer"]["h"]["attention"]["wq"]["kernel"]
    assert wq_LDD.addressable_shards[0].data.shape == (3, 128 // 2, 128 // 4)


def test_an_axis_that_does_not_divide_is_not_split(caplog):
    mesh = make_mesh("1,8,1")
    shapes = {"lm_head": {"kernel": jax.ShapeDtypeStruct((12, 16), jnp.float32)}}
    partition._log_unsplit.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            placed = shardings(mesh, PARTITION_RULES, shapes)
    assert placed["lm_head"]["kernel"].spec == P(None, "mp")
    assert caplog.text.count("12 is not divisible by fsdp x sp=8; this axis is not split") == 1


def test_an_array_without_a_rule_is_an_assertion_error():
    with pytest.raises(AssertionError, match="no partition rule matches unknown/kernel"):
        match_partition_rules(PARTITION_RULES, {"unknown": {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}})


@pytest.mark.parametrize(
    "text, shape",
    [
        ("1,-1,1", {"dp": 1, "fsdp": 8, "mp": 1, "sp": 1}),
        ("2,2,2", {"dp": 2, "fsdp": 2, "mp": 2, "sp": 1}),
        ("!-1,2,1", {"dp": 4, "fsdp": 2, "mp": 1, "sp": 1}),
        ("dp:1,fsdp:-1,mp:2", {"dp": 1, "fsdp": 4, "mp": 2, "sp": 1}),
        ("dp:1,fsdp:-1,mp:1,sp:2", {"dp": 1, "fsdp": 4, "mp": 1, "sp": 2}),
        ("sp:4,dp:1,fsdp:1,mp:2", {"sp": 4, "dp": 1, "fsdp": 1, "mp": 2}),
        ("mp:2,dp:1,fsdp:2,pp:2", {"mp": 2, "dp": 1, "fsdp": 2, "pp": 2, "sp": 1}),
    ],
)
def test_mesh_dim(text, shape):
    assert parse_mesh_dim(text, 8) == shape
    assert dict(make_mesh(text).shape) == shape


@pytest.mark.parametrize(
    "text, message",
    [
        ("3,-1,1", "does not divide the 8 devices"),
        ("1,4,1", "is for 4 devices, but this run has 8; a size of -1 takes all that remain"),
        ("1,16,1", "is for 16 devices, but this run has 8; a size of -1 takes all that remain"),
        ("-1,-1,1", "only one size may be -1"),
        ("1,-1", "give 3 sizes, for dp, fsdp, mp"),
        ("dp:1,fsdq:-1,mp:1", "a named mesh has each of the axes dp, fsdp, mp once"),
        ("dp:1,dp:1,fsdp:-1,mp:1", "a named mesh has each of the axes dp, fsdp, mp once"),
        ("1,x,1", "each size is a positive integer, or -1"),
        ("1,0,1", "each size is a positive integer, or -1"),
    ],
)
def test_invalid_mesh_dim_is_named(text, message):
    with pytest.raises(UserError) as error:
        parse_mesh_dim(text, 8)
    assert str(error.value).startswith(f"--mesh_dim={text}: ") and message in str(error.value)


def test_batch_must_divide_over_the_mesh():
    mesh = make_mesh("2,2,2")
    check_batch_size("--batch_size", 8, mesh)
    with pytest.raises(UserError, match="--batch_size=6: must be a positive multiple of 4, the mesh's dp x fsdp"):
        check_batch_size("--batch_size", 6, mesh)


def test_programs_without_long_rows_refuse_sp():
    check_whole_sequences(make_mesh("2,2,2"))
    with pytest.raises(UserError, match="--mesh_dim: sp=2 is for llama_train and llama_plan; use dp, fsdp and mp here"):
        check_whole_sequences(make_mesh("dp:1,fsdp:4,mp:1,sp:2"))
