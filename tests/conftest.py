"""The configuration of JAX for all tests: 8 virtual CPU devices, and no implicit rank promotion.

All tests, and the processes that they start, share a cache of compiled functions: many train the same tiny model again.
"""

import gc
import os
import signal
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["WANDB_MODE"] = "disabled"
if "PYTEST_XDIST_WORKER" not in os.environ:  # the processes of pytest-xdist have the folder of the first one
    folder = tempfile.TemporaryDirectory(prefix="compiled_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

# Shells start background commands with SIGINT ignored, and processes inherit that. The tests of Ctrl-C send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pathlib
import socket

import jax
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Keeps garbage collections away from what the modules of the tests hold: it lives as long as the session."""
    gc.disable()
    result = yield
    gc.freeze()
    gc.enable()
    return result


@pytest.fixture(autouse=True)
def separate_readers(monkeypatch):
    """Gives each reader of a memory:// file its own position, as on an object store. In fsspec they share one."""
    open_shared = MemoryFileSystem._open

    def open_file(self, path, mode="rb", **options):
        file = open_shared(self, path, mode, **options)
        return MemoryFile(self, file.path, file.getvalue()) if mode == "rb" else file

    monkeypatch.setattr(MemoryFileSystem, "_open", open_file)


@pytest.fixture
def without_the_cache(monkeypatch):
    """For tests of the compilation: it takes its time. The test may set a cache of its own."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")  # of processes that the test starts
    _use_cache(None)
    yield
    _use_cache(os.environ["JAX_COMPILATION_CACHE_DIR"])


def _use_cache(directory: str | None) -> None:
    compilation_cache.set_cache_dir(directory)
    compilation_cache.reset_cache()  # JAX reads the setting once


@pytest.fixture
def golden() -> pathlib.Path:
    """The directory of reference data, which the LVM release wrote (tests/golden/README.md)."""
    return pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def port():
    """A reserved port. Only processes that set SO_REUSEADDR, as servers do, can listen on it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
