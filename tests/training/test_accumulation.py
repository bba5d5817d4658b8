"""Accumulated gradients: groups of devices along dp keep their own, and are reduced once an update."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from EasyLM.models.llama import llama_config, training_task
from EasyLM.parallel import BATCH_AXES, GROUP_AXIS, batch_sharding, constrain, group_mesh, make_mesh
from EasyLM.planning.collectives import communication
from EasyLM.planning.hlo import executed_instructions
from EasyLM.training import Optimizer, abstract_batch, abstract_state, model_without_extra
from EasyLM.training.abstract_step import accumulating_groups, trace_step
from EasyLM.training.accumulation import at_rest, with_groups
from EasyLM.training.step import init_state

ROWS, LENGTH, WIDTH, OUTPUTS = 8, 6, 32, 64
GROUPS, MICRO_STEPS, RATE = 4, 3, 0.1
NOT_LOGGED = 1  # a step
SCALARS = 4 * 100  # more than the bytes of all scalars that a step sums over devices


def mean_of_rows(errors_BT, masks_BT):
    return ((errors_BT * masks_BT).sum(1) / masks_BT.sum(1)).mean()


def linear_model(mesh):
    """The mean over rows of the mean over each row's valid places, as the losses of language models."""

    def loss_on(mesh):
        def loss(params, batch, key):
            y_BTO = constrain(batch["x"], mesh, BATCH_AXES) @ params["params"]["w"]
            value = mean_of_rows(jnp.square(y_BTO - 1).mean(-1), batch["masks"])
            return value, {"size": mean_of_rows(jnp.abs(y_BTO).mean(-1), batch["masks"])}

        return loss

    def init(key):
        return {"params": {"w": jax.random.normal(key, (WIDTH, OUTPUTS))}}

    return model_without_extra(init, loss_on(mesh), [("w", P("fsdp", None))], loss_on(group_mesh(mesh)))


def batch_of(seed):
    """Rows, and so groups, have different numbers of valid places."""
    rng = np.random.default_rng(seed)
    masks_BT = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (ROWS, 1))
    return {"x": rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32), "masks": masks_BT.astype(np.float32)}


class Step:
    """A compiled step of a model, and its first state."""

    def __init__(self, model, mesh, batch, micro_steps=MICRO_STEPS):
        self.mesh, rows = mesh, len(next(iter(batch.values())))
        optimizer = Optimizer(optax.sgd(RATE), lambda opt_state: RATE, micro_steps)
        self.groups = accumulating_groups(model, optimizer, mesh)
        shapes, shape_of_batch = abstract_state(model, optimizer, mesh), abstract_batch(batch, rows, mesh)
        self.compiled = (
            trace_step(model, optimizer, 0, mesh, shapes, shape_of_batch, is_logged=lambda step: step != NOT_LOGGED)
            .lower()
            .compile()
        )
        self.first = lambda: init_state(model.init, optimizer, 0, jax.tree.map(lambda array: array.sharding, shapes))

    def __call__(self, state, batch):
        state = state if self.groups is None else with_groups(state, self.groups)
        return self.compiled(state, jax.device_put(batch, batch_sharding(self.mesh)))

    def run(self, batches):
        """Returns the last state at rest, and the metrics of each step."""
        state, rows = self.first(), []
        for batch in batches:
            state, row = self(state, batch)
            rows.append(jax.device_get(row))
        return at_rest(state, self.mesh), rows

    def bytes_over_dp(self, in_branches):
        """Returns the bytes that a micro-step sends from one group to another, with or without those of branches."""
        dp = self.mesh.axis_names.index("dp")
        groups = np.moveaxis(np.indices(self.mesh.devices.shape), 0, -1)[..., dp].reshape(-1).tolist()
        executed = executed_instructions(self.compiled.as_text(), branch_share=float(in_branches))
        return sum(communication(executed, groups).across.values())


@pytest.fixture(scope="module")
def steps():
    """(the step with groups, the step that reduces each micro-step)"""
    mesh = make_mesh(f"{GROUPS},-1,1")
    model = linear_model(mesh)
    return [Step(each, mesh, batch_of(0)) for each in (model, dataclasses.replace(model, gradients_of_group=None))]


def assert_equal_runs(runs):
    (state, rows), (expected, expected_rows) = runs
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), state, expected)
    assert rows[NOT_LOGGED].pop("gradient_norm") == 0 < expected_rows[NOT_LOGGED].pop("gradient_norm")
    for row, expected_row in zip(rows, expected_rows, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), row, expected_row)


@pytest.mark.parametrize("micro_steps", [2 * MICRO_STEPS, MICRO_STEPS + 1])
def test_groups_accumulate_the_mean_of_the_batches(steps, micro_steps):
    runs = [step.run(map(batch_of, range(micro_steps))) for step in steps]
    assert_equal_runs(runs)
    state = runs[0][0]
    assert np.abs(state.params["params"]["w"] - steps[0].first().params["params"]["w"]).max() > 1e-3


def test_only_an_update_and_a_logged_norm_communicate_over_dp(steps):
    grouped, reduced = steps
    bytes_of_device = 4 * WIDTH * OUTPUTS // grouped.mesh.shape["fsdp"]
    assert grouped.bytes_over_dp(in_branches=False) <= SCALARS < bytes_of_device
    assert grouped.bytes_over_dp(in_branches=True) >= bytes_of_device
    assert reduced.bytes_over_dp(in_branches=False) >= bytes_of_device


def test_only_the_last_micro_step_transforms():
    """A transformation can be expensive: Muon's has matrix products."""
    counts = []

    def update(updates, state, params=None):
        jax.debug.callback(lambda: counts.append(1))
        return updates, state

    transform = optax.GradientTransformation(optax.sgd(RATE).init, update)
    optimizer = Optimizer(transform, lambda opt_state: RATE, MICRO_STEPS)
    params = {"w": jnp.ones(2)}
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(2 * MICRO_STEPS):
        _, state = step(params, state, params)
    jax.effects_barrier()
    assert len(counts) == 2


def test_a_group_that_is_not_finite_skips_the_micro_step_of_all(steps):
    batches = [batch_of(seed) for seed in range(MICRO_STEPS)]
    bad = batch_of(MICRO_STEPS)
    bad["x"][-1] = np.inf  # a row of the last group
    state, rows = steps[0].run([batches[0], bad, *batches[1:]])
    assert [bool(row["finite"]) for row in rows] == [True, False, True, True]
    expected, _ = steps[0].run(batches)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (expected.params, expected.opt_state))


def test_a_state_at_rest_is_continued_by_all_groups(steps):
    step = steps[0]
    state, _ = step(step.first(), batch_of(0))
    groups_GIO = state.opt_state.acc_grads["params"]["w"]
    assert groups_GIO.shape == (GROUPS, WIDTH, OUTPUTS) and groups_GIO.sharding.spec[:2] == (GROUP_AXIS, "fsdp")
    assert np.asarray(groups_GIO).std(0).max() > 1e-3 and with_groups(state, step.groups) is state
    rest = at_rest(state, step.mesh)
    assert {array.sharding.mesh for array in jax.tree.leaves(rest)} == {step.mesh} and at_rest(rest, step.mesh) is rest
    mean_IO = np.array(rest.opt_state.acc_grads["params"]["w"])
    np.testing.assert_allclose(mean_IO, np.asarray(groups_GIO).mean(0), rtol=1e-6)
    continued = with_groups(rest, step.groups)
    np.testing.assert_array_equal(at_rest(continued, step.mesh).opt_state.acc_grads["params"]["w"], mean_IO)
    assert rest.opt_state.acc_grads["params"]["w"].is_deleted()


@pytest.mark.slow
def test_documents_and_padding():
    """A model on a mesh with all axes; groups have different numbers of valid tokens."""
    mesh, length = make_mesh("dp:2,fsdp:2,mp:1,sp:2"), 64
    small = {"num_hidden_layers": 1, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "remat_block": ""}
    llama = dataclasses.replace(llama_config.PRESETS["vqlm_debug"], **small)
    model = training_task.make_model(llama, "fp32", mesh)

    def batch_of(seed):
        rng = np.random.default_rng(seed)
        ids_BT = rng.integers(0, 512, (ROWS, length + 1), dtype=np.int32)
        return {
            "input_tokens": ids_BT[:, :-1],
            "target_tokens": ids_BT[:, 1:],
            "loss_masks": (np.arange(length) < rng.integers(1, length, (ROWS, 1))).astype(np.float32),
            "segment_ids": np.sort(rng.integers(0, 3, (ROWS, length)).astype(np.int32), 1),
        }

    grouped, reduced = (
        Step(each, mesh, batch_of(0), 2) for each in (model, dataclasses.replace(model, gradients_of_group=None))
    )
    assert_equal_runs([step.run(map(batch_of, range(4))) for step in (grouped, reduced)])
    assert grouped.bytes_over_dp(in_branches=False) <= SCALARS < reduced.bytes_over_dp(in_branches=False) / 100
