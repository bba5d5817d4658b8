"""One place that sets the devices: 8 virtual ones on the CPU, and no silent rank promotion."""

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
    """The reference data that the LVM release made (tests/golden/README.md)."""
    return pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def port():
    """A port on which a process may listen that sets SO_REUSEADDR, as servers do; it is given to nobody else."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
