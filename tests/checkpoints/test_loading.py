"""Loading: every prefix, every sharding, gradient accumulation, and one-line errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_kit import METADATA, assert_equal, file_content, golden_state, make_checkpointer, shapes_of, small_state
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM import checkpoints
from EasyLM.checkpoints import msgpack_arrays, stacking
from EasyLM.checkpoints.entries import SliceReader
from EasyLM.errors import UserError
from EasyLM.parallel import make_mesh
from EasyLM.training.step import TrainState


def test_every_prefix_loads_equal_parameters(golden, tmp_path):
    import orbax.checkpoint as ocp

    tiny = golden / "lvm_tiny"
    state = golden_state(golden)
    params = state.params
    assert params["params"]["transformer"]["h"]["attention"]["wq"]["kernel"].shape == (2, 64, 64)
    assert_equal(checkpoints.load(f"trainstate_params::{tiny}/final/streaming_train_state", params), params)
    assert_equal(checkpoints.load(f"flax_params::{tiny}/flax_params.msgpack", params), params)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert_equal(checkpoints.load(f"params::{tiny}/streaming_params_bf16"), half)
    assert_equal(checkpoints.load(f"params::{tiny}/streaming_params_bf16", half), half)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "params", params)
        saver.save(tmp_path / "state", {"step": state.step, "params": params, "opt_state": state.opt_state})
    assert_equal(checkpoints.load(f"orbax::{tmp_path}/params", params), params)
    assert_equal(checkpoints.load(f"orbax::{tmp_path}/state"), params)


def test_layers_are_stacked_on_loading(golden):
    path = golden / "lvm_tiny" / "final" / "streaming_train_state"
    state, files = golden_state(golden), file_content(path)
    for leaf in stacking.stacked_arrays({"params": state.params, "step": state.step}):
        for layer, key in enumerate(leaf.file_keys):
            np.testing.assert_array_equal(leaf.array[layer] if leaf.is_stacked else leaf.array, files[key])
    assert set(files) == {key for key, _, _ in stacking.file_order(state)}


@pytest.mark.parametrize("mesh_dim", ["1,1,8", "2,2,2", "8,1,1"])
def test_arrays_are_placed_on_their_shardings(golden, mesh_dim):
    mesh, params = make_mesh(mesh_dim), golden_state(golden).params
    specs = {1: P(), 2: P("fsdp", "mp"), 3: P(None, ("dp", "fsdp"), "mp")}

    def struct(x):
        spec = P(("dp", "fsdp", "mp")) if x.shape[0] == 512 else specs[x.ndim]
        spec = P(None) if x.shape == (2, 64) else spec
        return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    target = jax.tree.map(struct, params)
    spec = f"trainstate_params::{golden}/lvm_tiny/final/streaming_train_state"
    loaded = checkpoints.load(spec, target)
    for x, y, t in zip(*map(jax.tree.leaves, (loaded, params, target)), strict=True):
        assert x.sharding == t.sharding and x.dtype == jnp.bfloat16
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), y.astype(jnp.bfloat16)[shard.index])


def test_layers_split_over_devices(golden):
    mesh, params = make_mesh("4,2,1"), golden_state(golden).params
    one_layer = NamedSharding(mesh, P("fsdp"))  # of two layers, each device has one
    layers = params["params"]["transformer"]["h"]
    target = shapes_of(params)
    target["params"]["transformer"]["h"] = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one_layer), layers
    )
    loaded = checkpoints.load(f"trainstate_params::{golden}/lvm_tiny/final/streaming_train_state", target)
    assert_equal(loaded["params"]["transformer"]["h"], layers)


def test_optimizer_state_is_restored(golden):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3)))
    target = jax.eval_shape(
        lambda p: TrainState(jnp.int32(0), p, optimizer.init(p)), jax.tree.map(jnp.asarray, golden_state(golden).params)
    )
    path = golden / "lvm_tiny" / "step15" / "streaming_train_state"
    state = checkpoints.load(f"trainstate::{path}", target)
    assert isinstance(state, TrainState) and isinstance(state.opt_state[1][0], optax.ScaleByAdamState)
    assert int(state.step) == int(state.opt_state[1][0].count) == int(state.opt_state[1][2].count) == 15
    nu = state.opt_state[1][0].nu["params"]["lm_head"]["kernel"]
    expected = file_content(path)["opt_state", "1", "0", "nu", "params", "lm_head", "kernel"]
    np.testing.assert_array_equal(nu, expected)


def accumulating_states():
    """(optimizer, state after 5 micro-steps of 2) with and without accumulation, of the same small parameters."""
    params = jax.tree.map(jnp.asarray, small_state(1).params)
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    for optimizer in (plain, optax.MultiSteps(plain, 2)):
        opt_state, update = optimizer.init(params), jax.jit(optimizer.update)
        for _ in range(5):
            _, opt_state = update(params, opt_state, params)
        yield TrainState(jnp.int32(5), params, opt_state)


def test_accumulation_can_be_switched_on_and_off(tmp_path, caplog):
    plain, multi = accumulating_states()
    for name, state in {"plain": plain, "multi": multi}.items():
        saver = make_checkpointer(str(tmp_path / name))
        saver.save(state, 5, {}, METADATA)
        saver.wait()
    on = checkpoints.load(f"trainstate::{tmp_path}/plain/streaming_train_state", shapes_of(multi))
    assert_equal(on.opt_state.inner_opt_state, plain.opt_state)
    assert_equal((on.step, on.params), (plain.step, plain.params))
    assert (int(on.opt_state.mini_step), int(on.opt_state.gradient_step)) == (0, 5)
    assert not any(np.any(x) for x in jax.tree.leaves(on.opt_state.acc_grads))
    assert not caplog.records
    off = checkpoints.load(f"trainstate::{tmp_path}/multi/streaming_train_state", shapes_of(plain))
    assert_equal(off.opt_state, multi.opt_state.inner_opt_state)
    assert "gradients of 1 steps are dropped" in caplog.text
    same = checkpoints.load(f"trainstate::{tmp_path}/multi/streaming_train_state", shapes_of(multi))
    assert_equal(same, multi)


def test_invalid_loads_fail_before_reading_arrays(golden, tmp_path, monkeypatch):
    tiny = golden / "lvm_tiny"
    path = f"{tiny}/final/streaming_train_state"
    params = shapes_of(golden_state(golden).params)
    monkeypatch.setattr(msgpack_arrays, "read_pieces", lambda *_: pytest.fail("an array was read"))
    wider = jax.tree.map(lambda x: x, params)
    wider["params"]["lm_head"]["kernel"] = jax.ShapeDtypeStruct((64, 8292), np.float32)
    deeper = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape[1:]), x.dtype) if x.shape[0] == 2 else x, params)
    other = {"params": {**params["params"], "extra": {"kernel": jax.ShapeDtypeStruct((1,), np.float32)}}}
    text = tmp_path / "text"
    text.write_text("not a checkpoint")
    cut = tmp_path / "cut"
    cut.write_bytes((tiny / "streaming_params_bf16").read_bytes()[:100_000])
    for spec, target, message in (
        (
            f"trainstate_parms::{path}",
            None,
            r"choose one of 'trainstate', 'trainstate_params', 'params', 'flax_params'",
        ),
        (path, None, r"PREFIX::PATH"),
        ("params::/no/such/file", None, r"there is no /no/such/file"),
        (f"params::{tmp_path}", None, r"is not a file, as params:: needs"),
        (f"orbax::{path}", None, r"is not a directory"),
        (f"params::{text}", None, rf"{text}: entry 0: byte 0: not a checkpoint of this kind"),
        (f"params::{cut}", None, rf"{cut}: transformer/.*: byte \d+: the file is truncated"),
        (f"flax_params::{path}", None, r"not a checkpoint of this kind: expected map"),
        (f"params::{path}", params, r"it is a train state: load it as trainstate::.* or trainstate_params::"),
        (f"trainstate_params::{tiny}/streaming_params_bf16", params, r"not a train state.*params::"),
        (f"trainstate_params::{path}", wider, r"params/lm_head/kernel has shape \(64, 512\), expected \(64, 8292\)"),
        (f"trainstate_params::{path}", deeper, r"missing params/transformer/h/2/attention/wk/kernel.* and 3 more$"),
        (f"trainstate_params::{path}", other, r"missing params/extra/kernel$"),
        (f"trainstate::{path}", params, r"unexpected step, params/params/lm_head/kernel, .*more$"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            checkpoints.load(spec, target)
        assert "\n" not in str(caught.value) and spec.partition("::")[2] in str(caught.value)


def test_each_device_s_part_is_read_alone():
    """Of entries that can be read in slices, one layer at a time, and converted to the target's type."""
    values, sizes = np.arange(2 * 8 * 4, dtype=np.float32).reshape(2, 8, 4), []

    def entry(layer):
        def read(out, index):
            sizes.append(out.size)
            out[...] = values[(layer, *index)]

        return checkpoints.Entry(("h", str(layer), "w"), (8, 4), np.dtype(np.float32), SliceReader(read))

    sharding = NamedSharding(make_mesh("1,4,2"), P(None, "fsdp", "mp"))
    target = {"h": {"w": jax.ShapeDtypeStruct(values.shape, jnp.bfloat16, sharding=sharding)}}
    loaded = checkpoints.load_entries("orbax::x", [entry(0), entry(1)], target)["h"]["w"]
    assert loaded.sharding == sharding and loaded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(loaded, np.float32), values)
    assert sizes == [4] * 16  # 2 layers of 8 devices
