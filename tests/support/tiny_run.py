"""Small training runs for tests: the model and data of tests/golden/lvm_tiny, through the trainer's own `main`."""

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

from EasyLM import flags
from EasyLM.models.llama import llama_train

SECONDS = 240  # the longest wait for a trainer
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "lvm_tiny"

# The flags of the golden run (tests/golden/README.md).
TINY = {
    "load_llama_config": "vqlm_debug",
    "update_llama_config": "dict(vocab_size=512,hidden_size=64,intermediate_size=128)",
    "mesh_dim": "1,4,2",
    "total_steps": 30,
    "log_freq": 1,
    "optimizer.adamw_optimizer.weight_decay": 0.1,
    "optimizer.adamw_optimizer.lr": 3e-3,
    "optimizer.adamw_optimizer.end_lr": 3e-4,
    "optimizer.adamw_optimizer.lr_warmup_steps": 5,
    "optimizer.adamw_optimizer.lr_decay_steps": 30,
    "train_dataset.text_processor.fields": "{tokens}",
    "train_dataset.json_dataset.path": str(GOLDEN / "dataset.jsonl"),
    "train_dataset.json_dataset.seq_length": 128,
    "train_dataset.json_dataset.batch_size": 4,
    "checkpointer.save_optimizer_state": True,
    "logger.experiment_id": "run",
}


def train(output_dir, **settings) -> pathlib.Path:
    """Runs the trainer in this process and returns the run directory. Settings may use `__` for dots."""
    config = flags.defaults(llama_train.FLAGS)
    config.update_from_flattened_dict({**TINY, "logger.output_dir": str(output_dir)} | dotted(settings))
    flags.validate(llama_train.FLAGS, config)
    llama_train.main(config)
    return pathlib.Path(output_dir) / config.logger.experiment_id


def start(
    output_dir, devices=8, program=("-m", "EasyLM.models.llama.llama_train"), platforms="cpu", **settings
) -> subprocess.Popen:
    """Starts the trainer as a process. `program` has the arguments of Python that start it."""
    values = {**TINY, "logger.output_dir": str(output_dir)} | dotted(settings)
    environment = os.environ | {
        "JAX_PLATFORMS": platforms,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "WANDB_MODE": "disabled",
    }
    command = [sys.executable, *program, *(f"--{k}={v}" for k, v in values.items())]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_two(output_dir, port: int, **settings) -> list[subprocess.Popen]:
    """Starts one run as two processes of two devices each. With a pair of output directories, each has its own."""
    together = {
        "jax_distributed__initialize_jax_distributed": True,
        "jax_distributed__coordinator_address": f"127.0.0.1:{port}",
        "jax_distributed__num_processes": 2,
    }
    directories = output_dir if isinstance(output_dir, tuple) else (output_dir, output_dir)
    return [
        start(directory, devices=2, **settings, **together, jax_distributed__process_id=i)
        for i, directory in enumerate(directories)
    ]


def await_metrics(processes, *paths) -> None:
    """Waits until trainers have logged a step to each of these files."""
    deadline = time.monotonic() + SECONDS
    while not all(path.exists() and path.stat().st_size for path in paths):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.05)


def finish(*processes: subprocess.Popen, code: int = 0) -> str | list[str]:
    """Waits for trainers to exit. Returns the output of one trainer, or a list of the outputs of several."""
    deadline = time.monotonic() + SECONDS
    try:
        outputs = [process.communicate(timeout=max(deadline - time.monotonic(), 0.1))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, outputs, strict=True):
        assert process.returncode == code, text
    return outputs[0] if len(processes) == 1 else outputs


def dotted(settings: dict) -> dict:
    return {name.replace("__", "."): value for name, value in settings.items()}


def metrics(run_dir, *names) -> dict[int, tuple]:
    """Returns the named metrics by step. If a step is repeated, its last line counts."""
    rows = [json.loads(line) for line in (pathlib.Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: tuple(row[name] for name in names) for row in rows}


MODEL_METRICS = ("loss", "accuracy", "learning_rate", "gradient_norm", "param_norm")


def assert_close(left: dict, right: dict, tolerance: float) -> None:
    assert left.keys() == right.keys()
    for step in left:
        np.testing.assert_allclose(left[step], right[step], atol=tolerance, rtol=0, err_msg=f"step {step}")
