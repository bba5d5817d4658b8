"""scripts/gpu_day.sh: it runs on a CPU, failed jobs do not lose the others, and shares follow from the limits."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from gpu_day import main, table
from gpu_day.candidates import CANDIDATES
from gpu_day.main import Job, Report

from EasyLM.errors import UserError
from EasyLM.models.llama import costs, llama_config

ROOT = pathlib.Path(__file__).parent.parent
COPY, MATMUL = 3e12, 700e12
MACHINE = [
    {"section": "machine", "name": "device", "kind": "NVIDIA H100 80GB HBM3"},
    {"section": "machine", "name": "copy", "bytes_per_second": COPY},
    {"section": "machine", "name": "matmul, bfloat16", "flops_per_second": MATMUL},
]


def train_record(preset: str, tokens_per_second: float) -> dict:
    model = llama_config.PRESETS[preset]
    return {
        "section": "train",
        "name": preset,
        "preset": preset,
        "parameters": costs.num_parameters(model),
        "tokens_per_second": tokens_per_second,
        "tokens_per_step": table.H200_TOKENS,
        "flops_per_second": tokens_per_second * costs.flops_per_token(model, table.LENGTH),
    }


@pytest.mark.slow
def test_the_tiny_run_passes_all_checks(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable}
    environment.pop("XLA_FLAGS", None)
    command = ["bash", str(ROOT / "scripts/gpu_day.sh"), "--tiny", f"--output_json={tmp_path}/gpu.json"]
    completed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-3000:]
    records = json.loads((tmp_path / "gpu.json").read_text())["records"]
    assert not [record for record in records if "error" in record]
    sections = {record["section"] for record in records}
    assert sections == {"machine", "correctness", "train", "kernels", "decode", "vqgan"}
    assert all(record["ok"] for record in records if record["section"] == "correctness")
    train, lora = (record for record in records if record["section"] == "train")
    rate = next(record["flops_per_second"] for record in records if record["name"] == "matmul, bfloat16")
    assert train["share_of_matmul"] == pytest.approx(train["flops_per_second"] / rate)
    assert 0 < lora["parameters"] < train["parameters"] / 10
    assert "vqlm_debug, 2 rows: " in completed.stdout


def test_the_roofline_of_an_h200_is_its_own():
    record = train_record("vqlm_1b", 60e3)
    assert table.roofline(record, table.H200_BYTES_PER_SECOND) == pytest.approx(76.8e3)
    slower = table.roofline(record, table.H200_BYTES_PER_SECOND / 2)
    more_tokens = table.roofline(record | {"tokens_per_step": 2 * table.H200_TOKENS}, table.H200_BYTES_PER_SECOND / 2)
    assert slower < more_tokens == pytest.approx(76.8e3)


def test_shares_follow_from_the_limits_of_the_machine():
    decode = {"section": "decode", "preset": "vqlm_1b", "rows": 1, "prompt": 16, "step_seconds": 1e-3}
    ours = decode | {"name": "ours", "variant": "", "step_bytes": COPY * 5e-4, "prompt_seconds": 0.1}
    peer = decode | {"name": "peer", "variant": "peer", "step_seconds": 4e-3, "prompt_seconds": 0.2}
    train, *decoded = table.with_shares([*MACHINE, train_record("vqlm_1b", 50e3), ours, peer])[3:]
    assert train["share_of_matmul"] == pytest.approx(train["flops_per_second"] / MATMUL)
    assert train["mfu"] == pytest.approx(train["flops_per_second"] / 989e12)
    assert decoded[0]["share_of_memory_limit"] == pytest.approx(0.5) and "step_ratio_to_ours" not in decoded[0]
    assert decoded[1]["step_ratio_to_ours"] == pytest.approx(4) and decoded[1]["prompt_ratio_to_ours"] == 2
    text = table.text([*MACHINE, ours, {"section": "train", "name": "big", "error": "too little memory"}])
    assert "50.0% of the memory limit" in text and "big: too little memory" in text


@pytest.mark.slow
def test_a_job_that_crashes_or_hangs_is_a_record(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'scripts'}")
    report = Report(f"{tmp_path}/gpu.json")
    main.run_job(Job("main", 60), 60, report)  # without its required flag
    main.run_job(Job("machine", 60, ("--tiny",)), 0.1, report)
    crashed, stopped = json.loads((tmp_path / "gpu.json").read_text())["records"]
    assert crashed["error"] == "exit code 2" and crashed["ok"] is False
    assert stopped["error"] == "stopped after 0 s" and "ok" not in stopped


def test_jobs_are_chosen_by_their_section_and_preset():
    jobs = main.chosen(main.JOBS, "peer:vqlm_1b,train:vqlm_7b,machine")
    assert [job.name for job in jobs] == [
        "machine",
        "train --preset=vqlm_7b --only=num_hidden_layers",
        "peer --preset=vqlm_1b --rounds=2",
        "train --preset=vqlm_7b --only=LoRA",
    ]
    assert main.chosen(main.JOBS, "") == main.JOBS
    with pytest.raises(UserError, match="--jobs='train:vqlm_2b': choose one of"):
        main.chosen(main.JOBS, "train:vqlm_2b")


@pytest.mark.parametrize("preset", CANDIDATES)
def test_candidates_are_settings_of_their_preset(preset):
    for candidate in CANDIDATES[preset]:
        changed = llama_config.updated(llama_config.PRESETS[preset], repr(dict(candidate.settings)))
        assert costs.num_parameters(changed) <= costs.num_parameters(llama_config.PRESETS[preset])


def test_the_benchmarks_have_the_measured_rates_of_training():
    records = json.loads((ROOT / "scripts/gpu_day/results/h100_unrolled.json").read_text())["records"]
    rates = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    benchmarks = (ROOT / "BENCHMARKS.md").read_text()
    assert len(rates) == 8 and [rate for rate in rates if f"{rate:,.0f}" not in benchmarks] == []
