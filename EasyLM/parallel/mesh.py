"""The device mesh of `--mesh_dim`, and how a batch is split over it."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM.errors import UserError

AXES = ("dp", "fsdp", "mp")  # data parallel, fully sharded data parallel, model (tensor) parallel
# The mesh axes over which arrays are split. sp (sequence parallel) has the size 1 unless it is named.
BATCH_AXES = ("dp", "fsdp")  # rows of a batch
TOKEN_AXES = (*BATCH_AXES, "sp")  # tokens of a batch
SHARD_AXES = ("fsdp", "sp")  # parameters, besides mp
HEAD_AXES = ("mp", "sp")  # heads, while the devices along sp have whole sequences
GROUP_AXIS = "dp_group"  # see `group_mesh`


def parse_mesh_dim(text: str, num_devices: int) -> dict[str, int]:
    """Parses `--mesh_dim` to mesh axes and sizes: `1,-1,1` (dp,fsdp,mp), or with names, `dp:1,fsdp:-1,mp:1,sp:2`.

    One size may be -1: all remaining devices. A leading `!` (see `make_mesh`) is ignored here. If sp is not named, it
    is the last axis and has the size 1.

    Raises:
      UserError: with the value and the violated rule.
    """

    def fail(reason: str) -> UserError:
        return UserError(f"--mesh_dim={text}: {reason}")

    names, texts = list(AXES), [part.strip() for part in text.removeprefix("!").split(",")]
    if any(":" in part for part in texts):
        names = [part.partition(":")[0] for part in texts]
        texts = [part.partition(":")[2] for part in texts]
        if not set(AXES) <= set(names) or len(set(names)) != len(names):
            raise fail(f"a named mesh has each of the axes {', '.join(AXES)} once (sp and further axes may be added)")
    elif len(texts) != len(AXES):
        raise fail(f"give {len(AXES)} sizes, for {', '.join(AXES)}; or named ones, such as dp:1,fsdp:-1,mp:1")
    if not all(re.fullmatch(r"-1|[1-9]\d*", size) for size in texts):
        raise fail("each size is a positive integer, or -1 for all remaining devices")
    sizes = [int(size) for size in texts]
    if sizes.count(-1) > 1:
        raise fail("only one size may be -1")
    known = math.prod(size for size in sizes if size != -1)
    if -1 not in sizes and known != num_devices:
        raise fail(f"is for {known} devices, but this run has {num_devices}; a size of -1 takes all that remain")
    if num_devices % known:
        raise fail(f"does not divide the {num_devices} devices of this run")
    if -1 in sizes:
        sizes[sizes.index(-1)] = num_devices // known
    return {**dict(zip(names, sizes, strict=True)), **({} if "sp" in names else {"sp": 1})}


def make_mesh(mesh_dim: str, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of `--mesh_dim` over all devices or the given ones.

    If an axis of a TPU's network has to be split over two mesh axes, these share its bandwidth. This is logged, unless
    `mesh_dim` has a leading `!`.

    Raises:
      UserError: see `parse_mesh_dim`, `_slices_along`.
    """
    devices = devices or jax.devices()
    shape = parse_mesh_dim(mesh_dim, len(devices))
    # Auto: the compiler propagates shardings. Explicit, JAX's default, requires one at every gather.
    return Mesh(_device_array(mesh_dim, shape, devices), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def _device_array(mesh_dim: str, shape: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """Returns the devices in the shape of the mesh. Neighbours in the mesh are near each other in the network."""
    sizes, slices = tuple(shape.values()), {getattr(device, "slice_index", 0) for device in devices}
    if devices[0].platform == "tpu" and len(slices) > 1:
        outer = _slices_along(mesh_dim, shape, len(slices))
        inner = tuple(size // ways for size, ways in zip(sizes, outer, strict=True))
        create = partial(mesh_utils.create_hybrid_device_mesh, inner, outer, devices)
    else:
        create = partial(mesh_utils.create_device_mesh, sizes, devices)
    try:
        return create()
    except NotImplementedError:
        if not mesh_dim.startswith("!"):
            logging.info("--mesh_dim=%s: a physical axis of the network is split over two mesh axes", mesh_dim)
        return create(allow_split_physical_axes=True)


def _slices_along(mesh_dim: str, shape: Mapping[str, int], num_slices: int) -> tuple[int, ...]:
    """Returns into how many slices each mesh axis is split.

    Slices communicate over a slow network. The first axes are split, and never mp and sp, which communicate the most.

    Raises:
      UserError: if the other axes cannot be split over the slices.
    """
    ways, left = [], num_slices
    for axis, size in shape.items():
        ways.append(1 if axis in HEAD_AXES else math.gcd(size, left))
        left //= ways[-1]
    if left > 1:
        of_slice = math.prod(shape.values()) // num_slices
        mp = math.gcd(shape["mp"], of_slice)
        sp = math.gcd(shape["sp"], of_slice // mp)
        example = f"{num_slices},-1,{mp}" if sp == 1 else f"dp:{num_slices},fsdp:-1,mp:{mp},sp:{sp}"
        raise UserError(
            f"--mesh_dim={mesh_dim}: mp and sp cannot span the {num_slices} slices, so dp x fsdp must be a multiple of "
            f"{num_slices}, for example --mesh_dim={example}"
        )
    return tuple(ways)


def group_mesh(mesh: Mesh) -> Mesh:
    """Returns the mesh of a function that `jax.vmap` maps over the groups of devices along dp.

    GROUP_AXIS takes the place of dp, and is the `spmd_axis_name` of the map. The function splits arrays over the axes
    of one group, where dp has the size 1. The order of the devices is the same.
    """
    at = mesh.axis_names.index("dp")
    names = (*mesh.axis_names[:at], GROUP_AXIS, *mesh.axis_names[at:])
    return Mesh(np.expand_dims(mesh.devices, at + 1), names, axis_types=(AxisType.Auto,) * len(names))


def axis_size(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """Returns the number of parts into which one or more mesh axes split an array axis; 1 for None."""
    if axes is None:
        return 1
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows are split over dp and fsdp.

    The devices along sp have the same rows. The model splits their tokens. On the `group_mesh`, this is the same split.
    """
    return NamedSharding(mesh, P((GROUP_AXIS, *BATCH_AXES) if GROUP_AXIS in mesh.shape else BATCH_AXES))


def check_batch_size(name: str, batch_size: int, mesh: Mesh) -> None:
    """Checks that the mesh divides a global batch.

    Raises:
      UserError: with `name`, the value and the rule.
    """
    ways = axis_size(mesh, BATCH_AXES)
    if batch_size < 1 or batch_size % ways:
        raise UserError(f"{name}={batch_size}: must be a positive multiple of {ways}, the mesh's dp x fsdp")


def check_whole_sequences(mesh: Mesh) -> None:
    """Checks that the mesh has no axis sp, for programs that do not split sequences.

    Raises:
      UserError: naming the flag.
    """
    if mesh.shape["sp"] > 1:
        raise UserError(
            f"--mesh_dim: sp={mesh.shape['sp']} is for llama_train and llama_plan; use dp, fsdp and mp here"
        )
