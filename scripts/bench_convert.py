"""Measures the peak memory of export to and import from Hugging Face, as a multiple of the parameters on disk.

    python scripts/bench_convert.py --model_size=vqlm_1b --directory=/tmp

Each conversion runs in its own process. The disk needs three times the size of the parameters (vqlm_1b: 4.6 GB).
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from ml_collections import ConfigDict

from EasyLM.checkpoints import stacking, streaming
from EasyLM.flags import Flag, run
from EasyLM.models.llama import hf_layout
from EasyLM.models.llama.llama_config import PRESETS, LLaMAConfig

BOUND = 1.5

FLAGS = {
    "model_size": Flag("vqlm_1b", "Preset of the model.", choices=tuple(PRESETS)),
    "directory": Flag(tempfile.gettempdir(), "Directory for temporary files."),
}


def main(config: ConfigDict) -> None:
    """Exports random parameters, imports them again, and compares the bytes."""
    directory = tempfile.mkdtemp(dir=config.directory)
    try:
        path = os.path.join(directory, "params")
        size = write_params(path, PRESETS[config.model_size])
        print(f"{config.model_size}: {size / 1e9:.2f} GB of float32 parameters")
        export = f"--load_checkpoint=params::{path}", f"--output_dir={directory}/hf"
        measure("convert_easylm_to_hf", size, *export)
        measure("convert_hf_to_easylm", size, f"--hf_model={directory}/hf", f"--output_file={directory}/back/params")
        same = subprocess.call(["cmp", path, f"{directory}/back/params"]) == 0
        print(f"the imported file is {'identical' if same else 'DIFFERENT'}")
    finally:
        shutil.rmtree(directory)


def write_params(path: str, model: LLaMAConfig) -> int:
    """Writes random parameters entry by entry, and the metadata beside them. Returns the size of the file."""
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        for key, leaf, _ in stacking.file_order(hf_layout.parameter_shapes(model)):
            streaming.write_entry(file, key[1:], rng.random(leaf.file_shape, np.float32))
    with open(os.path.join(os.path.dirname(path), "metadata.json"), "w", encoding="utf-8") as file:
        json.dump({"llama_config": dataclasses.asdict(model)}, file)
    return os.path.getsize(path)


def measure(tool: str, size: int, *flags: str) -> None:
    """Runs a conversion and prints its peak memory and time."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", f"EasyLM.models.llama.{tool}", *flags], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{tool} failed"
    ratio = usage.ru_maxrss * 1024 / size
    print(
        f"{tool}: peak memory {usage.ru_maxrss / 1e6:.2f} GB, {ratio:.2f} of the parameters (bound {BOUND}: "
        f"{'met' if ratio < BOUND else 'NOT MET'}), {time.perf_counter() - begin:.0f} s"
    )


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
