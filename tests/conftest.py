"""One place that sets the devices: 8 virtual ones on the CPU, and no silent rank promotion."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["WANDB_MODE"] = "disabled"

import pathlib

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def golden() -> pathlib.Path:
    """The reference data that the LVM release made (tests/golden/README.md)."""
    return pathlib.Path(__file__).parent / "golden"
