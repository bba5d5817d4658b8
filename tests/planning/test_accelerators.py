"""Plans for TPUs and GPUs that are not here, where the compilers can be imported."""

import importlib.util
import json
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM import flags
from EasyLM.models import losses
from EasyLM.models.attention import AttentionMask, attention
from EasyLM.models.llama import llama_model, llama_plan
from EasyLM.models.llama.gathered_matmul import gathered_matmul
from EasyLM.parallel import BATCH_AXES, GROUP_AXIS, group_mesh, make_mesh
from EasyLM.planning.collectives import communication
from EasyLM.planning.hlo import executed_instructions
from EasyLM.planning.topologies import make_topology

needs_tpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (extra `tpu`)")
needs_gpu = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax_cuda13_plugin (extra `gpu`)"
)
pytestmark = pytest.mark.usefixtures("without_the_cache")
FLAGS = ["--load_llama_config=vqlm_debug", "--dtype=bf16", "--train_dataset.json_dataset.seq_length=512"]


def plan(tmp_path, *arguments: str) -> dict:
    assert jax.devices("cpu")
    file = tmp_path / "plan.json"
    config = flags.parse(llama_plan.FLAGS, ["llama_plan", *FLAGS, f"--output_json={file}", *arguments])
    llama_plan.main(config)
    return json.loads(file.read_text())


@needs_tpu
@pytest.mark.slow
@pytest.mark.parametrize("arguments, devices, processes, kind, memory", [
    (["v5e:4x4"], 16, 4, "TPU v5 lite", 16.9e9),
    (["v5e:2x4", "--num_slices=2", "--train_dataset.json_dataset.batch_size=16"], 16, 2, "TPU v5 lite", 16.9e9),
    (["v5p:2x2x2"], 8, 2, "TPU v5", 102.8e9),
])  # fmt: skip
def test_tpus(tmp_path, arguments, devices, processes, kind, memory):
    rows = ["--train_dataset.json_dataset.batch_size=16"]
    made = plan(tmp_path, f"--topology={arguments[0]}", *rows, *arguments[1:], "--mesh_dim=2,-1,1")
    assert made["error"] is None and made["fits"]
    assert (made["devices"], made["processes"], made["device_kind"]) == (devices, processes, kind)
    assert made["hbm_bytes_per_device"] == memory
    assert made["mesh"] == {"dp": 2, "fsdp": devices // 2, "mp": 1, "sp": 1}
    assert made["collective_bytes"]["all-gather"] > 0
    assert made["attention_weights"] == "" and {"splash" in name for name in made["attention_kernels"]} == {True}
    across = sum(made["network_bytes"].values())
    assert (across > 0) == (made["num_slices"] > 1), "dp is split over the slices"


@needs_tpu
@pytest.mark.slow
@pytest.mark.parametrize("topology, kind", [("v5e:1x1", "TPU v5 lite"), ("v6e:1x1", "TPU v6 lite")])
def test_a_single_chip(tmp_path, topology, kind):
    made = plan(tmp_path, f"--topology={topology}")
    assert made["error"] is None and made["fits"]
    assert (made["devices"], made["processes"], made["device_kind"]) == (1, 1, kind)
    assert made["mesh"] == {"dp": 1, "fsdp": 1, "mp": 1, "sp": 1}
    assert sum(made["collective_bytes"].values()) == 0
    assert made["attention_weights"] == "" and {"splash" in name for name in made["attention_kernels"]} == {True}


@needs_tpu
@pytest.mark.slow
@pytest.mark.parametrize("text, slices, chips, hosts", [
    ("v5e:1x1", 1, 1, 1),
    ("v6e:1x1", 2, 2, 2),
    ("v6e:2x2", 1, 4, 1),
    ("v5e:2x4", 1, 8, 1),
    ("v6e:2x4", 2, 16, 2),
    ("v6e:4x4", 1, 16, 4),
    ("v4:2x2x1", 1, 4, 1),
    ("v5p:2x2x4", 1, 16, 4),
])  # fmt: skip
def test_hosts_of_a_slice(text, slices, chips, hosts):
    topology = make_topology(text, slices)
    assert (len(topology.devices), topology.num_processes) == (chips, hosts)
    assert len({topology.island_of(device) for device in topology.devices}) == slices


@pytest.mark.slow
@pytest.mark.parametrize("topology, kernel", [
    pytest.param("v5e:2x2", "splash", marks=needs_tpu),
    pytest.param("h100:4", "fmha", marks=needs_gpu),
])  # fmt: skip
def test_rows_that_are_split(tmp_path, topology, kernel):
    made = plan(tmp_path, f"--topology={topology}", "--mesh_dim=dp:1,fsdp:2,mp:1,sp:2")
    assert made["error"] is None and made["attention_weights"] == ""
    assert {kernel in name for name in made["attention_kernels"]} == {True}
    # Of each of 2 layers, 4 arrays forward and their gradients, and the 4 arrays again: 8 x 512 x 128 values of bf16.
    assert made["collective_bytes"]["all-to-all"] == 2 * 12 * 8 * 512 // 4 * 128 * 2


@pytest.mark.slow
@pytest.mark.parametrize("topology, head", [
    pytest.param("v5e:2x2", 128, marks=needs_tpu),  # padded
    pytest.param("h100:4", 32, marks=needs_gpu),
])  # fmt: skip
def test_offloaded_projections_are_in_the_memory_of_the_host(tmp_path, topology, head):
    policy = "--llama.remat_block=projections_offloadable"
    made = plan(tmp_path, f"--topology={topology}", "--train_dataset.json_dataset.batch_size=64", policy)
    # Of each of 2 layers, in bf16: queries, keys and values of 4 heads, the output, gate and up.
    values = 2 * (64 * 512 // 4) * (3 * 4 * head + 128 + 2 * 256)
    assert made["offloaded_bytes_per_device"] == pytest.approx(2 * values, rel=0.01)
    assert made["error"] is None


@needs_tpu
@pytest.mark.slow
@pytest.mark.parametrize("text", ["v4:4x4x12", "v5p:16x20x28"])
def test_slices_of_other_multiples_of_four_exist(text):
    assert len(make_topology(text).devices) == math.prod(map(int, text.partition(":")[2].split("x")))


@needs_tpu
@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 96, 100, 128])
def test_attention_on_tpus_holds_no_matrix(head_dim):
    """With padding and documents, forward and backward. Rows are split over fsdp and heads over mp."""
    mesh, length = make_mesh("1,2,2", list(make_topology("v5e:2x2").devices)), 1024
    split = NamedSharding(mesh, P("fsdp", None, "mp"))
    q = jax.ShapeDtypeStruct((2, length, 2, head_dim), jnp.bfloat16, sharding=split)
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=NamedSharding(mesh, P("fsdp")))

    def gradients(q, k, v, valid, first):
        attend = partial(attention, mask=AttentionMask(valid, first_BT=first), platform="tpu", mesh=mesh)
        return jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))(q, k, v)

    traced = jax.jit(gradients).trace(q, q, q, tokens, tokens)
    text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    assert {"splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"} <= set(re.findall(r"splash_mha_(?:fwd|dq|dkv)", text))
    assert "1024,1024" not in text


@needs_tpu
@pytest.mark.slow
def test_gradients_of_a_head_with_8292_outputs_compile_for_tpus():
    """In bf16, of logits in chunks. The kernel has a copy for each part of dp, and is split over fsdp."""
    mesh = make_mesh("2,4,1", list(make_topology("v5p:2x2x2").devices))
    rows = NamedSharding(mesh, P(("dp", "fsdp")))
    hidden = jax.ShapeDtypeStruct((8, 32, 1024), jnp.bfloat16, sharding=rows)
    head = jax.ShapeDtypeStruct((1024, 8292), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp", "mp")))
    targets = jax.ShapeDtypeStruct((8, 32), jnp.int32, sharding=rows)

    def loss(head, hidden, targets):
        logits = partial(llama_model.logits, mesh=mesh)
        return losses.chunked_cross_entropy_and_accuracy(logits, hidden, head, targets, None, chunk=16)[0]

    traced = jax.jit(jax.grad(loss), out_shardings=head.sharding).trace(head, hidden, targets)
    text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    assert "bf16[256,8292]" in text, "a device's part of the gradient"
    assert "8320" not in text, "a TPU pads arrays in its memory"


@needs_tpu
@pytest.mark.slow
@pytest.mark.parametrize("axes", [("fsdp", "mp"), ("mp", "fsdp")])
def test_groups_of_devices_scatter_gradients_that_do_not_fill_tiles(axes):
    """A device has 160 of 640 rows or columns, and TPUs tiles of 128."""
    groups, size = group_mesh(make_mesh("2,4,1", list(make_topology("v5p:2x2x2").devices))), 640
    rows = NamedSharding(groups, P(GROUP_AXIS, BATCH_AXES))
    x = jax.ShapeDtypeStruct((2, 4, 128, size), jnp.bfloat16, sharding=rows)
    kernel = jax.ShapeDtypeStruct((size, size), jnp.bfloat16, sharding=NamedSharding(groups, P(*axes)))

    def gradients(kernel, x, dy):
        def of_group(x, dy):
            return jax.vjp(partial(gathered_matmul, mesh=groups, axes=axes), x, kernel)[1](dy)[1]

        return jax.vmap(of_group, spmd_axis_name=GROUP_AXIS)(x, dy)

    traced = jax.jit(gradients, out_shardings=NamedSharding(groups, P(GROUP_AXIS, *axes))).trace(kernel, x, x)
    text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    sent = communication(executed_instructions(text), [0] * 8).total
    assert sent["reduce-scatter"] == 2 * size * size and sent["all-reduce"] == 0


@needs_gpu
@pytest.mark.slow
@pytest.mark.parametrize("topology, processes", [("h100:8", 1), ("h100:2x4", 2)])
def test_gpus(tmp_path, monkeypatch, topology, processes):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.8")
    made = plan(tmp_path, f"--topology={topology}", "--mesh_dim=2,-1,1")
    assert made["error"] is None and made["fits"]
    assert (made["devices"], made["processes"], made["hbm_bytes_per_device"]) == (8, processes, 68e9)
    layers = 2
    forward, backward = made["attention_kernels"].values()
    assert forward == backward == layers and made["attention_weights"] == ""
    assert (sum(made["network_bytes"].values()) > 0) == (processes > 1)


@needs_gpu
@pytest.mark.slow
def test_heads_that_the_mesh_does_not_divide_have_cudnn_attention(tmp_path):
    """Each device along mp has all 4 heads."""
    made = plan(tmp_path, "--topology=h100:8", "--mesh_dim=1,1,8")
    assert made["error"] is None and made["attention_weights"] == ""
    assert {"fmha" in name for name in made["attention_kernels"]} == {True}
