"""The README's table of cards is that of scripts/card_table.py, and its plans are those of the current model."""

import json
import pathlib

import card_table
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from EasyLM.errors import UserError
from EasyLM.models.llama import costs, inference_model, llama_config
from EasyLM.models.llama.inference_memory import Batch, inference_memory
from EasyLM.parallel import make_mesh
from EasyLM.planning.topologies import make_topology
from tokenizer.vqgan import VQGANConfig

ROOT = pathlib.Path(__file__).parent.parent
PLANS = json.loads((ROOT / "scripts/card_table.json").read_text())
CONFIG = llama_config.PRESETS["vqlm_7b"]


def test_the_readme_has_the_table():
    assert card_table.table(PLANS) in (ROOT / "README.md").read_text()
    keys = {card_table.key_of(*case) for case in card_table.INFERENCE} | {card_table.TOKENIZER}
    assert set(PLANS) == keys | {card_table.training_key(trained, rows) for trained, rows, _ in card_table.TRAINING}
    assert {PLANS[key]["topology"] for key in keys} == {"NVIDIA H100 80GB HBM3"}


def test_a_misspelt_plan_is_refused(tmp_path):
    flags = {"plan": "inference,trainings", "results": str(tmp_path / "plans.json")}
    with pytest.raises(UserError, match="--plan='trainings': choose one of 'inference', 'training'"):
        card_table.main(ConfigDict(flags))
    assert not (tmp_path / "plans.json").exists()


@pytest.mark.parametrize(("weights", "candidates"), card_table.INFERENCE)
def test_the_programs_estimate_what_xla_plans(weights, candidates):
    """A change of the model, or of the estimate, that makes them differ needs a new plan."""
    plan = PLANS[card_table.key_of(weights, candidates)]
    shapes = inference_model.parameter_shapes(CONFIG, jnp.bfloat16, weights == "int8")
    device = jax.devices()[0]
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), shapes
    )
    batch = Batch(1, 15 * 256, candidates, 256)
    need = inference_memory(CONFIG, params, jnp.bfloat16, make_mesh("1,1,1", [device]), batch)
    assert need.weights == plan["weights"]
    assert need.total == pytest.approx(max(plan["prefill"], plan["decode"]), rel=0.05)


def test_the_readme_has_the_measurements_of_adapters():
    records = json.loads((ROOT / "scripts/gpu_day/results/h100.json").read_text())["records"]
    measured = {record["rows"]: record for record in records if "LoRA" in str(record.get("name"))}
    for record in measured.values():
        assert record["peak_bytes"] == pytest.approx(record["planned_bytes"], rel=0.001)
    two_rows, readme = measured[2], " ".join((ROOT / "README.md").read_text().split())
    assert two_rows["name"].endswith("remat_block=nothing_saveable") and len(measured) == 2
    assert "Two steps of LoRA have been, [on an H100](BENCHMARKS.md#gpu): their memory was within 0.1%" in readme
    plan = PLANS[card_table.training_key("LoRA, rank 16", 2)]
    assert plan["peak_bytes_per_device"] == pytest.approx(two_rows["peak_bytes"], rel=0.01)
    peak, rate = two_rows["peak_bytes"] / 1e9, round(two_rows["tokens_per_second"], -2)
    assert (
        f"A step of two rows that recomputes whole blocks was measured: {peak:.1f} GB, {rate:,.0f} tokens/s." in readme
    )


@pytest.mark.parametrize(("trained", "rows"), [case[:2] for case in card_table.TRAINING])
def test_a_plan_of_training_is_of_the_current_model(trained, rows):
    plan, parameters = PLANS[card_table.training_key(trained, rows)], costs.num_parameters(CONFIG)
    assert plan["batch_size"] == rows
    assert plan["device_kind"] == "NVIDIA H100 80GB HBM3" and plan["seq_length"] == 4096
    least = 12 * parameters if trained == "full" else 2 * parameters
    assert least <= plan["state_bytes_per_device"] < 1.1 * least


@pytest.mark.slow
def test_a_small_model_is_planned():
    compiler = card_table.Compiler(make_topology("cpu:1"))
    made = card_table.inference_plan("vqlm_debug", compiler, "int8", 2)
    assert made["weights"] < min(made["prefill"], made["decode"])
    small = VQGANConfig(resolution=32, hidden_channels=32, channel_mult=(1, 1))
    tokenizer = card_table.tokenizer_plan(small, compiler, 2)
    assert tokenizer["weights"] < min(tokenizer["encode"], tokenizer["decode"])
    assert card_table.answer_bytes(made, tokenizer) >= made["weights"] + tokenizer["weights"]
