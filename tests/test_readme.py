"""The training command of the README, which is that of the LVM release, runs as written."""

import json
import os
import pathlib
import re
import subprocess

import pytest
from tiny_run import GOLDEN

README = pathlib.Path(__file__).parent.parent / "README.md"
# Placeholders of the README's command, and sizes that are reduced to save time.
SUBSTITUTIONS = {
    "/path/to/dataset.jsonl": str(GOLDEN / "dataset.jsonl"),
    "--total_steps=400000": "--total_steps=8",
    "--log_freq=10": "--log_freq=1",
    "vqlm_7b": "vqlm_debug",
    "seq_length=4096": "seq_length=64",
    "tokenizer_processes=16": "tokenizer_processes=2",
}


def training_command() -> str:
    block = next(b for b in re.findall(r"```\n(.*?)```", README.read_text(), re.DOTALL) if "python -u -m" in b)
    assert len(re.findall("--", block)) == 29, "users rely on the command: add or remove no flags"
    return block


@pytest.mark.slow
def test_the_command_runs_as_written(tmp_path, port):
    command = training_command()
    for placeholder, value in SUBSTITUTIONS.items():
        assert placeholder in command
        command = command.replace(placeholder, value)
    command = command.replace("/path/to/", f"{tmp_path}/")
    slurm = {"JOB_ID": 1, "STEP_NODELIST": "localhost", "NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NNODES": 1}
    environment = os.environ | {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RUN_NAME": "first", "EXPERIMENT_ID": "one"}
    completed = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    run = tmp_path / "checkpoint" / "first" / "one"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(8))
    # The second update of 4 micro-steps. Optax's warm-up subtracts in float32: 6e-8 of the peak is 5e-4 of this rate.
    assert rows[-1]["learning_rate"] == pytest.approx(1.5e-4 / 8000, rel=1e-3)
    assert {path.name for path in run.iterdir()} >= {"streaming_train_state", "dataset.json", "metadata.json"}
