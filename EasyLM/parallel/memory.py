"""The memory of the mesh's devices, and of this machine."""

import collections
import os
import socket

from jax.sharding import Mesh

from EasyLM.parallel.coordination import from_all_processes

# The limit of a container's control group: version 2, version 1.
_GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def device_memory(mesh: Mesh) -> int | None:
    """Returns the bytes that JAX may use on a device: the least of all processes, so that it is equal on all of them.

    On a GPU it is the share `XLA_PYTHON_CLIENT_MEM_FRACTION` of the memory. None if JAX knows no limit: CPUs, and GPUs
    with another allocator. All processes must call it.
    """
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    own = min((values["bytes_limit"] for values in stats if "bytes_limit" in values), default=None)
    limits = [limit for limit in from_all_processes(own) if limit is not None]
    return min(limits, default=None)


def step_memory(mesh: Mesh) -> int | None:
    """Returns the bytes of a device that a train step can be planned with, equal on all processes.

    That is `device_memory`. CPU devices have equal shares of the memory of their machine. None if it is unknown. All
    processes must call it.
    """
    limit = device_memory(mesh)
    if limit is not None or mesh.devices.flat[0].platform != "cpu":
        return limit
    reports = from_all_processes([socket.gethostname(), host_memory(), len(mesh.local_devices)])
    devices: collections.Counter[str] = collections.Counter()
    for host, _, count in reports:  # processes on one machine share its memory
        devices[host] += count
    return min(memory // devices[host] for host, memory, _ in reports)


def host_memory() -> int:
    """Returns the bytes of this machine's memory, or of the container, if it has less."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in _GROUP_LIMITS:
        try:
            with open(path) as file:
                text = file.read().strip()
        except OSError:
            continue
        memory = min(memory, int(text)) if text.isdigit() else memory  # "max": no limit
    return memory
