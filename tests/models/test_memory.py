"""What the automatic rematerialization saves: as much as fits, by a formula that agrees with the compilers' plans."""

import collections
import dataclasses
import functools
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from llama_kit import changed

from EasyLM import flags
from EasyLM.errors import UserError
from EasyLM.models.llama import costs, llama_config, llama_model, llama_train, training_task
from EasyLM.models.llama.memory import StepShape, check_memory, choose_remat, step_bytes
from EasyLM.models.llama.remat_policies import AUTOMATIC_POLICIES
from EasyLM.parallel import make_mesh
from EasyLM.planning.matmuls import matmul_flops
from EasyLM.training import abstract_state, make_optimizer

PLANS = json.loads((pathlib.Path(__file__).parents[2] / "scripts/plan_table.json").read_text())
ALL, *_, NOTHING = AUTOMATIC_POLICIES
GROUPED = changed(num_key_value_heads=2)  # D 64, F 128, 4 heads of 16, 2 layers
ROWS, LENGTH = 3, 16


@functools.cache
def gradient(policy):
    """The jaxpr of the gradient with a policy for the blocks."""
    config = changed(num_key_value_heads=2, remat_block=policy, attention_implementation="xla")
    params = jax.eval_shape(lambda: llama_model.init_params(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    batch = {"input_tokens": tokens, "target_tokens": tokens, "loss_masks": jax.ShapeDtypeStruct(tokens.shape, float)}
    loss_fn = llama_model.make_loss_fn(config, jnp.float32)
    return jax.make_jaxpr(jax.grad(lambda *x: loss_fn(*x, None)[0]))(params, batch)


@pytest.mark.slow
@pytest.mark.parametrize("policy", AUTOMATIC_POLICIES)
def test_a_policy_recomputes_what_it_does_not_save(policy):
    outputs = {"value": 32, "key": 32, "query": 64, "up": 128, "gate": 128, "output": 64}
    left = sum(size for name, size in outputs.items() if name not in AUTOMATIC_POLICIES[policy])
    attention = 2 if "attention" not in AUTOMATIC_POLICIES[policy] else 1  # the scores are not among the named values
    flops = 2 * left * GROUPED.hidden_size + 2 * attention * LENGTH * GROUPED.hidden_size
    recomputed = matmul_flops(gradient(policy)) - matmul_flops(gradient(""))
    assert recomputed == GROUPED.num_hidden_layers * ROWS * LENGTH * flops


def saved_bytes(policy):
    """The bytes that the forward loop over the layers hands to the backward loop."""
    forward = next(eqn for eqn in gradient(policy).jaxpr.eqns if eqn.primitive.name == "scan")
    return sum(var.aval.size * var.aval.dtype.itemsize for var in forward.outvars[1:])


@pytest.mark.slow
@pytest.mark.parametrize("policy", AUTOMATIC_POLICIES)
def test_the_formula_counts_what_a_policy_saves(policy):
    shape = StepShape(ROWS * LENGTH, 1, jnp.float32, 0, 0)
    least = saved_bytes(NOTHING)
    assert least == GROUPED.num_hidden_layers * ROWS * LENGTH * GROUPED.hidden_size * 4, "the inputs of the blocks"
    assert step_bytes(GROUPED, policy, shape) - step_bytes(GROUPED, NOTHING, shape) == saved_bytes(policy) - least


@pytest.mark.slow
def test_projections_wait_in_the_memory_of_the_host():
    """The device keeps the inputs of the blocks and the attention, and computes as little again as if it kept all."""
    forward = next(eqn for eqn in gradient("projections_offloadable").jaxpr.eqns if eqn.primitive.name == "scan")
    on_host = [var.aval for var in forward.outvars if "host" in f"{var.aval.memory_space}".lower()]
    kept = saved_bytes("attention_saveable")
    assert sum(aval.size * aval.dtype.itemsize for aval in on_host) == saved_bytes(ALL) - kept > kept
    assert saved_bytes("projections_offloadable") == saved_bytes(ALL)
    assert matmul_flops(gradient("projections_offloadable")) == matmul_flops(gradient(ALL))


@pytest.mark.parametrize("key", [key for key, plan in PLANS.items() if "remat" in plan])
def test_the_formula_agrees_with_the_compilers(key):
    plan = PLANS[key]
    state, mesh = plan["state_bytes_per_device"], plan["mesh"]
    tokens = plan["batch_size"] * plan["seq_length"] // (mesh["dp"] * mesh["fsdp"] * mesh.get("sp", 1))
    lanes = 128 if plan["device_kind"].startswith("TPU") else 1
    shape = StepShape(tokens, mesh["mp"], jnp.bfloat16, state, state // 12, lanes)
    needed = step_bytes(llama_config.PRESETS[plan["preset"]], plan["remat"].partition(" ")[0], shape)
    assert 0.99 < needed / plan["peak_bytes_per_device"] < (1.12 if key == "vqlm_100m v5e:2x2" else 1.03)
    assert (
        choose_remat(llama_config.PRESETS[plan["preset"]], shape, plan["hbm_bytes_per_device"]).policy
        == plan["remat"].partition(" ")[0]
    )


@pytest.mark.parametrize(
    "preset, devices, rows, memory, policy",
    [
        # On what fits, no matrix product is computed again.
        ("vqlm_100m", 1, 16, 85.0, ALL),
        ("vqlm_1b", 8, 4, 85.0, ALL),
        ("vqlm_7b", 8, 4, 85.0, ALL),
        ("vqlm_7b", 8, 4, 0.75 * 85.0, "attention_up_value_key_query_saveable"),  # JAX's default share of a GPU
        ("vqlm_7b", 8, 4, 40.0, "attention_up_saveable"),
        ("vqlm_7b", 8, 4, 30.0, "attention_saveable"),
        ("vqlm_7b", 8, 4, 24.0, NOTHING),
        ("vqlm_7b", 8, 4, 10.0, NOTHING),  # does not fit; the compiler will say so
        ("vqlm_13b", 8, 4, 85.0, "attention_up_value_key_saveable"),
        ("vqlm_30b", 64, 1, 102.8, ALL),
        ("vqlm_13b", 8, 4, None, NOTHING),  # unknown
    ],
)
def test_the_choice(preset, devices, rows, memory, policy):
    config = llama_config.PRESETS[preset]
    count = costs.num_parameters(config) // devices
    shape = StepShape(rows * 4096, 1, jnp.bfloat16, 12 * count, count)
    choice = choose_remat(config, shape, memory and round(memory * 1e9))
    assert choice.policy == policy
    if memory:
        assert f" of {memory:.1f} GB a device" in choice.reason
        assert ("would need" in choice.reason) == (policy != ALL and memory > 10), "why not more"
    given = dataclasses.replace(config, remat_block="dots_saveable")
    assert choose_remat(given, shape, 1).policy == "dots_saveable"


def test_a_given_policy_is_named_with_its_flag():
    saved = {"dots_saveable": "dots_saveable", "": "everything is saved"}
    for policy, name in saved.items():
        given = dataclasses.replace(GROUPED, remat_block=policy)
        assert f"{choose_remat(given, None, None)}" == f"{name} (given by --llama.remat_block)"


def test_heads_and_feed_forward_are_split_over_mp():
    whole, half = (StepShape(4096, mp, jnp.bfloat16, 0, 0) for mp in (1, 2))
    config = llama_config.PRESETS["vqlm_7b"]
    saved = [step_bytes(config, ALL, shape) - step_bytes(config, NOTHING, shape) for shape in (whole, half)]
    output = 2 * 32 * 4096 * 4096  # of a block's attention, which mp does not split
    assert saved[0] - output == 2 * (saved[1] - output)


def test_tpus_pad_the_heads_that_they_save():
    config = llama_config.PRESETS["vqlm_100m"]  # 22 layers, 10 heads of 64 values
    plain, padded = (StepShape(4096, 1, jnp.bfloat16, 0, 0, lanes) for lanes in (1, 128))
    saved = [step_bytes(config, ALL, shape) - step_bytes(config, NOTHING, shape) for shape in (plain, padded)]
    assert saved[1] - saved[0] == 2 * 22 * 4096 * 4 * 10 * 64, "attention, queries, keys and values"
    devices = np.array([types.SimpleNamespace(platform="tpu")])
    mesh = types.SimpleNamespace(shape=make_mesh("1,8,1").shape, devices=devices)
    state = collections.namedtuple("State", "params")({})
    assert StepShape.of(state, mesh, jnp.bfloat16, 8, 4096).lanes == 128
    assert StepShape.of(state, make_mesh("1,8,1"), jnp.bfloat16, 8, 4096).lanes == 1


def test_logits_and_the_backward_pass_of_the_blocks_share_their_memory():
    config, shape = llama_config.PRESETS["vqlm_7b"], StepShape(4096, 1, jnp.bfloat16, 0, 0)
    needed = [step_bytes(dataclasses.replace(config, vocab_size=size), ALL, shape) for size in (8292, 16384, 32768)]
    logits = 3 * 4096 * 4  # bytes for each id
    assert needed[0] == needed[1] and 0 < needed[2] - needed[1] < 16384 * logits


@pytest.mark.parametrize("mesh_dim", ["2,2,2", "dp:2,fsdp:1,mp:2,sp:2"])
def test_the_flags_give_the_shape(mesh_dim):
    """Tokens and kernels are split by the same factor over fsdp and sp."""
    arguments = ["--load_llama_config=vqlm_debug", "--dtype=bf16", f"--mesh_dim={mesh_dim}"]
    arguments += ["--train_dataset.json_dataset.batch_size=8", "--train_dataset.json_dataset.seq_length=256"]
    config, mesh = flags.parse(training_task.TRAIN_FLAGS, ["llama_train", *arguments]), make_mesh(mesh_dim)
    llama = training_task.read_model(config)
    assert llama.remat_block == "auto"
    model, optimizer = training_task.make_model(llama, "bf16", mesh), make_optimizer(config.optimizer)
    shape = StepShape.of(abstract_state(model, optimizer, mesh), mesh, jnp.bfloat16, 8, 256)
    # Kernels are split over fsdp x sp, and mp. 8292 tokens are divided by 2 x 2 too; the norms are not split.
    count, norms = costs.num_parameters(llama), 5 * 128
    params = (count - norms) // 4 + norms
    assert shape == StepShape(8 // 4 * 256, 2, jnp.bfloat16, 12 * params + 12, params)
    for policy in (ALL, NOTHING):
        memory = round(step_bytes(llama, policy, shape) / 0.95) + 1
        resolved, choice = training_task.with_remat(config, llama, mesh, memory)
        assert resolved.remat_block == choice.policy == policy
    assert training_task.with_remat(config, llama, mesh, None)[0].remat_block == NOTHING


@pytest.mark.parametrize(
    ("tokens", "limit", "message"),
    [
        (
            1,
            10_000 + 2 * 400,
            "the train state has 1e-05 GB and the gradients 8e-07 GB, but JAX may use 1.08e-05 GB: try more devices$",
        ),
        (
            50,
            10_000 + 50 * 2 * 64 * 2,
            "inputs of the blocks for the 50 tokens of a batch 1.28e-05 GB.*: try less$",
        ),
    ],
)
def test_what_fits_under_no_rematerialisation_is_refused(tokens, limit, message):
    shape = StepShape(tokens, 1, jnp.bfloat16, 10_000, 400)  # 2 layers of width 64
    remedies = ["more devices"], ["less"]
    check_memory(GROUPED, shape, limit, *remedies)
    with pytest.raises(UserError, match=f"^the train step does not fit: .*{message}"):
        check_memory(GROUPED, shape, limit - 1, *remedies)
    assert step_bytes(GROUPED, NOTHING, shape) > limit, "the formula counts more"


def test_the_trainer_refuses_before_it_reads_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_train, "device_memory", lambda mesh: 10**5)
    dataset = tmp_path / "empty.jsonl"  # would be refused next
    dataset.touch()
    with pytest.raises(UserError, match=r"does not fit: .* try more devices along fsdp in --mesh_dim$"):
        tiny_run.train(tmp_path, train_dataset__json_dataset__path=str(dataset))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "remedies"),
    [
        ({"hidden_size": 1024}, "more devices along fsdp in --mesh_dim"),
        ({"hidden_size": 1024, "load": "params::x"}, "more devices along fsdp in --mesh_dim, --lora.rank=16"),
        ({"hidden_size": 1024, "load": "params::x", "rank": 2}, "more devices along fsdp in --mesh_dim"),
        ({"rows": 1024}, "a smaller GROUP.batch_size, a smaller GROUP.seq_length, more devices along fsdp"),
        (
            {"length": 2**20},
            "half the batch with --mesh_dim=dp:1,fsdp:4,mp:1,sp:2, which splits each row over 2 devices, "
            "a smaller GROUP.seq_length, more devices along fsdp in --mesh_dim",
        ),
        ({"length": 2**20 + 1}, "a smaller GROUP.seq_length, more devices along fsdp in --mesh_dim"),
    ],
)
def test_the_remedies_are_those_of_what_does_not_fit(settings, remedies):
    """The state, whatever the batch; or the tokens: of many rows, or of long ones, which the heads can be split for."""
    given = {"hidden_size": 64, "rows": 8, "length": 16, "load": "", "rank": 0} | settings
    group = "--train_dataset.json_dataset"
    arguments = [f"{group}.batch_size={given['rows']}", f"{group}.seq_length={given['length']}", "--mesh_dim=1,8,1"]
    arguments += [f"--load_checkpoint={given['load']}", f"--lora.rank={given['rank']}"]
    config, mesh = flags.parse(training_task.TRAIN_FLAGS, ["llama_train", *arguments]), make_mesh("1,8,1")
    llama = dataclasses.replace(GROUPED, hidden_size=given["hidden_size"])
    with pytest.raises(UserError) as error:
        training_task.check_step(config, llama, mesh, 2**20)
    assert str(error.value).partition(": try ")[2].startswith(remedies.replace("GROUP", group))
    assert ("--lora" in str(error.value)) == ("--lora" in remedies)


def test_a_fine_tuning_chooses_for_its_own_devices(tmp_path):
    """Checkpoints of older versions record the policy of their presets; others, what their devices needed."""
    recorded = dataclasses.asdict(GROUPED) | {"remat_block": "nothing_saveable"}
    (tmp_path / "metadata.json").write_text(json.dumps({"llama_config": recorded}))
    flag = f"--load_checkpoint=params::{tmp_path}/params"
    config = flags.parse(training_task.TRAIN_FLAGS, ["llama_train", flag])
    assert training_task.read_model(config) == dataclasses.replace(GROUPED, remat_block="auto")
    config = flags.parse(training_task.TRAIN_FLAGS, ["llama_train", flag, "--llama.remat_block=dots_saveable"])
    assert training_task.read_model(config).remat_block == "dots_saveable"


def test_a_hugging_face_directory_without_settings_does_not_stand_for_a_7b_model(tmp_path):
    config = flags.parse(training_task.TRAIN_FLAGS, ["llama_train", f"--load_checkpoint=huggingface::{tmp_path}"])
    with pytest.raises(UserError, match=f"{tmp_path}: no Hugging Face model: config.json is missing$"):
        training_task.read_model(config)


def test_the_directory_of_a_run_is_not_taken_for_a_hugging_face_model(golden):
    run = golden / "lvm_tiny" / "final"
    config = flags.parse(training_task.TRAIN_FLAGS, ["llama_train", f"--load_checkpoint=huggingface::{run}"])
    with pytest.raises(UserError, match=f"it holds a train state: load it as trainstate::{run}/streaming_train_state"):
        training_task.read_model(config)


@pytest.mark.parametrize("recorded", [True, False])
def test_settings_of_another_run_choose_for_these_devices(tmp_path, recorded):
    """A plain dict of settings is no record of devices: its policy is the choice of its author."""
    values = dataclasses.asdict(GROUPED) | {"remat_block": "nothing_saveable"}
    (tmp_path / "metadata.json").write_text(json.dumps({"llama_config": values} if recorded else values))
    flag = f"--load_llama_config=json::{tmp_path}/metadata.json"
    config = flags.parse(training_task.TRAIN_FLAGS, ["llama_train", flag])
    policy = "auto" if recorded else "nothing_saveable"
    assert training_task.read_model(config) == dataclasses.replace(GROUPED, remat_block=policy)
    config = flags.parse(training_task.TRAIN_FLAGS, ["llama_train", flag, "--llama.remat_block=dots_saveable"])
    assert training_task.read_model(config).remat_block == "dots_saveable"
