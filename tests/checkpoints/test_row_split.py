"""The rows of an array, split over devices: which rows each device gets, and the way back."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_kit import assert_equal, make_checkpointer, save, small_state
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM import checkpoints
from EasyLM.checkpoints import host_copy, shared_reads
from EasyLM.checkpoints.row_split import RowSplit, join_program, split_program
from EasyLM.checkpoints.stacking import stacked_arrays
from EasyLM.parallel import make_mesh


@pytest.mark.parametrize(
    "mesh_dim, shape, axis, spec",
    [
        ("2,2,2", (3, 12, 4), 1, P(None, "mp", "fsdp")),  # 6 rows at home, for 4 devices
        pytest.param("2,2,2", (2, 5, 4), 1, P("dp", None, ("fsdp", "mp")), marks=pytest.mark.slow),
        pytest.param("1,8,1", (11, 16), 0, P("mp", "fsdp"), marks=pytest.mark.slow),
        pytest.param("8,1,1", (3, 5), 1, P(), marks=pytest.mark.slow),  # fewer rows than devices
    ],
)
def test_devices_get_consecutive_rows_and_give_them_back(mesh_dim, shape, axis, spec):
    home = NamedSharding(make_mesh(mesh_dim), spec)
    rows = RowSplit(shape, axis, home)
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    blocks = rows.split(jax.device_put(values, home))
    assert blocks.shape == rows.split_shape
    covered = []
    for shard in blocks.addressable_shards:
        start, stop = rows.local_rows()[shard.device]
        block = np.asarray(shard.data)[(slice(None),) * axis + (slice(stop - start),)]
        np.testing.assert_array_equal(block, values[(slice(None),) * axis + (slice(start, stop),)])
        covered += range(start, stop)
    assert sorted(covered) == list(range(shape[axis]))
    joined = rows.join(blocks)
    assert joined.sharding == home
    for shard in joined.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), values[shard.index])


def test_devices_without_rows_copy_none(monkeypatch):
    """The first row of the next device is the end of a device without rows."""
    home = NamedSharding(make_mesh("1,4,2"), P("fsdp", "mp"))
    monkeypatch.setattr(host_copy, "row_split", lambda stacked: RowSplit(stacked.array.shape, 0, home))
    values = np.arange(32, dtype=np.float32).reshape(4, 8)
    (stacked,) = stacked_arrays({"w": jax.device_put(values, home)})
    copy = host_copy.HostCopy(split=True)
    copy.update([stacked])
    blocks = sorted(copy.blocks(stacked.key), key=lambda block: block.first_row)
    np.testing.assert_array_equal(np.concatenate([block.values for block in blocks]), values)


def test_rows_that_processes_read_together_are_verified(tmp_path, monkeypatch):
    """The one process reads the rows of all devices."""
    save(make_checkpointer(tmp_path), 3)
    home = NamedSharding(make_mesh("2,2,2"), P())
    monkeypatch.setattr(
        shared_reads,
        "row_split",
        lambda stacked: RowSplit(stacked.array.shape, int(stacked.is_stacked), home) if stacked.file_shape else None,
    )
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=home), small_state(3))
    spec = f"trainstate::{tmp_path}/streaming_train_state"
    loaded = checkpoints.load(spec, target)
    assert_equal(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), small_state(3)))
    path = tmp_path / "streaming_train_state"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in the last row of the last array
    path.write_bytes(data)
    with pytest.raises(
        checkpoints.DamagedArrayError, match=r"the array opt_state/mu/params/transformer/ln_f is damaged"
    ):
        checkpoints.load(spec, target)


@pytest.mark.slow
@pytest.mark.parametrize("program", [split_program, join_program])
def test_no_device_receives_the_whole_array(program):
    """XLA's own plan for these shardings is to replicate the array."""
    rows = RowSplit((4, 64, 32), 1, NamedSharding(make_mesh("2,2,2"), P(None, "mp", "fsdp")))
    sharding, shape = (rows.home, rows.shape) if program is split_program else (rows.sharding, rows.split_shape)
    text = program(rows).lower(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)).compile().as_text()
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    assert "all-to-all" in text and max(sizes) == 4 * 64 * 32 // 4  # of a device at home
