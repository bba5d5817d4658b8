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
from EasyLM.training.step import TrainState


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
    read_rows, sizes = shared_reads.SharedReads._read_rows, []

    def counted(self, entry, first_row, out):
        sizes.append(out.size)
        read_rows(self, entry, first_row, out)

    monkeypatch.setattr(shared_reads.SharedReads, "_read_rows", counted)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=home), small_state(3))
    spec = f"trainstate::{tmp_path}/streaming_train_state"
    loaded = checkpoints.load(spec, target)
    assert_equal(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), small_state(3)))
    assert set(sizes) == {1, 4}  # single rows, of which each device has at most one
    path = tmp_path / "streaming_train_state"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in the last row of the last array
    path.write_bytes(data)
    with pytest.raises(
        checkpoints.DamagedArrayError, match=r"the array opt_state/mu/params/transformer/ln_f is damaged"
    ):
        checkpoints.load(spec, target)


class EightProcesses:
    """The eight devices of this process, each of which stands for a process that loads the same checkpoint."""

    def __init__(self, run_dir, monkeypatch):
        rng = np.random.default_rng(0)
        layers = {"w": rng.normal(size=(2, 48, 64)).astype(np.float32)}
        state = TrainState(np.zeros((), np.int32), {"h": layers, "few": np.ones((5, 2), np.float32)}, {})
        saver = make_checkpointer(run_dir)
        saver.save(state, 1, {}, {"step": 1})
        saver.wait()
        self.spec = f"trainstate::{run_dir}/streaming_train_state"
        home = NamedSharding(make_mesh("2,2,2"), P())
        self._wanted = stacked_arrays(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))
        split = {x.key: RowSplit(x.array.shape, int(x.is_stacked), home) for x in self._wanted if x.file_shape}
        monkeypatch.setattr(shared_reads, "row_split", lambda stacked: split.get(stacked.key))
        self._monkeypatch, self.size = monkeypatch, sum(x.array.size * 4 for x in self._wanted)

    def read(self) -> list[shared_reads.SharedReads]:
        entries = {entry.key: entry for entry in checkpoints.open_checkpoint(self.spec)}
        local_rows, loads = RowSplit.local_rows, []
        for device in jax.devices():
            rows = lambda split, device=device: {device: local_rows(split)[device]}  # noqa: E731
            with self._monkeypatch.context() as patch:
                patch.setattr(RowSplit, "local_rows", rows)
                loads.append(shared_reads.SharedReads(entries, self._wanted))
                for stacked in self._wanted:
                    if stacked.key in loads[-1].splits:
                        loads[-1].read(stacked)
        return loads


def test_eight_processes_read_each_byte_once(tmp_path, monkeypatch, caplog):
    """The checksums of what they read together are those of the saved arrays. One process saved them."""
    processes = EightProcesses(tmp_path, monkeypatch)
    loads = processes.read()
    assert all(sum(part[2] for part in load._parts) <= 1.1 * processes.size / 8 for load in loads)
    parts = [part for load in loads for part in load._parts]
    loads[0]._verify(parts)
    assert not caplog.text
    parts[0][3] ^= 1
    with pytest.raises(checkpoints.DamagedArrayError):
        loads[0]._verify(parts)


@pytest.mark.parametrize("lacking", [0, 5, 7])  # 7 has no rows of one of the arrays
def test_a_host_without_checksums_is_no_damage(tmp_path, monkeypatch, caplog, lacking):
    """Each host has a copy of the checkpoint, and one copy lacks checksums.json."""
    processes = EightProcesses(tmp_path, monkeypatch)
    loads = processes.read()
    (tmp_path / "latest" / "checksums.json").unlink()
    loads[lacking] = processes.read()[lacking]
    for process in {0, lacking}:  # in turn as process 0
        loads[process]._verify([part for load in loads for part in load._parts])
    assert "arrays were not verified, such as params/" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("program", [split_program, join_program])
def test_no_device_receives_the_whole_array(program):
    """XLA's own plan for these shardings is to replicate the array."""
    rows = RowSplit((4, 64, 32), 1, NamedSharding(make_mesh("2,2,2"), P(None, "mp", "fsdp")))
    sharding, shape = (rows.home, rows.shape) if program is split_program else (rows.sharding, rows.split_shape)
    text = program(rows).lower(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)).compile().as_text()
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    assert "all-to-all" in text and max(sizes) == 4 * 64 * 32 // 4  # of a device at home
