"""The README's table of plans is that of scripts/plan_table.py, and its plans have the values of the planner."""

import json
import pathlib

import plan_table
import pytest
from ml_collections import ConfigDict

from EasyLM.errors import UserError
from EasyLM.models.llama import costs, llama_config

ROOT = pathlib.Path(__file__).parent.parent
PLANS = json.loads((ROOT / "scripts/plan_table.json").read_text())


def test_the_readme_has_the_table():
    assert plan_table.table(PLANS) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("key", PLANS)
def test_a_plan_is_of_the_current_preset(key):
    """A changed preset makes its plans obsolete."""
    plan = PLANS[key]
    state = 12 * costs.num_parameters(llama_config.PRESETS[plan["preset"]])  # float32: parameters and two moments
    assert state <= plan["checkpoint_bytes"] < state + 64
    assert plan["fits"] and plan["attention_weights"] == ""
    assert key in {plan_table.key_of(preset, topology, flags) for preset, topology, _, flags in plan_table.CASES}


@pytest.mark.parametrize("key", PLANS)
def test_a_plan_sends_little_more_than_two_gathers_and_a_scatter_of_the_parameters(key):
    """In bf16. The all-to-all exchanges activations."""
    sent = PLANS[key]["collective_bytes"]
    kernels = 3 * 2 * costs.num_parameters(llama_config.PRESETS[PLANS[key]["preset"]])
    assert sum(sent.values()) - sent["all-to-all"] < 1.15 * kernels


@pytest.mark.parametrize("flags", [{"kinds": "v5p,h10"}, {"presets": "vqlm_7"}])
def test_misspelt_kinds_and_presets_are_refused(tmp_path, flags):
    ((name, value),) = flags.items()
    config = {"kinds": "", "presets": "", "results": str(tmp_path / "plans.json"), "time_limit": 1.0} | flags
    with pytest.raises(UserError, match=f"^--{name}='{value.split(',')[-1]}': choose one of "):
        plan_table.main(ConfigDict(config))


@pytest.mark.slow
def test_a_case_that_fails_is_a_row(tmp_path):
    made = plan_table.made_plan("vqlm_debug", "cpu:3", 8, ("--mesh_dim=2,-1,1",), 60)
    assert "--mesh_dim=2,-1,1: does not divide the 3 devices" in made["error"]
    preset, topology, rows, flags = plan_table.CASES[0]
    text = plan_table.table({plan_table.key_of(preset, topology, flags): made})
    assert text.splitlines()[2] == f"| {preset} | {topology} |  | {rows} | {made['error']} |  |  |  |"
