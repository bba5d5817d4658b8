"""The recipes of scripts/ run, at a small size."""

import json
import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("form", ["cpu", "gpu"])
def test_the_model_of_mappings_is_trained_and_exported(tmp_path, form):
    """On the CPU, each form, with its own number of devices."""
    sizes = {"SENTENCES": "16", "STEPS": "3", "BATCH": "2", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    sizes["LOOKUP"] = "--dtype=fp32 --seeds=0 --tokens_per_step=1024 --level_seconds=1"
    command = ["bash", "scripts/make_demo_model.sh", form, str(tmp_path)]
    completed = subprocess.run(
        command, cwd=ROOT, env=os.environ | sizes, capture_output=True, text=True, timeout=900, check=False
    )
    assert completed.returncode == 0, completed.stderr
    assert ("parameters after 0 of 10 levels" in completed.stdout) == (form == "gpu")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["hidden_size"] == 320
    rows = [json.loads(line) for line in (tmp_path / "all" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2


@pytest.mark.parametrize("script", ["make_demo_model.sh", "make_tokenizer.sh"])
def test_a_recipe_names_its_forms(script):
    completed = subprocess.run(
        ["bash", f"scripts/{script}", "tpu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert completed.returncode == 2
    assert f"scripts/{script} cpu|gpu" in completed.stderr
