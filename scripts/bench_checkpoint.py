"""How fast a vqlm_100m train state (1.4 GB) is saved and loaded, against plain reading and writing of as many bytes.

    python scripts/bench_checkpoint.py [--dir=/tmp] [--rounds=5]

Every figure is the median over the rounds; what is compared takes turns within each round, without a pause in between:
a virtual machine may hand freed memory back to its host, and first use of it is slow afterwards. Run it on an idle
machine.
"""

import argparse
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from tqdm import trange

from EasyLM import checkpoints
from EasyLM.models.llama import llama_model
from EasyLM.models.llama.llama_config import PRESETS
from EasyLM.training import step

CONFIG = ml_collections.ConfigDict({"float_dtype": "", "save_optimizer_state": True})
BLOCK = 64 << 20
NOISE = np.random.default_rng(0).bytes(BLOCK)  # some disks are fast with zeros


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where to write; its disk is what is measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only_memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    directory = tempfile.mkdtemp(dir=arguments.dir)
    try:
        if arguments.only_memory:
            print(extra_memory(directory))
        else:
            speed(directory, arguments.rounds)
            command = [sys.executable, __file__, f"--dir={arguments.dir}", "--only_memory"]
            ratio = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            report("extra memory of two saves / state", ratio, 1.2)
    finally:
        shutil.rmtree(directory)


def speed(directory: str, rounds: int) -> None:
    state = make_state()
    saver = checkpoints.Checkpointer(directory, CONFIG)
    saver.prepare(state)
    saver.wait()  # in training, compilation takes longer than this
    path = os.path.join(directory, "streaming_train_state")
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    times = {name: [] for name in ("blocked", "save", "write", "read", "load")}

    def timed(name, function, *args):
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
    def init(key):
        return llama_model.init_params(PRESETS["vqlm_100m"], key), {}

    shapes = step.state_shapes(init, step.Optimizer(optax.adamw(1e-3), lambda opt_state: 1e-3))
    return jax.tree.map(lambda shape: jnp.full(shape.shape, 1, shape.dtype), shapes)


def write(path: str, num_bytes: int) -> None:
    block = memoryview(NOISE)
    with open(path, "wb") as file:
        for begin in range(0, num_bytes, BLOCK):
            file.write(block[: num_bytes - begin])
        file.flush()
        os.fsync(file.fileno())


def extra_memory(directory: str) -> float:
    """Peak of the process's memory over two saves, beyond what it has before, as a share of the state."""
    state = jax.block_until_ready(make_state())
    before = resident("VmRSS")
    saver = checkpoints.Checkpointer(directory, CONFIG)
    for i in range(2):
        saver.save(state, i, {}, {})
        saver.wait()
    return (resident("VmHWM") - before) / sum(x.nbytes for x in jax.tree.leaves(state))


def resident(name: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def report(name: str, value: float, bound: float) -> None:
    print(f"{name:45s} {value:6.2f}  (bound {bound}: {'met' if value < bound else 'NOT MET'})")


if __name__ == "__main__":
    main()
