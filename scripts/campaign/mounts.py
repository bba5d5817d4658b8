"""File systems of limited size, for the kinds of full disks."""

import contextlib
import functools
import os
import pathlib
import resource
import subprocess
import tempfile
from collections.abc import Callable, Iterator

ALLOWED = "CAMPAIGN_MOUNTS"  # set in a process that may mount
_AMPLE = 64 << 20
_PAGE = 4096


@functools.cache
def namespace() -> tuple[str, ...]:
    """Returns the command that starts another one where it may mount file systems; empty if that is not allowed."""
    command = ("unshare", "--user", "--map-root-user", "--mount")
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(OSError):
        mount = [*command, "mount", "-t", "tmpfs", "-o", "size=64k", "campaign", folder]
        if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
            return command
    return ()


def description() -> str:
    """Returns how disks are filled on this machine."""
    return "a tmpfs of limited size" if namespace() else "RLIMIT_FSIZE, because mounts are not allowed here"


@contextlib.contextmanager
def limited_disk(folder: pathlib.Path, size: int) -> Iterator[Callable[[], object]]:
    """Limits what can be written to a folder to `size` bytes. Yields a function that lifts the limit.

    Without mounts, each file that this process and its children write has at most that size. Their logs are dropped.
    """
    if ALLOWED in os.environ:
        options = f"size={max(1, size // _PAGE) * _PAGE}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "campaign", folder], check=True)
        try:
            yield lambda: subprocess.run(["mount", "-o", f"remount,size={_AMPLE}", folder], check=True)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)
        return
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.close(log)
        os.close(null)
