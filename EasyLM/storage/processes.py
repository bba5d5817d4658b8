"""Which process wrote a file: its identity, and whether it still exists."""

import contextlib
import functools
import hashlib
import os
import socket


def process_start(process: int) -> str | None:
    """Returns the start time of a process in the kernel's units; None if the system does not provide it.

    A zombie, which has ended but whose parent has not read its exit code, has the start time "ended".
    """
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8") as file:
            state, *fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if state in "ZX" else fields[18]


def process_namespace() -> str:
    """Returns a name of the set of processes that this one can see: host, boot and container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
        parts.append(file.read().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def is_alive(process: int, start: str | None) -> bool:
    """Whether a process of this namespace exists. Its start time distinguishes it from a later one of the same id."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return process_start(process) == start


def owner_tag() -> str:
    """Returns a text for file names that identifies this process: namespace, id and start."""
    return f"{_namespace_digest()}-{os.getpid()}-{process_start(os.getpid()) or 0}"


def is_gone(tag: str) -> bool:
    """Whether the process of an `owner_tag` is known to have ended. False for those of other hosts and containers."""
    return _is_alive_here(tag) is False


def is_running(tag: str) -> bool:
    """Whether the process of an `owner_tag` is known to exist. False for those of other hosts and containers."""
    return _is_alive_here(tag) is True


def _is_alive_here(tag: str) -> bool | None:
    """Returns None if the process is not of this namespace, or the text is no tag."""
    namespace, _, rest = tag.partition("-")
    process, _, start = rest.partition("-")
    if namespace != _namespace_digest() or not process.isdecimal():
        return None
    return is_alive(int(process), start if start != "0" else None)


@functools.cache
def _namespace_digest() -> str:
    return hashlib.blake2b(process_namespace().encode(), digest_size=4).hexdigest()
