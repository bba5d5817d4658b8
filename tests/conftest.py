"""The configuration of JAX for all tests: 8 virtual CPU devices, and no implicit rank promotion."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["WANDB_MODE"] = "disabled"

import pathlib
import socket

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


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
