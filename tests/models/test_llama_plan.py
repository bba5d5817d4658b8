"""The planner: plans of virtual CPU devices, and errors of one line."""

import json
import os
import subprocess
import sys
import time

import jax
import pytest

from EasyLM import flags
from EasyLM.data import dataset
from EasyLM.errors import UserError
from EasyLM.models.llama import costs, llama_config, llama_plan, training_task
from EasyLM.parallel import make_mesh
from EasyLM.planning.collectives import OPERATIONS
from EasyLM.planning.plan import Plan
from EasyLM.training import abstract_batch, abstract_state, make_optimizer, trace_step

FIELDS = {
    "topology",
    "devices",
    "mesh",
    "preset",
    "batch_size",
    "seq_length",
    "compile_seconds",
    "peak_bytes_per_device",
    "hbm_bytes_per_device",
    "fits",
    "state_bytes_per_device",
    "matmul_flops_ratio",
    "attention_kernels",
    "collective_bytes",
    "host_bytes_per_process",
    "checkpoint_bytes",
    "save_seconds_estimate",
    "error",
}
pytestmark = pytest.mark.usefixtures("without_the_cache")
SMALL = ["--load_llama_config=vqlm_debug", "--train_dataset.json_dataset.seq_length=256"]


@pytest.fixture(autouse=True)
def jax_has_started():
    """The first plan of a process starts JAX with the devices of its topology. Other tests need 8."""
    assert jax.device_count() == 8


def plan(tmp_path, capsys, *arguments: str) -> tuple[dict, int, str]:
    """Returns the plan as JSON, the exit code, and the output."""
    file = tmp_path / "plan.json"
    config = flags.parse(llama_plan.FLAGS, ["llama_plan", *SMALL, f"--output_json={file}", *arguments])
    code = llama_plan.main(config)
    output = capsys.readouterr()
    return json.loads(file.read_text()), code, output.out + output.err


def test_a_missing_checkpoint_does_not_stand_for_a_7b_model(tmp_path, capsys):
    spec = f"params::{tmp_path}/none"
    made, code, _ = plan(tmp_path, capsys, "--topology=cpu:8", "--load_llama_config=", f"--load_checkpoint={spec}")
    assert code == 1 and made["error"] == f"--load_checkpoint={spec}: there is no {tmp_path}/none"


@pytest.mark.slow
def test_a_plan_of_virtual_devices(tmp_path, capsys):
    made, code, text = plan(tmp_path, capsys, "--topology=cpu:8", "--checkpointer.save_optimizer_state=True")
    assert code == 0 and made["error"] is None and made["fits"] is True
    assert set(made) >= FIELDS
    assert made["mesh"] == {"dp": 1, "fsdp": 8, "mp": 1, "sp": 1} and made["devices"] == 8
    model = llama_config.PRESETS["vqlm_debug"]
    state = 12 * costs.num_parameters(model)  # float32: parameters and two moments
    norms = 12 * (2 * model.num_hidden_layers + 1) * model.hidden_size
    vocabulary = 12 * 2 * model.vocab_size * model.hidden_size  # 8292 rows or columns
    assert vocabulary / 8 < made["state_bytes_per_device"] - norms < state / 8 + 64
    assert state <= made["checkpoint_bytes"] == made["host_bytes_per_process"] < state + 64
    assert made["peak_bytes_per_device"] > made["state_bytes_per_device"]
    # Of 2 x 2 chunks of 128 tokens 3 are computed, the model counts half of the 256 x 256 scores. There are 2 products
    # of them forward and 5 backward. The preset recomputes nothing else.
    attention = 6 * model.num_hidden_layers * 256 * model.hidden_size  # FLOPs of the model per token
    extra = attention * (3 / 4 * 7 / 6 * 2 - 1)
    assert made["matmul_flops_ratio"] == pytest.approx(1 + extra / costs.flops_per_token(model, 256))
    assert set(made["collective_bytes"]) == set(OPERATIONS)
    head = model.vocab_size * model.hidden_size
    blocks = costs.num_matmul_parameters(model) - head
    gathered = 4 * (head + 2 * blocks)  # the blocks' parameters forward and backward
    assert made["collective_bytes"]["all-gather"] == pytest.approx(gathered, rel=0.01)
    assert made["attention_weights"] == ""
    assert "vqlm_debug on cpu:8" in text and "mesh dp=1 fsdp=8 mp=1" in text


@pytest.mark.slow
@pytest.mark.parametrize("mesh_dim", ["2,-1,1", "2,2,2"])
def test_embeddings_are_not_gathered_along_dp(tmp_path, capfd, mesh_dim):
    """The compiler warns where it has to gather an array on every device to split it another way."""
    small = ["--llama.num_hidden_layers=1", "--llama.remat_block=", "--llama.attention_implementation=xla"]
    rows = "--train_dataset.json_dataset.batch_size=16"
    made, code, text = plan(tmp_path, capfd, "--topology=cpu:8", *small, rows, f"--mesh_dim={mesh_dim}")
    assert code == 0 and made["mesh"]["dp"] == 2
    assert "Involuntary full rematerialization" not in text


@pytest.mark.slow
@pytest.mark.parametrize("hbm_gb, remedy", [
    (0.003, "a device; try a smaller --train_dataset.json_dataset.batch_size, --llama.remat_block=nothing_saveable"),
    (0.001, "but JAX may use 0.001 GB: try more devices along fsdp in --mesh_dim"),  # whatever the batch
])  # fmt: skip
def test_a_step_that_does_not_fit_names_what_to_change(tmp_path, capsys, hbm_gb, remedy):
    small = ["--llama.num_hidden_layers=1", "--llama.remat_block=", "--llama.attention_implementation=xla"]
    memory = f"--hbm_gb={hbm_gb}"
    made, code, text = plan(tmp_path, capsys, "--topology=cpu:2", *small, memory, "--llama.vocab_size=64")
    assert code == 1 and made["fits"] is False and made["peak_bytes_per_device"] > hbm_gb * 1e9
    assert set(made) >= FIELDS
    assert made["attention_weights"] == "float32[8,4,256,256]"
    assert made["error"].endswith(remedy)
    assert f"error         {made['error']}" in text and "mesh dp=1 fsdp=2 mp=1" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--topology=v9:4"], "--topology=v9:4: must be KIND:SIZES, for example v4:2x2x1"),
        (["--topology=v5e:8"], "--topology=v5e:8: no such topology; the nearest slice is v5e:2x4"),
        (["--topology=v5e:4x4x4"], "--topology=v5e:4x4x4: no such topology; the nearest slice is v5e:8x8"),
        (["--topology=v4:4x4"], "--topology=v4:4x4: no such topology; the nearest slice is v4:2x2x4"),
        (["--topology=v5e:2x8"], "--topology=v5e:2x8: no such topology; the nearest slice is v5e:4x4"),
        (["--topology=v5e:1x2"], "--topology=v5e:1x2: no such topology; the nearest slice is v5e:2x2"),
        (["--topology=v4:1x1x1"], "--topology=v4:1x1x1: no such topology; the nearest slice is v4:2x2x1"),
        (["--topology=v5p:3x3x3"], "--topology=v5p:3x3x3: no such topology; the nearest slice is v5p:2x4x4"),
        (["--topology=v5p:0x4x4"], "--topology=v5p:0x4x4: must be KIND:SIZES"),
        (["--topology=cpu:100000"], "--topology=cpu:100000: must be cpu:N, with N devices, at most 1024"),
        (["--topology=v6e:16x17"], "--topology=v6e:16x17: no such topology; the nearest slice is v6e:16x16"),
        (["--topology=h100:20"], "--topology=h100:20: a node has at most 8 GPUs; give h100:3x8"),
        (["--topology=cpu:2x4"], "--topology=cpu:2x4: must be cpu:N"),
        (["--topology=cpu:16"], "--topology=cpu:16: JAX has already started, with 8 CPU devices"),
        (["--topology=cpu:8", "--num_slices=2"], "--num_slices=2: only TPUs have slices"),
        (["--topology=cpu:8", "--mesh_dim=3,-1,1"], "--mesh_dim=3,-1,1: does not divide the 8 devices"),
        (["--topology=cpu:8", "--dtype=fp16"], "--dtype=fp16: small gradients underflow"),
        (
            ["--topology=cpu:8", "--train_dataset.json_dataset.batch_size=12"],
            "--train_dataset.json_dataset.batch_size=12: must be a positive multiple of 8",
        ),
    ],
)
def test_a_plan_that_cannot_be_made_is_one_line(tmp_path, capsys, arguments, message):
    made, code, text = plan(tmp_path, capsys, *arguments)
    assert code == 1 and message in made["error"] and made["fits"] is None
    assert text.startswith(f"error: vqlm_debug on {made['topology']}")
    assert text.endswith(f": {made['error']}\n") and text.count("\n") == 1


def test_an_output_that_cannot_be_written_is_refused_before_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_plan, "_plan", lambda *_: pytest.fail("the step was compiled"))
    (tmp_path / "file").touch()
    flag = f"--output_json={tmp_path}/file/plan.json"
    with pytest.raises(UserError, match=f"^{flag}: cannot be written"):
        llama_plan.main(flags.parse(llama_plan.FLAGS, ["llama_plan", *SMALL, "--topology=cpu:8", flag]))


@pytest.mark.parametrize("topology, package, extra", [("v5p:2x2x2", "libtpu", "tpu"), ("h100:8", "jax_cuda", "gpu")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, capsys, monkeypatch, topology, package, extra):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    made, code, _ = plan(tmp_path, capsys, f"--topology={topology}")
    assert code == 1 and f"--topology={topology} needs the package {package}" in made["error"]
    assert made["error"].endswith(f"pip install -e '.[{extra}]'")


def test_the_planned_batch_is_that_of_a_dataset():
    config = flags.defaults(dataset.DATASET_FLAGS)
    arrays = dataset.no_batch(config)
    assert {name: (array.shape, array.dtype.str) for name, array in arrays.items()} == {
        "input_tokens": ((0, 1024), "<i4"),
        "target_tokens": ((0, 1024), "<i4"),
        "loss_masks": ((0, 1024), "<f4"),
    }
    config.type, config.huggingface_dataset.batch_token_dtype = "huggingface", "u2"
    assert dataset.no_batch(config)["input_tokens"].dtype.str == "<u2"


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_step_of_30b_is_traced_and_lowered_in_20_seconds(scan_layers):
    arguments = ["--load_llama_config=vqlm_30b", "--dtype=bf16", f"--llama.scan_layers={scan_layers}"]
    arguments += ["--topology=cpu:8", "--train_dataset.json_dataset.seq_length=4096"]
    config = flags.parse(llama_plan.FLAGS, ["llama_plan", *arguments])
    begin = time.process_time()
    mesh, optimizer = make_mesh(config.mesh_dim), make_optimizer(config.optimizer)
    model = training_task.make_model(training_task.read_model(config), config.dtype, mesh)
    state = abstract_state(model, optimizer, mesh)
    batch = abstract_batch(dataset.no_batch(config.train_dataset), 8, mesh)
    text = trace_step(model, optimizer, 0, mesh, state, batch).lower().as_text()
    assert time.process_time() - begin < 20
    assert "6656x17920" in text


@pytest.mark.slow
def test_suggest_finds_the_fastest_that_fits(tmp_path, capsys):
    arguments = ["--topology=cpu:8", "--suggest=True", "--hbm_gb=0.05"]
    made, code, text = plan(tmp_path, capsys, *arguments)
    assert code == 0 and made["peak_bytes_per_device"] <= 0.05e9
    speeds = [tried["tokens_per_second_estimate"] for tried in made["tried"] if tried["fits"]]
    assert made["tokens_per_second_estimate"] == max(speeds) and len(speeds) > 2
    assert not all(tried["fits"] for tried in made["tried"]) and "does not fit" in made["reason"]
    again, code, _ = plan(tmp_path, capsys, "--topology=cpu:8", "--hbm_gb=0.05", *made["flags"])
    assert code == 0 and again["tokens_per_second_estimate"] == made["tokens_per_second_estimate"]
    assert f"flags         {' '.join(made['flags'])}" in text


def test_suggest_splits_rows_that_fit_no_device(tmp_path, capsys, monkeypatch):
    """Over the fewest devices that suffice, here 4."""

    def planned(blank, config, llama, topology):
        fits = make_mesh(config.mesh_dim, list(topology.devices)).shape["sp"] >= 4
        error = None if fits else "does not fit"
        return blank.with_values(fits=fits, tokens_per_second_estimate=1.0 if fits else None, error=error)

    monkeypatch.setattr(llama_plan, "_plan", planned)
    long = ["--topology=cpu:8", "--suggest=True", "--llama.num_attention_heads=8"]
    made, code, _ = plan(tmp_path, capsys, *long)
    assert code == 0 and made["flags"][0] == "--mesh_dim=dp:1,fsdp:2,mp:1,sp:4"
    meshes = list(dict.fromkeys(tried["mesh_dim"] for tried in made["tried"]))
    assert meshes == ["1,8,1", "1,4,2", "dp:1,fsdp:4,mp:1,sp:2", "dp:1,fsdp:2,mp:1,sp:4"]
    made, code, _ = plan(tmp_path, capsys, *long, "--train_dataset.json_dataset.seq_length=6")
    assert code == 1 and made["flags"] == []
    assert [tried["mesh_dim"] for tried in made["tried"]][-1] == "dp:1,fsdp:4,mp:1,sp:2", "4 does not divide 6 tokens"


def test_one_row_a_device_that_does_not_fit_can_be_split():
    config = flags.defaults(llama_plan.FLAGS)
    llama = llama_config.PRESETS["vqlm_debug"]  # 4 heads
    one_row = Plan("cpu:8", 1, "", 8, 256).with_values(mesh={"dp": 1, "fsdp": 8, "mp": 1, "sp": 1})
    split = "half the batch with --mesh_dim=dp:1,fsdp:4,mp:1,sp:2, which splits each row over 2 devices"
    assert llama_plan._remedy(config, llama, one_row).startswith(f"try {split}, ")
    for several in (
        one_row.with_values(batch_size=16),
        one_row.with_values(seq_length=255),
        one_row.with_values(batch_size=2, mesh={"dp": 1, "fsdp": 2, "mp": 1, "sp": 4}),
    ):
        assert "splits" not in llama_plan._remedy(config, llama, several)


@pytest.mark.slow
def test_the_command_needs_no_devices_and_no_setting_of_the_environment(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "-m", "EasyLM.models.llama.llama_plan", "--topology=cpu:4", "--mesh_dim=2,-1,1", *SMALL]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    assert "4 x cpu in 1 process, mesh dp=2 fsdp=2 mp=1" in completed.stdout
