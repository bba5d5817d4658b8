"""Matrix products of activations and kernels that are split over a mesh; on large TPU slices with gathers in two steps.

Over the three dimensions of a large torus, XLA implements a gather as a sum of arrays that are zero outside of a
device's own part, which sends each array twice. Here devices gather along one dimension, then along the other two;
gradients are scattered in the reverse order. In all other cases (GPUs, two dimensions, small slices) XLA gathers by
itself.
Source: programs that libtpu 0.0.42 compiled for v5p slices of 8 to 128 chips and v5e slices of 16 and 64.

A kernel may be float32 beside activations of another type. It is converted before devices gather it. Its gradient is
float32 before devices sum it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from EasyLM.models.tuning import flat_matmul
from EasyLM.parallel import BATCH_AXES, GROUP_AXIS, SHARD_AXES, axis_size, constrain

Groups = list[list[int]]  # the places along fsdp of the devices that gather from each other
_LEAST_DEVICES = 64  # from which on XLA gathers by sums


def gathered_matmul(x_BTI: jax.Array, kernel_IO: jax.Array, mesh: Mesh | None, axes: tuple[str, str]) -> jax.Array:
    """Returns `x_BTI @ kernel_IO`, with gathers in two steps where fsdp fills the three dimensions of a large torus.

    Args:
      mesh: its axes dp and fsdp split B, and sp splits T. None: not split.
      axes: the mesh axes that split I and O: fsdp and mp, or mp and fsdp. The part of a device along fsdp is split
        further over sp.
    """
    if mesh is not None and mesh.devices.flat[0].platform == "tpu" and _divides(x_BTI, kernel_IO, mesh, axes):
        steps = gather_steps(_along_fsdp(mesh))
        if steps:
            return matmul_of_devices(x_BTI, kernel_IO, mesh, axes, steps)
    if mesh is not None and GROUP_AXIS in mesh.shape:
        return _matmul_of_group(x_BTI, kernel_IO, mesh, axes)
    return split_matmul(x_BTI, kernel_IO, mesh)


def _matmul_of_group(x_BTI: jax.Array, kernel_IO: jax.Array, mesh: Mesh, axes: tuple[str, str]) -> jax.Array:
    """Returns `x_BTI @ kernel_IO` in a function that is mapped over groups of devices (see `group_mesh`).

    The gradient of the kernel then has an axis of groups. XLA for TPUs scatters such sums along the last axis only;
    along another one each device receives all sums. So the kernel is transposed if fsdp splits its first axis. The
    gradient has the same constraint.
    """
    rows, columns = map(_kernel_axes, axes)
    if axes[1] == "fsdp":
        return split_matmul(x_BTI, constrain(kernel_IO, mesh, rows, columns), mesh)
    kernel_OI = constrain(kernel_IO.T, mesh, columns, rows)
    if kernel_OI.dtype != x_BTI.dtype:
        return split_matmul(x_BTI, kernel_OI.T, mesh)
    return jnp.einsum("BTI,OI->BTO", x_BTI, kernel_OI)


def split_matmul(x_BTI: jax.Array, kernel_IO: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Returns `x_BTI @ kernel_IO`. XLA chooses the communication.

    B and T are merged only if sp does not split T. Otherwise, the tokens of a device are not consecutive in a merged
    axis.
    """
    if kernel_IO.dtype != x_BTI.dtype:
        return _wide_matmul(lambda kernel_IO: kernel_IO)(x_BTI, kernel_IO)
    if mesh is None or mesh.shape["sp"] == 1:
        return flat_matmul(x_BTI, kernel_IO)
    return jnp.einsum("BTI,IO->BTO", x_BTI, kernel_IO)


def matmul_of_devices(
    x_BTI: jax.Array, kernel_IO: jax.Array, mesh: Mesh, axes: tuple[str, str], steps: Sequence[Groups]
) -> jax.Array:
    """Returns `x_BTI @ kernel_IO`, computed by each device with the gathered kernel.

    Args:
      steps: the groups of each gather along fsdp, see `gather_steps`.
    """
    rows, columns = axes

    def gather(kernel_IO):
        if mesh.shape["sp"] > 1:
            kernel_IO = jax.lax.all_gather(kernel_IO, "sp", axis=axes.index("fsdp"), tiled=True)
        for groups in steps:
            # The gradient of a gather is a scatter of sums.
            kernel_IO = jax.lax.all_gather(
                kernel_IO, "fsdp", axis=axes.index("fsdp"), tiled=True, axis_index_groups=groups
            )
        return kernel_IO

    def of_device(x_BTI, kernel_IO):
        if kernel_IO.dtype == x_BTI.dtype:
            y_BTO = flat_matmul(x_BTI, gather(kernel_IO))
        else:
            y_BTO = _wide_matmul(gather)(x_BTI, kernel_IO)
        return jax.lax.psum(y_BTO, "mp") if rows == "mp" else y_BTO

    inputs, outputs = ("mp" if axis == "mp" else None for axis in (rows, columns))
    return jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(P(BATCH_AXES, "sp", inputs), P(*map(_kernel_axes, axes))),
        out_specs=P(BATCH_AXES, "sp", outputs),
        check_vma=False,  # gathers of groups do not say how their results vary over the mesh
    )(x_BTI, kernel_IO)


def _wide_matmul(gather: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns the product with a float32 kernel, which is converted to the type of the activations and then gathered.

    Args:
      gather: a linear function. Its transpose sums the kernel's gradient, in float32.
    """

    @jax.custom_vjp
    def product(x_BTI, kernel_IO):
        return forward(x_BTI, kernel_IO)[0]

    def forward(x_BTI, kernel_IO):
        assert kernel_IO.dtype == jnp.float32
        narrow_IO = kernel_IO.astype(x_BTI.dtype)
        return jnp.einsum("BTI,IO->BTO", x_BTI, gather(narrow_IO)), (x_BTI, narrow_IO)

    def backward(residuals, dy_BTO):
        x_BTI, narrow_IO = residuals
        dkernel_IO = jnp.einsum("BTI,BTO->IO", x_BTI, dy_BTO, preferred_element_type=jnp.float32)
        scatter = jax.linear_transpose(gather, jax.ShapeDtypeStruct(narrow_IO.shape, jnp.float32))
        return jnp.einsum("BTO,IO->BTI", dy_BTO, gather(narrow_IO)), *scatter(dkernel_IO)

    product.defvjp(forward, backward)
    return product


def _divides(x_BTI, kernel_IO, mesh, axes):
    """Whether the mesh divides all arrays."""
    split = *map(_kernel_axes, axes), BATCH_AXES, "sp"
    sizes = *kernel_IO.shape, *x_BTI.shape[:2]
    return all(size % axis_size(mesh, axis) == 0 for size, axis in zip(sizes, split, strict=True))


def _kernel_axes(axis: str) -> str | tuple[str, ...]:
    """Returns all mesh axes that split an axis of a kernel."""
    return SHARD_AXES if axis == "fsdp" else axis


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
