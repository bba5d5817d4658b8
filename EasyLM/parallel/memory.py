"""The memory of the mesh's devices, and of this machine."""

import collections
import os
import pathlib
import socket
from collections.abc import Iterator

from jax.sharding import Mesh

from EasyLM.parallel.coordination import from_all_processes

# Of the environment: the share of a GPU's memory that JAX may use, and its older name. JAX refuses to start with both.
SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_OWN_GROUPS = pathlib.Path("/proc/self/cgroup")
_GROUPS = pathlib.Path("/sys/fs/cgroup")


def device_memory(mesh: Mesh) -> int | None:
    """Returns the bytes that JAX may use on a device: the least of all processes, so that it is equal on all of them.

    On a GPU it is the share `XLA_CLIENT_MEM_FRACTION` of the memory. None if JAX knows no limit: CPUs, and GPUs with
    another allocator. All processes must call it.
    """
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    own = min((values["bytes_limit"] for values in stats if "bytes_limit" in values), default=None)
    limits = [limit for limit in from_all_processes(own) if limit is not None]
    return min(limits, default=None)


def more_device_memory() -> str:
    """Returns the advice to let JAX use more of a GPU's memory, with the name of the variable that is set already."""
    name = next((name for name in SHARE_VARIABLES if os.environ.get(name)), SHARE_VARIABLES[0])
    return f"{name}=0.95 in the environment (JAX takes 75% of a GPU by default)"


def usable_memory(mesh: Mesh) -> int | None:
    """Returns the bytes of memory that a program can use on a device, equal on all processes.

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
    """Returns the bytes of this machine's memory, or of this process's container or batch job, if it has less."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in _group_limits():
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        memory = min(memory, int(text)) if text.isdigit() else memory  # "max": no limit
    return memory


def _group_limits() -> Iterator[pathlib.Path]:
    """Yields the files with the limits of this process's control group and of the groups that contain it.

    Some do not exist: inside a container, the paths can be those of the host.
    """
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        lines = []
    for line in ["0::/", "0:memory:/", *lines]:  # ID:CONTROLLERS:PATH; groups of version 2 have no controllers
        _, controllers, path = line.split(":", 2)
        root, name = (_GROUPS / "memory", "memory.limit_in_bytes") if controllers else (_GROUPS, "memory.max")
        group = root / path.lstrip("/")
        if controllers == "" or "memory" in controllers.split(","):
            yield from (folder / name for folder in (group, *group.parents) if folder.is_relative_to(root))
