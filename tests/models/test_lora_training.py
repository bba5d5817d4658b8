"""Adapters of any preset, on any mesh and beside frozen bf16 kernels; with rank 0, none at all."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_kit import assert_equal, shapes_of
from llama_kit import changed
from tiny_run import GOLDEN, MODEL_METRICS, metrics, train

from EasyLM import checkpoints, flags
from EasyLM.models.llama import llama_config, llama_model, training_task
from EasyLM.models.llama.lora import TARGETS, LoRAConfig
from EasyLM.parallel import batch_sharding, make_mesh
from EasyLM.training import OPTIMIZER_FLAGS, TrainState, make_optimizer
from EasyLM.training.abstract_step import abstract_batch, accumulating_groups, trace_step
from EasyLM.training.accumulation import with_groups
from EasyLM.training.start import StartFiles, find_start, first_state
from EasyLM.training.step import state_shapes

ORIGIN = f"trainstate_params::{GOLDEN}/final/streaming_train_state"
ROWS, LENGTH, STEPS = 8, 32, 8
LORA = LoRAConfig(rank=4, alpha=8.0, dropout=0.0, targets=tuple(TARGETS))
BATCH = {"input_tokens": np.int32, "target_tokens": np.int32, "loss_masks": np.float32}
# Of a layer: the inputs and outputs of each kernel, the hidden (D) or the feed-forward (F) size.
KERNELS = {"wq": "DD", "wk": "DD", "wv": "DD", "wo": "DD", "w1": "DF", "w2": "FD", "w3": "DF"}


@pytest.mark.slow
def test_rank_0_is_a_run_without_the_flags_bit_for_bit(tmp_path):
    short = {"total_steps": 3, "save_model_freq": 3, "load_checkpoint": ORIGIN}
    settings = {"lora__rank": 0, "lora__alpha": 64.0, "lora__dropout": 0.5, "lora__targets": "q_proj"}
    plain, rank_0 = train(tmp_path / "plain", **short), train(tmp_path / "rank_0", **short | settings)
    assert metrics(rank_0, *MODEL_METRICS) == metrics(plain, *MODEL_METRICS)
    states = [(run / "streaming_train_state").read_bytes() for run in (plain, rank_0)]
    assert states[0] == states[1] and len(states[0]) > 10**6


@pytest.mark.slow
@pytest.mark.parametrize("preset", llama_config.PRESETS)
def test_the_adapters_of_a_preset_are_those_of_its_linear_layers(preset):
    config = llama_config.load_config(preset)
    model = training_task.make_model(config, "bf16", make_mesh("1,-1,1"), dataclasses.replace(LORA, rank=16))
    state = state_shapes(model.init, make_optimizer(flags.defaults(OPTIMIZER_FLAGS)))
    sizes, layers = {"D": config.hidden_size, "F": config.intermediate_size}, config.num_hidden_layers
    expected = {}
    for name, (inputs, outputs) in KERNELS.items():
        expected[name, "lora_a"] = (layers, sizes[inputs], 16)
        expected[name, "lora_b"] = (layers, 16, sizes[outputs])
    trained = {(path[-3].key, path[-1].key): x for path, x in jax.tree_util.tree_leaves_with_path(state.params)}
    assert {name: x.shape for name, x in trained.items()} == expected
    assert {x.dtype.name for x in trained.values()} == {"float32"}
    size = 16 * layers * (11 * config.hidden_size + 3 * config.intermediate_size)
    assert sum(x.size for x in trained.values()) == size
    batch = {name: jax.ShapeDtypeStruct((8, 16), dtype) for name, dtype in BATCH.items()}
    arguments = state.params, model.frozen, batch, 0, jax.random.key(0)
    _, gradients, *_ = jax.eval_shape(model.loss_and_gradients, *arguments)
    assert shapes_of(gradients) == shapes_of(state.params)
    moments = [x.size for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(moments) == 2 * size
    frozen = {path[-2].key: x.dtype.name for path, x in jax.tree_util.tree_leaves_with_path(model.frozen)}
    norms = {"attention_norm", "ffn_norm", "ln_f", "wte"}  # and the embedding
    assert frozen == dict.fromkeys([*KERNELS, "lm_head"], "bfloat16") | dict.fromkeys(norms, "float32")


@dataclasses.dataclass
class Run:
    """A compiled step of adapters, its state and batch."""

    step: Callable
    state: TrainState
    batch: dict

    def losses(self) -> list[float]:
        """Trains and returns the loss of each step."""
        values = []
        for _ in range(STEPS):
            self.state, step_metrics = self.step(self.state, self.batch)
            values.append(float(step_metrics["loss"]))
        return values


def prepare(mesh, dtype="fp32", accumulate=1) -> Run:
    """Returns a run on the mesh that starts from the checkpoint ORIGIN."""
    config = changed(attention_implementation="xla")  # compiles faster
    options = flags.defaults(OPTIMIZER_FLAGS)
    options.accumulate_gradient_steps = accumulate
    options.adamw_optimizer.update(lr=0.005, lr_warmup_steps=0)
    model, optimizer = training_task.make_model(config, dtype, mesh, LORA), make_optimizer(options)
    start = find_start(StartFiles(ORIGIN), "no_directory", checkpoints.CHECKPOINT_FORMATS)
    state = first_state(start, model, optimizer, mesh, seed=0)
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    rows = {"input_tokens": tokens_BT[:, :-1], "target_tokens": tokens_BT[:, 1:]}
    rows["loss_masks"] = np.ones((ROWS, LENGTH), np.float32)
    step = trace_step(model, optimizer, 0, mesh, state, abstract_batch(rows, ROWS, mesh)).lower().compile()
    groups = accumulating_groups(model, optimizer, mesh)
    state = state if groups is None else with_groups(state, groups)
    return Run(step, state, jax.device_put(rows, batch_sharding(mesh)))


def one_device():
    return make_mesh("1,1,1", jax.devices()[:1])


@pytest.fixture(scope="module")
def expected_losses():
    """The losses on one device."""
    losses = prepare(one_device(), accumulate=2).losses()
    assert losses[0] - losses[-1] > 0.05
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("mesh_dim", ["2,2,2", "dp:1,fsdp:2,mp:2,sp:2"])
def test_each_mesh_gives_the_losses_of_one_device(expected_losses, mesh_dim):
    """With accumulation, in which each group of devices along dp has the gradients of its own rows."""
    losses = prepare(make_mesh(mesh_dim), accumulate=2).losses()
    np.testing.assert_allclose(losses, expected_losses, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_training_does_not_change_frozen_bf16_kernels():
    run = prepare(one_device(), "bf16")
    frozen = jax.device_get(llama_model.with_kernels(checkpoints.load(ORIGIN), jnp.bfloat16))
    assert {x.dtype.name for x in jax.tree.leaves(frozen)} == {"bfloat16", "float32"}
    assert_equal(jax.device_get(run.state.extra), frozen)
    before = jax.device_get(run.state.params)
    losses = run.losses()
    assert losses[0] - losses[-1] > 0.05
    assert_equal(jax.device_get(run.state.extra), frozen)
    assert {x.dtype.name for x in jax.tree.leaves((run.state.params, run.state.opt_state))} == {"float32", "int32"}
    assert all((x != y).any() for x, y in zip(*map(jax.tree.leaves, (before, run.state.params)), strict=True))


@pytest.mark.slow
def test_a_bf16_run_resumes_bit_for_bit(tmp_path):
    settings = {"load_checkpoint": ORIGIN, "lora__rank": 4, "lora__dropout": 0.1, "dtype": "bf16"}
    settings |= {"save_model_freq": 3, "optimizer__adamw_optimizer__lr": 2e-2}
    whole = train(tmp_path / "whole", total_steps=6, **settings)
    train(tmp_path / "parts", total_steps=3, **settings)
    resumed = train(tmp_path / "parts", total_steps=6, **settings)
    assert metrics(resumed, *MODEL_METRICS) == metrics(whole, *MODEL_METRICS)
    states = [(run / "streaming_train_state").read_bytes() for run in (whole, resumed)]
    assert states[0] == states[1]
