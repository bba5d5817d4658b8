"""Matrix products of activations and kernels that are split over a mesh; on large TPU slices with gathers in two steps.

Over the three dimensions of a large torus, XLA implements a gather as a sum of arrays that are zero outside of a
device's own part, which sends each array twice. Here devices gather along one dimension, then along the other two;
gradients are scattered in the reverse order. On other meshes (GPUs, two dimensions, small slices) XLA gathers by
itself, except in functions that are mapped over groups of devices.
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
from EasyLM.parallel import BATCH_AXES, GROUP_AXIS, SHARD_AXES, axis_size

_Linear = Callable[[jax.Array], jax.Array]
Groups = list[list[int]]  # the places along fsdp of the devices that gather from each other
_LEAST_DEVICES = 64  # from which on XLA gathers by sums


def gathered_matmul(x_BTI: jax.Array, kernel_IO: jax.Array, mesh: Mesh | None, axes: tuple[str, str]) -> jax.Array:
    """Returns `x_BTI @ kernel_IO`, with gathers in two steps where fsdp fills the three dimensions of a large torus.

    In a function that is mapped over groups of devices (see `group_mesh`), the gradient of the kernel is that of each
    group. XLA by itself would sum it on all devices along fsdp, if the part of a device does not fill TPUs' tiles.

    Args:
      mesh: its axes dp and fsdp split B, and sp splits T. None: not split.
      axes: the mesh axes that split I and O: fsdp and mp, or mp and fsdp. The part of a device along fsdp is split
        further over sp.
    """
    if mesh is not None and _divides(x_BTI, kernel_IO, mesh, axes):
        steps = gather_steps(_along_fsdp(mesh)) if mesh.devices.flat[0].platform == "tpu" else []
        if steps or GROUP_AXIS in mesh.shape:
            return matmul_of_devices(x_BTI, kernel_IO, mesh, axes, steps or [None])
    return split_matmul(x_BTI, kernel_IO, mesh)


def split_matmul(x_BTI: jax.Array, kernel_IO: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Returns `x_BTI @ kernel_IO`. XLA chooses the communication.

    B and T are merged only if sp does not split T. Otherwise, the tokens of a device are not consecutive in a merged
    axis.
    """
    if kernel_IO.dtype != x_BTI.dtype:
        return _wide_matmul("IO", lambda kernel_IO: kernel_IO, lambda sums_IO: sums_IO)(x_BTI, kernel_IO)
    if mesh is None or mesh.shape["sp"] == 1:
        return flat_matmul(x_BTI, kernel_IO)
    return jnp.einsum("BTI,IO->BTO", x_BTI, kernel_IO)


def matmul_of_devices(
    x_BTI: jax.Array, kernel_IO: jax.Array, mesh: Mesh, axes: tuple[str, str], steps: Sequence[Groups | None]
) -> jax.Array:
    """Returns `x_BTI @ kernel_IO`, computed by each device with the gathered kernel.

    Args:
      steps: the groups of each gather along fsdp, see `gather_steps`; None: all devices.
    """
    gather, scatter = _gather_and_scatter(mesh, steps)
    order = "OI" if axes[0] == "fsdp" else "IO"  # the axis that fsdp splits is the last one

    def of_device(x_BTI, kernel_IO):
        kernel = kernel_IO.T if order == "OI" else kernel_IO
        if kernel.dtype != x_BTI.dtype:
            y_BTO = _wide_matmul(order, gather, scatter)(x_BTI, kernel)
        else:
            whole = gather(kernel)
            y_BTO = flat_matmul(x_BTI, whole.T if order == "OI" else whole)
        return jax.lax.psum(y_BTO, "mp") if axes[0] == "mp" else y_BTO

    inputs, outputs = ("mp" if axis == "mp" else None for axis in axes)
    return jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(P(BATCH_AXES, "sp", inputs), P(*map(_kernel_axes, axes))),
        out_specs=P(BATCH_AXES, "sp", outputs),
        check_vma=False,  # gathers of groups do not say how their results vary over the mesh
    )(x_BTI, kernel_IO)


def _gather_and_scatter(mesh: Mesh, steps: Sequence[Groups | None]) -> tuple[_Linear, _Linear]:
    """Returns the function by which devices gather their parts of a matrix along the last axis, and its transpose.

    XLA for TPUs scatters sums along the last axis of a matrix. Along the first one, and in arrays of three axes, it can
    send all sums to each device instead. So where a function is mapped over groups of devices (see `group_mesh`), each
    group scatters a matrix.
    """
    along = [("sp", None)] * (mesh.shape["sp"] > 1) + [("fsdp", groups) for groups in steps]

    @jax.custom_vjp
    def gather(part):
        for name, groups in along:
            part = jax.lax.all_gather(part, name, axis=1, tiled=True, axis_index_groups=groups)
        return part

    @jax.custom_batching.custom_vmap
    def scatter(sums):
        for name, groups in reversed(along):
            sums = jax.lax.psum_scatter(sums, name, scatter_dimension=1, tiled=True, axis_index_groups=groups)
        return sums

    @scatter.def_vmap
    def scatter_of_groups(num_groups, _, sums_G):
        return jnp.stack([scatter(sums_G[group]) for group in range(num_groups)]), True

    gather.defvjp(lambda part: (gather(part), None), lambda _, sums: (scatter(sums),))
    return gather, scatter


def _wide_matmul(order: str, gather: _Linear, scatter: _Linear) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns the product with a float32 kernel, which is converted to the type of the activations and then gathered.

    Args:
      order: IO or OI, the axes of the kernel.
      gather: a linear function.
      scatter: its transpose, which sums the kernel's gradient, in float32.
    """

    @jax.custom_vjp
    def product(x_BTI, kernel):
        return forward(x_BTI, kernel)[0]

    def forward(x_BTI, kernel):
        assert kernel.dtype == jnp.float32
        narrow = kernel.astype(x_BTI.dtype)
        return jnp.einsum(f"BTI,{order}->BTO", x_BTI, gather(narrow)), (x_BTI, narrow)

    def backward(residuals, dy_BTO):
        x_BTI, narrow = residuals
        dkernel = jnp.einsum(f"BTI,BTO->{order}", x_BTI, dy_BTO, preferred_element_type=jnp.float32)
        return jnp.einsum(f"BTO,{order}->BTI", dy_BTO, gather(narrow)), scatter(dkernel)

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
