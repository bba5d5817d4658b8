"""The compiler options of a platform."""

import types

import jax
import numpy as np
import pytest

from EasyLM.parallel import compiler_options, make_mesh


def mesh_of(platform: str, devices: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)] * devices))


def test_options_depend_on_the_devices_of_the_mesh():
    assert compiler_options(make_mesh("1,-1,1")) == compiler_options(mesh_of("tpu", 8)) == {}
    one, several = (set(compiler_options(mesh_of("gpu", count))) for count in (1, 8))
    assert several - one == {"xla_gpu_enable_latency_hiding_scheduler"}


def test_xla_knows_the_options():
    options = compiler_options(mesh_of("gpu", 8))
    jax.jit(lambda x: x + 1, compiler_options=options)(1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_unknown"):
        jax.jit(lambda x: x + 1, compiler_options=options | {"xla_gpu_unknown": True})(1)
