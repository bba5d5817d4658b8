"""Saving: the bytes of the release, parameter types, asynchronous copies, several processes."""

import os

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_kit import (
    METADATA,
    file_content,
    golden_state,
    make_checkpointer,
    small_state,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM import checkpoints
from EasyLM.checkpoints import stacking, streaming
from EasyLM.errors import UserError
from EasyLM.parallel import make_mesh
from EasyLM.training.step import TrainState


@pytest.mark.parametrize("run", ["init", "step15", "final"])
def test_golden_state_saves_to_the_same_bytes(golden, tmp_path, run):
    saver = make_checkpointer(tmp_path)
    saver.save(jax.tree.map(jnp.asarray, golden_state(golden, run)), 30, {}, METADATA)
    saver.wait()
    expected = (golden / "lvm_tiny" / run / "streaming_train_state").read_bytes()
    assert (tmp_path / "streaming_train_state").read_bytes() == expected


def test_keys_equal_flax(tmp_path):
    """Including optimizers whose states nest differently."""
    params = jax.tree.map(jnp.asarray, small_state(1).params)
    optimizer = optax.MultiSteps(optax.chain(optax.adafactor(1e-3), optax.trace(0.9)), 2)
    opt_state = optimizer.init(params)
    expected = flax.serialization.to_state_dict({"opt_state": opt_state, "params": params})

    def flatten(tree, path=()):
        if not isinstance(tree, dict):
            return {path}
        return set().union(*(flatten(value, (*path, key)) for key, value in tree.items()))

    assert {leaf.key for leaf in stacking.stacked_arrays({"opt_state": opt_state, "params": params})} == flatten(
        expected
    )


def test_float_dtype_casts_only_parameters(golden, tmp_path):
    state, tiny = golden_state(golden), golden / "lvm_tiny"
    reference = file_content(tiny / "final" / "streaming_train_state")
    for float_dtype, whole in (("", False), ("bf16", False), ("fp32", False), ("bf16", True), ("fp16", True)):
        run = tmp_path / f"{float_dtype}{whole}"
        saver = make_checkpointer(str(run), float_dtype, whole)
        saver.save(state, 30, {}, METADATA)
        saver.wait()
        saved = file_content(run / ("streaming_train_state" if whole else "streaming_params"))
        expected = {key if whole else key[2:]: x for key, x in reference.items() if whole or key[0] == "params"}
        assert list(saved) == list(expected)
        dtype = checkpoints.FLOAT_DTYPES[float_dtype or "bf16"]
        for key, array in expected.items():
            wanted = array.astype(dtype) if not whole or key[0] == "params" else array
            assert saved[key].dtype == wanted.dtype and saved[key].tobytes() == wanted.tobytes(), key
    released = (tiny / "streaming_params_bf16").read_bytes()
    assert (tmp_path / "False" / "streaming_params").read_bytes() == released
    with pytest.raises(UserError, match=r"float_dtype='int8': choose one of '', 'fp32'"):
        make_checkpointer(str(tmp_path), "int8")


@pytest.mark.parametrize("mesh_dim", ["1,1,1", "1,8,1", "2,2,2"])
def test_save_copies_before_arrays_are_donated(tmp_path, mesh_dim):
    """The next step donates the arrays while they are being written."""
    mesh = make_mesh(mesh_dim, jax.devices()[: int(np.prod([int(n) for n in mesh_dim.split(",")]))])
    specs = {3: P(None, "fsdp", "mp"), 2: P("fsdp"), 1: P(), 0: P()}

    def put(x):
        return jax.device_put(x, NamedSharding(mesh, specs[x.ndim]))

    params = {"params": {"h": {"w": np.zeros((2, 512, 128), np.float32)}, "b": np.zeros((64, 3), np.float32)}}
    state = jax.tree.map(put, TrainState(np.zeros((), np.int32), params, {"mu": params}))
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    saver = make_checkpointer(tmp_path)
    saver.prepare(state)
    for i in range(4):
        saver.save(state, i, {}, METADATA, milestone=True)
        state = step(step(state))
    saver.wait()
    for i in range(4):
        saved = file_content(tmp_path / f"streaming_train_state_{i}")
        assert all(np.all(array == 2 * i) for array in saved.values())


def test_unexpected_errors_are_raised_by_wait(tmp_path, monkeypatch):
    saver = make_checkpointer(tmp_path)
    monkeypatch.setattr(streaming, "write_rows", lambda *_: 1 / 0)
    saver.save(small_state(1), 1, {}, METADATA)
    with pytest.raises(ZeroDivisionError):
        saver.wait()
    saver.wait()


def test_nothing_is_saved_in_a_directory_that_another_run_has_taken(tmp_path):
    def refuse():
        raise UserError("taken over")

    saver = checkpoints.Checkpointer(str(tmp_path), save_optimizer_state=True, guard=refuse)
    saver.save(small_state(1), 1, {}, METADATA)
    with pytest.raises(UserError, match="taken over"):
        saver.wait()
    assert os.listdir(tmp_path) == ["checkpoints"] and not os.listdir(tmp_path / "checkpoints")
