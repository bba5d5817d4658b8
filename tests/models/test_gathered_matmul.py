"""Products with kernels that devices gather: values, gradients, communication, and the order of the gathers."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from llama_kit import changed

from EasyLM.models.llama import gathered_matmul as module
from EasyLM.models.llama import layers, llama_model
from EasyLM.models.llama.gathered_matmul import gather_steps, gathered_matmul, matmul_of_devices
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.parallel import BATCH_AXES, batch_sharding, make_mesh, shardings
from EasyLM.planning.collectives import communication
from EasyLM.planning.hlo import executed_instructions

ROWS, LENGTH, INPUTS, OUTPUTS = 8, 3, 16, 32
NEAR, FAR = [[0, 1], [2, 3], [4, 5], [6, 7]], [[0, 2, 4, 6], [1, 3, 5, 7]]


def torus(*sizes: int) -> list:
    return [types.SimpleNamespace(coords=place) for place in np.ndindex(*sizes)]


@pytest.mark.parametrize("mesh_dim, steps, axes", [
    ("1,8,1", [NEAR, FAR], ("mp", "fsdp")),
    pytest.param("1,8,1", [NEAR, FAR], ("fsdp", "mp"), marks=pytest.mark.slow),
    pytest.param("2,2,2", [[[0, 1]]], ("fsdp", "mp"), marks=pytest.mark.slow),
    pytest.param("2,2,2", [[[0, 1]]], ("mp", "fsdp"), marks=pytest.mark.slow),
])  # fmt: skip
def test_values_gradients_and_communication(mesh_dim, steps, axes):
    mesh, rng = make_mesh(mesh_dim), np.random.default_rng(0)
    shapes = (ROWS, LENGTH, INPUTS), (INPUTS, OUTPUTS), (ROWS, LENGTH, OUTPUTS)
    x, w, dy = (rng.standard_normal(shape, np.float32) for shape in shapes)
    places = [NamedSharding(mesh, spec) for spec in (P(BATCH_AXES), P(*axes), P(BATCH_AXES))]

    def values(x, w, dy):
        y, pull = jax.vjp(partial(matmul_of_devices, mesh=mesh, axes=axes, steps=steps), x, w)
        return y, *pull(dy)

    compiled = jax.jit(values, in_shardings=places, out_shardings=(places[0], *places[:2])).lower(x, w, dy).compile()
    y, dx, dw = compiled(*map(jax.device_put, (x, w, dy), places))
    np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx, dy @ w.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dw, np.einsum("BTI,BTO->IO", x, dy), rtol=1e-4, atol=1e-4)
    sent = communication(executed_instructions(compiled.as_text()), [0] * 8).total
    if mesh.shape["mp"] == 1:
        kernel = 4 * INPUTS * OUTPUTS  # bytes; a quarter of them in the first step
        assert sent["all-gather"] == sent["reduce-scatter"] == 1.25 * kernel
        assert sent["all-reduce"] == sent["all-to-all"] == sent["collective-permute"] == 0


@pytest.mark.parametrize("mesh_dim, steps", [("", []), ("1,8,1", [NEAR, FAR]), ("dp:2,fsdp:2,mp:1,sp:2", [[[0, 1]]])])
def test_gradients_of_wide_kernels_are_summed_in_float32(mesh_dim, steps):
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((ROWS, 4, size)), jnp.bfloat16) for size in (INPUTS, OUTPUTS))
    w = rng.standard_normal((INPUTS, OUTPUTS), np.float32)
    if mesh_dim:
        matmul = partial(matmul_of_devices, mesh=make_mesh(mesh_dim), axes=("fsdp", "mp"), steps=steps)
    else:
        matmul = partial(gathered_matmul, mesh=None, axes=("fsdp", "mp"))

    @jax.jit
    def values(x, w, dy):
        y, pull = jax.vjp(matmul, x, w)
        return y, *pull(dy)

    y, dx, dw = values(x, w, dy)
    narrow, narrow_dx, narrow_dw = values(x, w.astype(jnp.bfloat16), dy)
    np.testing.assert_array_equal(y, narrow)
    np.testing.assert_array_equal(dx, narrow_dx)
    exact = np.einsum("BTI,BTO->IO", *(np.float32(array) for array in (x, dy)))
    np.testing.assert_allclose(dw, exact, rtol=1e-5, atol=1e-5)
    assert np.abs(np.float32(narrow_dw) - exact).max() > 1e-2


@pytest.mark.slow
def test_a_model_of_gathered_kernels_learns_the_same(monkeypatch):
    config = changed(remat_block="attention_up_value_saveable", num_key_value_heads=2)
    mesh, rng = make_mesh("1,2,2", jax.devices()[:4]), np.random.default_rng(0)
    params = jax.jit(partial(llama_model.init_params, config))(jax.random.key(0))
    tokens = rng.integers(0, config.vocab_size, (2, 2, 16)).astype(np.int32)
    batch = {"input_tokens": tokens[0], "target_tokens": tokens[1], "loss_masks": np.ones((2, 16), np.float32)}

    def loss_and_gradients(mesh, params, batch):
        loss_fn = llama_model.make_loss_fn(config, jnp.float32, mesh)
        return jax.jit(jax.value_and_grad(lambda *x: loss_fn(*x, None)[0]))(params, batch)

    expected = loss_and_gradients(None, params, batch)
    products = []

    def gathered(x_BTI, kernel_IO, mesh, axes):
        products.append(axes)
        return matmul_of_devices(x_BTI, kernel_IO, mesh, axes, [[[0, 1]]])

    monkeypatch.setattr(layers, "gathered_matmul", gathered)
    placed = jax.device_put(params, shardings(mesh, PARTITION_RULES, params))
    split = loss_and_gradients(mesh, placed, jax.device_put(batch, batch_sharding(mesh)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), split, expected)
    assert products.count(("mp", "fsdp")) == 2 and products.count(("fsdp", "mp")) == 5, "of each block"


def test_devices_of_three_dimensions_gather_in_two_steps():
    near, far = gather_steps(torus(4, 4, 4))
    assert len(near) == 16 and near[1] == [4, 5, 6, 7]
    assert len(far) == 4 and far[1] == [*range(1, 64, 4)]
    for small_or_flat in (torus(8, 16, 1), torus(2, 1, 64), torus(128), torus(2, 4, 4), torus(2, 2, 2)):
        assert gather_steps(small_or_flat) == []
    near, far = gather_steps(torus(8, 8, 8))
    assert len(near[0]) == 8 and len(far[0]) == 64
    rng = np.random.default_rng(0)
    assert gather_steps([torus(4, 4, 4)[place] for place in rng.permutation(64)]) == [], "no neighbours"


def test_only_large_slices_gather_and_only_what_the_mesh_divides(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "matmul_of_devices", lambda x, w, *_: calls.append(w.shape) or x @ w)
    devices = np.array(torus(4, 4, 4))

    def product(platform="tpu", rows=64, inputs=64, fsdp=64):
        for device in devices:
            device.platform = platform
        shape = {"dp": 64 // fsdp, "fsdp": fsdp, "mp": 1, "sp": 1}
        mesh = types.SimpleNamespace(devices=devices.reshape(*shape.values()), shape=shape, axis_names=(*shape,))
        gathered_matmul(jnp.ones((rows, 1, inputs)), jnp.ones((inputs, 4)), mesh, ("fsdp", "mp"))

    for others in ({"platform": "gpu"}, {"rows": 32}, {"inputs": 96}, {"fsdp": 16}):
        product(**others)
    assert not calls
    product()
    assert calls == [(64, 4)]
    gathered_matmul(jnp.ones((64, 1, 64)), jnp.ones((64, 4)), None, ("fsdp", "mp"))
    assert len(calls) == 1
