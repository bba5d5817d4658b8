"""What a program needs is printed before the weights are read; what does not fit is refused with the remedies."""

import importlib
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import pytest
from evaluation_programs import PROGRAMS, write_inputs

from EasyLM import flags
from EasyLM.errors import UserError
from EasyLM.models.llama import inference_model, llama_config
from EasyLM.models.llama.inference_memory import Batch, inference_memory
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.parallel import make_mesh, memory, shardings
from evaluation.prompting import GenerationSettings, LargestBatch, checkpoint, load_model
from evaluation.prompting.prompter import compute_dtype

DEMO = str(pathlib.Path(__file__).parents[3] / "evaluation" / "demo_model")
PRESET = llama_config.PRESETS["vqlm_7b"]


def mesh_of(mesh_dim="1,1,1", devices=1):
    return make_mesh(mesh_dim, jax.devices()[:devices])


def needed(mesh, batch, int8=False):
    shapes = inference_model.parameter_shapes(PRESET, jnp.bfloat16, int8)
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings(mesh, PARTITION_RULES, shapes),
    )
    return inference_memory(PRESET, params, jnp.bfloat16, mesh, batch)


def test_memory_of_the_7b_model():
    batch = Batch(1, 15 * 256, candidates=4, new_tokens=256)
    bf16, int8 = (needed(mesh_of(), batch, int8) for int8 in (False, True))
    assert bf16.weights == pytest.approx(13.15e9, rel=0.01)  # 6.54 billion parameters; the embedding in float32
    assert int8.weights == pytest.approx(bf16.weights / 2, rel=0.02)
    token = 2 * 32 * 4096 * 2  # keys and values of 32 layers
    assert bf16.caches == int8.caches == token * (15 * 256 + 4 * 256)
    scored = needed(mesh_of(), Batch(1, 15 * 256, candidates=0))
    assert scored.caches == 0 and scored.weights == bf16.weights


def test_a_mesh_splits_the_memory():
    batch = Batch(8, 256, candidates=1, new_tokens=256)
    one, heads, rows = needed(mesh_of(), batch), needed(mesh_of("1,1,4", 4), batch), needed(mesh_of("4,1,1", 4), batch)
    assert heads.weights == pytest.approx(one.weights / 4, rel=0.01) and heads.caches == one.caches / 4
    assert rows.weights == one.weights and rows.caches == one.caches / 4
    gathered = needed(mesh_of("1,4,1", 4), batch)
    assert gathered.weights == pytest.approx(one.weights * 5 / 4, rel=0.01), "for decoding, fsdp is gathered"


@pytest.mark.parametrize(
    ("largest", "batch"),
    [
        (LargestBatch(), Batch(1, 15 * 64, 1, 64)),
        (LargestBatch(3, 7, GenerationSettings(2, 4)), Batch(3, 7 * 64, 4, 2 * 64)),
        (LargestBatch(3, 7, GenerationSettings(2, 4), on_each_device=True), Batch(6, 7 * 64, 4, 2 * 64)),
        (LargestBatch(3, 7, GenerationSettings(2, 4, context_images=8)), Batch(12, 7 * 64, 1, 64)),
        (LargestBatch(3, 9, None), Batch(3, 9 * 64, 0)),
    ],
)
def test_the_largest_batch_in_tokens(largest, batch):
    """Where the window moves, each candidate becomes its own prompt."""
    assert largest.in_tokens(max_images=16, tokens_per_image=64, devices=2) == batch


def test_what_does_not_fit_is_refused_before_the_weights_are_read(monkeypatch, capsys):
    monkeypatch.setattr(memory, "host_memory", lambda: 2 * 10**4)  # the two devices share it
    monkeypatch.setattr(checkpoint.checkpoints, "load_entries", lambda *arguments: pytest.fail("weights are read"))
    message = (
        r"--checkpoint=\S+: needs \S+ GB on each device \(weights \S+, caches \S+, computation \S+\), "
        r"but a CPU's share of this machine is 1e-05 GB: try --weights=int8, "
        r"fewer candidates, a smaller batch, shorter prompts, more devices along"
    )
    with pytest.raises(UserError, match=message):
        load_model(DEMO, "", mesh_of("2,1,1", 2), batch=Batch(2, 64, candidates=4))
    assert capsys.readouterr().err.startswith(f"{DEMO}: needs ")


def test_on_a_gpu_the_remedies_include_a_larger_share_of_its_memory(monkeypatch):
    monkeypatch.setattr(checkpoint, "usable_memory", lambda mesh: 10**9)
    batch, gpu = Batch(1, 64), types.SimpleNamespace(platform="gpu")
    gpu_mesh = types.SimpleNamespace(devices=types.SimpleNamespace(flat=[gpu]))
    with pytest.raises(UserError, match=r"but JAX may use 1 GB: try --weights=int8, .*, XLA_CLIENT_MEM_FRACTION=0\.95"):
        checkpoint._check_memory("model", needed(mesh_of(), batch), batch, gpu_mesh, False)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_prints_what_it_needs_and_refuses_what_does_not_fit(
    inputs, tmp_path, monkeypatch, capsys, program
):
    monkeypatch.setattr(checkpoint, "usable_memory", lambda mesh: 10**4)
    monkeypatch.setattr(checkpoint.checkpoints, "load_entries", lambda *arguments: pytest.fail("weights are read"))
    module = importlib.import_module(program)
    arguments = PROGRAMS[program].format(inputs, tmp_path).split()
    config = flags.parse(module.FLAGS, [program, f"--checkpoint={DEMO}", *arguments])
    with pytest.raises(UserError, match=r"^--checkpoint=\S+: needs .* is 1e-05 GB: try --weights=int8, "):
        module.main(config)
    assert re.search(
        rf"^{DEMO}: needs .*; a CPU's share of this machine is 1e-05 GB$", capsys.readouterr().err, re.MULTILINE
    )


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", jnp.float32), ("gpu", jnp.bfloat16), ("tpu", jnp.bfloat16)])
def test_auto_is_bf16_on_accelerators(platform, dtype):
    devices = types.SimpleNamespace(devices=types.SimpleNamespace(flat=[types.SimpleNamespace(platform=platform)]))
    assert compute_dtype("auto", devices) == dtype
    assert compute_dtype("bf16", devices) == jnp.bfloat16 and compute_dtype("fp32", devices) == jnp.float32
