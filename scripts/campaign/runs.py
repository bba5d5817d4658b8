"""A training run of a tiny model, as a process, and the comparison of its final state with that of another run."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping

import numpy as np

from campaign.attempts import require, require_equal
from EasyLM.data import records

STEPS, SAVE_STEPS = 300, 5
_VOCABULARY = 64
_SECONDS = 240  # of a whole run on a slow machine
_EXPERIMENT = "run"
_STATE = "streaming_train_state"
_FLAGS = {
    "load_llama_config": "vqlm_debug",
    "update_llama_config": f"dict(vocab_size={_VOCABULARY},hidden_size=16,intermediate_size=24,num_hidden_layers=1)",
    "total_steps": STEPS,
    "log_freq": 1,
    "save_model_freq": SAVE_STEPS,
    "optimizer.accumulate_gradient_steps": 2,
    "optimizer.adamw_optimizer.lr": 3e-3,
    "optimizer.adamw_optimizer.lr_warmup_steps": 5,
    "optimizer.adamw_optimizer.lr_decay_steps": STEPS,
    "train_dataset.text_processor.fields": "{tokens}",
    "train_dataset.json_dataset.seq_length": 16,
    "train_dataset.json_dataset.batch_size": 2,
    "train_dataset.json_dataset.shuffle_seed": 0,
    "checkpointer.save_optimizer_state": True,
    "logger.experiment_id": _EXPERIMENT,
    "logger.wandb": False,
}


class TrainingRun:
    """The command of a run. All processes share compiled programs.

    Attributes:
      directory: the run directory, below the output folder.
    """

    directory = _EXPERIMENT

    def __init__(self, folder: pathlib.Path):
        """Writes the data of the run to a folder."""
        self._folder, self._data = folder, folder / "train.jsonl"
        rng = np.random.default_rng(0)
        self._data.write_bytes(b"".join(records.record_line(rng.integers(0, _VOCABULARY, 40)) for _ in range(300)))

    def start(self, output_dir: pathlib.Path) -> subprocess.Popen:
        """Starts the run, whose output is a pipe."""
        flags = _FLAGS | {"train_dataset.json_dataset.path": self._data, "logger.output_dir": output_dir}
        return start_program("EasyLM.models.llama.llama_train", flags, self._folder / "compiled")

    def run(self, output_dir: pathlib.Path) -> tuple[int, str]:
        """Runs to the end. Returns the exit code and the output."""
        process = self.start(output_dir)
        try:
            output, _ = process.communicate(timeout=_SECONDS)
        finally:
            process.kill()
        return process.returncode, output

    def reference(self) -> pathlib.Path:
        """Runs without interruption. Returns the output folder."""
        output_dir = self._folder / "reference"
        code, output = self.run(output_dir)
        if code:
            raise RuntimeError(f"the reference run ended with code {code}:\n{output}")
        return output_dir

    def check_equal(self, output_dir: pathlib.Path, reference: pathlib.Path, has_all_metrics: bool = True) -> None:
        """Raises WrongOutputError unless the final states, data positions and losses of two runs are equal.

        Args:
          has_all_metrics: False after a full disk, which does not end a run because of its metrics.
        """
        got, right = output_dir / _EXPERIMENT, reference / _EXPERIMENT
        require((got / _STATE).exists(), "no final state")
        require((got / _STATE).read_bytes() == (right / _STATE).read_bytes(), "the final state differs")
        for name in ("dataset.json", "checksums.json"):
            require_equal((got / name).read_text(), (right / name).read_text(), name)
        if has_all_metrics:
            require_equal(_losses(got), _losses(right), "losses by step")


def start_program(module: str, flags: Mapping[str, object], compiled: pathlib.Path) -> subprocess.Popen:
    """Starts a command on one CPU device. Its compiled programs are kept in a folder."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "-m", module, *(f"--{name}={value}" for name, value in flags.items())]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _losses(run: pathlib.Path) -> dict[int, float]:
    """Returns the loss of each step. Of a repeated step the last line counts, as documented."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}
