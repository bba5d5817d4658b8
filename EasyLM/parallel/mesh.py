"""The device mesh, the table of partition rules, and the start of a multi-process run."""

import logging
import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM.errors import UserError
from EasyLM.flags import Flag

AXES = ("dp", "fsdp", "mp")  # data parallel, fully sharded data parallel, model (tensor) parallel
BATCH_AXES = ("dp", "fsdp")  # the mesh axes over which a batch is split

JAX_DISTRIBUTED_FLAGS = {
    "initialize_jax_distributed": Flag(False, "Start jax.distributed: one process per host of a multi-host run."),
    "coordinator_address": Flag(None, "HOST:PORT of process 0; found by itself on SLURM and TPU pods.", type=str),
    "num_processes": Flag(None, "Number of processes; found by itself on SLURM and TPU pods.", type=int),
    "process_id": Flag(None, "This process's index; found by itself on SLURM and TPU pods.", type=int),
    "local_device_ids": Flag(None, "Comma list of this process's devices; empty for all it sees.", type=str),
}


def initialize_distributed(config) -> None:
    """Joins the processes of a multi-host run, if the config asks for it. Call before any other use of JAX.

    Raises:
      UserError: if `local_device_ids` is not a comma list of integers, or the processes do not find each other.
    """
    if not config.initialize_jax_distributed:
        return
    try:
        ids = [int(i) for i in config.local_device_ids.split(",")] if config.local_device_ids else None
    except ValueError:
        raise UserError(
            f"--jax_distributed.local_device_ids={config.local_device_ids}: give a comma list of integers, as 0,1,2,3"
        ) from None
    try:
        jax.distributed.initialize(config.coordinator_address, config.num_processes, config.process_id, ids)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--jax_distributed: the processes did not start together ({error}); check coordinator_address="
            f"{config.coordinator_address}, num_processes={config.num_processes}, process_id={config.process_id}"
        ) from error


def parse_mesh_dim(text: str, num_devices: int) -> dict[str, int]:
    """Mesh axes and sizes from `--mesh_dim`: `1,-1,1` (dp,fsdp,mp), or named, as `dp:1,fsdp:-1,mp:2`.

    One size may be -1: all devices that the others leave. A leading `!` (see `make_mesh`) is ignored here.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    def fail(reason):
        return UserError(f"--mesh_dim={text}: {reason}")

    parts = [part.strip() for part in text.removeprefix("!").split(",")]
    if any(":" in part for part in parts):
        names, _, sizes = zip(*(part.partition(":") for part in parts), strict=True)
        if not set(AXES) <= set(names) or len(set(names)) != len(names):
            raise fail(f"a named mesh has each of the axes {', '.join(AXES)} once (further ones may be added)")
    else:
        names, sizes = AXES, parts
        if len(sizes) != len(AXES):
            raise fail(f"give {len(AXES)} sizes, for {', '.join(AXES)}; or named ones, as dp:1,fsdp:-1,mp:1")
    if not all(re.fullmatch(r"-1|[1-9]\d*", size) for size in sizes):
        raise fail("each size is a positive integer, or -1 for all devices that the others leave")
    sizes = [int(size) for size in sizes]
    if sizes.count(-1) > 1:
        raise fail("only one size may be -1")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and num_devices % known == 0:
        sizes[sizes.index(-1)] = num_devices // known
    if math.prod(sizes) != num_devices:
        raise fail(f"does not divide the {num_devices} devices of this run")
    return dict(zip(names, sizes, strict=True))


def make_mesh(mesh_dim: str, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `--mesh_dim` over all or given devices. A leading `!` lets a physical axis be split over two."""
    devices = devices or jax.devices()
    shape = parse_mesh_dim(mesh_dim, len(devices))
    devices = mesh_utils.create_device_mesh(
        tuple(shape.values()), devices, allow_split_physical_axes=mesh_dim.startswith("!")
    )
    # Auto: the compiler propagates shardings. Explicit, JAX's default, would ask for one at every gather.
    return Mesh(devices, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over dp and fsdp; the other dimensions whole."""
    return NamedSharding(mesh, P(BATCH_AXES))


def check_batch_size(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless the global batch divides over the mesh."""
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size < 1 or batch_size % ways:
        raise UserError(f"--{name}={batch_size}: must be a positive multiple of {ways}, the mesh's dp x fsdp")


def match_partition_rules(rules, tree):
    """The partition spec of every array (or shape) of a tree, by the first rule whose pattern finds its path.

    A spec shorter than the array belongs to stacked layers: the layer axis is not split. Scalars are replicated, as is
    what has no axes to split (adafactor's placeholders, of shape (1,) for each tensor).

    Raises:
      AssertionError: if an array matches no rule.
    """

    def spec_of(path, array):
        name = "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
        if len(array.shape) == 0 or array.shape[-1] == 1:
            return P()
        for pattern, spec in rules:
            if re.search(pattern, name):
                extra = len(array.shape) - len(spec)
                assert extra >= 0, f"{name} {array.shape}: the rule's spec {spec} has too many axes"
                return P(*(None,) * extra, *spec) if len(spec) else P()
        raise AssertionError(f"no partition rule matches {name}")

    return jax.tree_util.tree_map_with_path(spec_of, tree)


def shardings(mesh: Mesh, rules, tree):
    """The sharding of every array of a tree. A dimension that its mesh axes do not divide is kept whole, and logged."""

    def sharding_of(array, spec):
        fitting = []
        for size, axis in zip(array.shape, tuple(spec) + (None,) * (len(array.shape) - len(spec)), strict=True):
            ways = math.prod(mesh.shape[a] for a in np.atleast_1d(axis)) if axis is not None else 1
            if size % ways:
                logging.info(
                    "an array of shape %s: %d does not divide by %s=%d, kept whole", array.shape, size, axis, ways
                )
            fitting.append(axis if size % ways == 0 else None)
        return NamedSharding(mesh, P(*fitting))

    return jax.tree.map(sharding_of, tree, match_partition_rules(rules, tree))
