"""The memory of the mesh's devices."""

from jax.sharding import Mesh

from EasyLM.parallel.coordination import from_all_processes


def device_memory(mesh: Mesh) -> int | None:
    """Returns the bytes that JAX may use on a device: the least of all processes, so that it is equal on all of them.

    On a GPU it is the share `XLA_PYTHON_CLIENT_MEM_FRACTION` of the memory. None if the devices have no limit: CPUs.
    All processes must call it.
    """
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    own = min((values["bytes_limit"] for values in stats if "bytes_limit" in values), default=None)
    limits = [limit for limit in from_all_processes(own) if limit is not None]
    return min(limits, default=None)
