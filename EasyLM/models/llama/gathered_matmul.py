"""Matrix products with a kernel that is split over fsdp, on large TPU slices: devices gather it in two steps.

Over the three dimensions of a large torus, XLA gathers by summing arrays that are zero outside of a device's own part,
which sends an array twice. Here devices gather along one dimension, then along the other two; gradients are scattered
in the reverse order. Everywhere else XLA gathers by itself: on GPUs, over two dimensions, and in small slices.
Source: programs that libtpu 0.0.42 compiled for v5p slices of 8 to 128 chips and v5e slices of 16 and 64.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from EasyLM.models.tuning import flat_matmul
from EasyLM.parallel import BATCH_AXES, axis_size

Groups = list[list[int]]  # the places along fsdp of the devices that gather from each other
_LEAST_DEVICES = 64  # from which on XLA gathers by sums


def gathered_matmul(x_BTI: jax.Array, kernel_IO: jax.Array, mesh: Mesh | None, axes: tuple[str, str]) -> jax.Array:
    """Returns `x_BTI @ kernel_IO`, with gathers in two steps where fsdp fills the three dimensions of a large torus.

    Args:
      mesh: its axes dp and fsdp split B. None: not split.
      axes: the mesh axes that split I and O: fsdp and mp, or mp and fsdp.
    """
    if mesh is None or mesh.devices.flat[0].platform != "tpu" or not _divides(x_BTI, kernel_IO, mesh, axes):
        return flat_matmul(x_BTI, kernel_IO)
    steps = gather_steps(_along_fsdp(mesh))
    return matmul_of_devices(x_BTI, kernel_IO, mesh, axes, steps) if steps else flat_matmul(x_BTI, kernel_IO)


def matmul_of_devices(
    x_BTI: jax.Array, kernel_IO: jax.Array, mesh: Mesh, axes: tuple[str, str], steps: Sequence[Groups]
) -> jax.Array:
    """Returns `x_BTI @ kernel_IO`, computed by each device with the gathered kernel.

    Args:
      steps: the groups of each gather, see `gather_steps`.
    """
    rows, columns = axes

    def of_device(x_BTI, kernel_IO):
        for groups in steps:
            # The gradient of a gather is a scatter of sums.
            kernel_IO = jax.lax.all_gather(
                kernel_IO, "fsdp", axis=axes.index("fsdp"), tiled=True, axis_index_groups=groups
            )
        y_BTO = flat_matmul(x_BTI, kernel_IO)
        return jax.lax.psum(y_BTO, "mp") if rows == "mp" else y_BTO

    inputs, outputs = ("mp" if axis == "mp" else None for axis in (rows, columns))
    return jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(P(BATCH_AXES, None, inputs), P(*axes)),
        out_specs=P(BATCH_AXES, None, outputs),
        check_vma=False,  # gathers of groups do not say how their results vary over the mesh
    )(x_BTI, kernel_IO)


def _divides(x_BTI, kernel_IO, mesh, axes):
    """Whether the mesh divides all arrays."""
    sizes = *kernel_IO.shape, x_BTI.shape[0]
    return all(size % axis_size(mesh, axis) == 0 for size, axis in zip(sizes, (*axes, BATCH_AXES), strict=True))


def _along_fsdp(mesh: Mesh) -> list[Any]:
    """Returns the devices along fsdp that are the first ones along the other axes."""
    order = np.moveaxis(mesh.devices, mesh.axis_names.index("fsdp"), 0)
    return list(order.reshape(len(order), -1)[:, 0])


def gather_steps(devices: Sequence[Any]) -> list[Groups]:
    """Returns the groups in which devices along a mesh axis gather, step by step. Empty: XLA gathers well by itself.

    The first step is along one dimension of the torus, the second one along the others. The first step adds few bytes:
    one part in the number of the second step's devices.

    Args:
      devices: have attributes `coords`, their place in the torus.
    """
    count = len(devices)
    if count < _LEAST_DEVICES:
        return []
    places = np.array([device.coords for device in devices])
    if _dimensions(places) < 3:
        return []
    for near in range(2, count):
        if count % near:
            continue
        grid = np.arange(count).reshape(-1, near)
        if all(_dimensions(places[group]) == 1 for group in grid) and all(
            _dimensions(places[group]) <= 2 for group in grid.T
        ):
            return [grid.tolist(), grid.T.tolist()]
    return []


def _dimensions(places: np.ndarray) -> int:
    """Returns along how many dimensions the places differ."""
    return int((places != places[0]).any(0).sum())
