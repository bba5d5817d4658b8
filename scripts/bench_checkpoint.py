"""Times saving and loading of a vqlm_100m train state (1.4 GB), relative to plain reads and writes of the same size.

    python scripts/bench_checkpoint.py --directory=/tmp --rounds=5

Prints medians over the rounds. In each round the operations alternate without a pause: a virtual machine may return
freed memory to its host, and its first use afterwards is slow. Run it on an idle machine.
"""

import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from tqdm import trange

from EasyLM import checkpoints
from EasyLM.flags import Flag, run
from EasyLM.models.llama import llama_model
from EasyLM.models.llama.llama_config import PRESETS
from EasyLM.training import step

BLOCK_BYTES = 64 << 20
NOISE = np.random.default_rng(0).bytes(BLOCK_BYTES)  # random: some disks are faster with zeros

FLAGS = {
    "directory": Flag(tempfile.gettempdir(), "Directory for temporary files; the benchmark measures its disk."),
    "rounds": Flag(5, "Rounds; the medians are printed.", least=1),
    "only_memory": Flag(False, "Measure only the memory of two saves; the benchmark runs itself with this flag."),
}


def main(config: ml_collections.ConfigDict) -> None:
    """Measures time in this process and memory in a second one."""
    directory = tempfile.mkdtemp(dir=config.directory)
    try:
        if config.only_memory:
            print(extra_memory(directory))
            return
        measure_speed(directory, config.rounds)
        command = [sys.executable, __file__, f"--directory={config.directory}", "--only_memory"]
        ratio = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        report("extra memory of two saves / state", ratio, 1.2)
    finally:
        shutil.rmtree(directory)


def measure_speed(directory: str, rounds: int) -> None:
    """Prints the seconds of each operation, and their ratios with the bounds."""
    state = make_state()
    saver = checkpoints.Checkpointer(directory, save_optimizer_state=True)
    saver.prepare(state)
    saver.wait()  # during training, this overlaps with compilation
    path = os.path.join(directory, "streaming_train_state")
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    times: dict[str, list[float]] = {name: [] for name in ("blocked", "save", "write", "read", "load")}

    def timed(name: str, function: Callable, *args: Any) -> Any:
        begin = time.perf_counter()
        result = function(*args)
        times[name].append(time.perf_counter() - begin)
        return result

    for i in trange(rounds):
        begin = time.perf_counter()
        timed("blocked", saver.save, state, i, {}, {})
        saver.wait()
        times["save"].append(time.perf_counter() - begin)
        timed("write", write, os.path.join(directory, "plain"), os.path.getsize(path))
        os.remove(os.path.join(directory, "plain"))
        timed("read", lambda: len(pathlib.Path(path).read_bytes()))
        jax.block_until_ready(timed("load", checkpoints.load, f"trainstate::{path}", target))
    gigabytes = os.path.getsize(path) / 1e9
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"{gigabytes:.2f} GB; seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in median.items()))
    report("load / reading the file whole", median["load"] / median["read"], 2)
    report("save / writing and syncing as many bytes", median["save"] / median["write"], 2)
    report("seconds that training waits", median["blocked"], 0.5)
    report("seconds that training waits, longest of all", max(times["blocked"]), 0.5)


def make_state() -> step.TrainState:
    """Returns a vqlm_100m train state filled with ones."""

    def init(key):
        return llama_model.init_params(PRESETS["vqlm_100m"], key), {}

    shapes = step.state_shapes(init, step.Optimizer(optax.adamw(1e-3), lambda opt_state: 1e-3))
    return jax.tree.map(lambda shape: jnp.full(shape.shape, 1, shape.dtype), shapes)


def write(path: str, num_bytes: int) -> None:
    """Writes and syncs a file of random bytes."""
    block = memoryview(NOISE)
    with open(path, "wb") as file:
        for begin in range(0, num_bytes, BLOCK_BYTES):
            file.write(block[: num_bytes - begin])
        file.flush()
        os.fsync(file.fileno())


def extra_memory(directory: str) -> float:
    """Returns the peak memory that two saves add, as a fraction of the state's size."""
    state = jax.block_until_ready(make_state())
    before = resident("VmRSS")
    saver = checkpoints.Checkpointer(directory, save_optimizer_state=True)
    for i in range(2):
        saver.save(state, i, {}, {})
        saver.wait()
    return (resident("VmHWM") - before) / sum(x.nbytes for x in jax.tree.leaves(state))


def resident(name: str) -> int:
    """Returns VmRSS or VmHWM of this process, in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def report(name: str, value: float, bound: float) -> None:
    """Prints a value with its upper bound."""
    print(f"{name:45s} {value:6.2f}  (bound {bound}: {'met' if value < bound else 'NOT MET'})")


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
