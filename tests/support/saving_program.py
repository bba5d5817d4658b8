"""A program of several processes that save and load a state together. Used by test_several_processes.py."""

import errno
import io
import json
import os
import signal

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM import checkpoints, flags
from EasyLM.checkpoints import entries, streaming
from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.parallel import JAX_DISTRIBUTED_FLAGS, fail_together, initialize_distributed, make_mesh
from EasyLM.parallel.coordination import jax_client
from EasyLM.training.step import TrainState

FLAGS = {
    "run_dir": Flag("", "The run directory of this process."),
    "output": Flag("", "File of the results, a line each. Native libraries write to stdout, in the middle of lines."),
    "mesh_dim": Flag("1,-1,1", "The mesh."),
    "load": Flag(False, "Load the newest checkpoint, which must be that of the first step, instead of saving it."),
    "format": Flag("streaming", "See CHECKPOINTER_FLAGS."),
    "full": Flag(-1, "The process whose disk is full at the second save."),
    "killed": Flag(-1, "The process that is killed while it writes the third save."),
    "jax_distributed": JAX_DISTRIBUTED_FLAGS,
}
SPECS = {
    "wq": P(None, "fsdp", "mp"),
    "wo": P(None, "mp", "fsdp"),
    "norm": P(),
    "wte": P(None, "fsdp"),
    "few": P(),
    "none": P(),
}


def values(step: int, kind: str = "streaming") -> TrainState:
    """Returns a state of NumPy arrays, among them arrays whose rows no number of processes divides.

    Args:
      kind: the format; Orbax does not save arrays without elements.
    """
    rng = np.random.default_rng(step)
    shapes = {"wq": (4, 256, 512), "wo": (4, 512, 256), "norm": (4, 256)}
    layers = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    shapes = {"wte": (1003, 96), "few": (5,), "none": (0, 2)}
    if kind == "orbax":
        del shapes["none"]
    other = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    params = {"params": {"h": layers, **other}}
    halves = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    return TrainState(np.full((), step, np.int32), params, {"count": np.int32(step), "mu": halves, "nu": params})


def shapes_on(mesh: jax.sharding.Mesh, kind: str) -> TrainState:
    """Returns the state's shapes, types and shardings."""

    def on_mesh(path, x):
        name = path[-1].key if len(path) > 2 else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, SPECS.get(name, P())))

    return jax.tree_util.tree_map_with_path(on_mesh, values(0, kind))


def on_mesh(state: TrainState, shapes: TrainState) -> TrainState:
    def put(x, shape):
        return jax.make_array_from_callback(x.shape, shape.sharding, lambda index: np.asarray(x[index]))

    return jax.tree.map(put, state, shapes)


def assert_same(left: TrainState, right: TrainState) -> None:
    """Compares the parts of this process."""
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert x.sharding == y.sharding and x.dtype == y.dtype and x.shape == y.shape
        for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True):
            assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()


def count_written() -> list[int]:
    """Returns a list to which each write into a state file adds its number of bytes."""
    write_at, sizes = streaming._write_at, []

    def write(file, offset, data):
        sizes.append(len(data))
        write_at(file, offset, data)

    streaming._write_at = write
    return sizes


def count_read() -> list[int]:
    """Returns a list to which each read of arrays from a state file adds its number of bytes."""
    sizes = []

    class Counted(io.FileIO):
        def readinto(self, buffer):
            sizes.append(super().readinto(buffer))
            return sizes[-1]

    entries._open_unbuffered = Counted
    return sizes


def before_third_write(action) -> None:
    """Calls `action` in place of the third write of rows by this process."""
    write_rows, count = streaming.write_rows, 0

    def write(*arguments):
        nonlocal count
        count += 1
        if count == 3:
            action()
        write_rows(*arguments)

    streaming.write_rows = write


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@fail_together()
def main(config):
    initialize_distributed(config.jax_distributed)
    process, shapes = jax.process_index(), shapes_on(make_mesh(config.mesh_dim), config.format)
    first = on_mesh(values(1, config.format), shapes)
    saver = checkpoints.Checkpointer(config.run_dir, save_optimizer_state=True, format=config.format)

    def write_result(line):
        with open(config.output, "a") as file:
            file.write(f"{line}\n")

    def save(step):
        saver.save(on_mesh(values(step, config.format), shapes), step, {"step": step}, {"step": step, "flags": {}})
        saver.wait()

    if not config.load:
        saver.prepare(first)
        written = count_written()
        save(1)
        copied = saver._writer._copy._blocks.values() if config.format == "streaming" else []
        blocks = [block.values.nbytes for blocks in copied for block in blocks]
        write_result(json.dumps({"written": sum(written), "memory": sum(blocks)}))
    read = count_read()
    loaded = checkpoints.load(checkpoints.latest_checkpoint(config.run_dir).spec, shapes)
    messages = [] if config.load else jax_client().key_value_dir_get("EasyLM/channel/load/")
    write_result(json.dumps({"read": sum(read), "messages": len(messages)}))
    assert_same(loaded, first)
    if process == config.full:
        before_third_write(full)
    try:
        save(2)
    except UserError as error:
        write_result(str(error))
    if process == config.killed:
        before_third_write(kill)
    save(3)


if __name__ == "__main__":
    flags.run(main, FLAGS)
