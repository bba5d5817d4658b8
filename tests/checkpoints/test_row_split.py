"""The rows of an array, split over devices: which rows each device gets, and the way back."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM.checkpoints.row_split import RowSplit, join_program, split_program
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


@pytest.mark.slow
@pytest.mark.parametrize("program", [split_program, join_program])
def test_no_device_receives_the_whole_array(program):
    """XLA's own plan for these shardings is to replicate the array."""
    rows = RowSplit((4, 64, 32), 1, NamedSharding(make_mesh("2,2,2"), P(None, "mp", "fsdp")))
    sharding, shape = (rows.home, rows.shape) if program is split_program else (rows.sharding, rows.split_shape)
    text = program(rows).lower(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)).compile().as_text()
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    assert "all-to-all" in text and max(sizes) == 4 * 64 * 32 // 4  # of a device at home
