"""Times a save by 4 processes that write their shares, against a save that gathers the state on process 0.

    python scripts/bench_parallel_save.py --directory=/tmp

Runs gathered before, and still do where the processes share no disk. The processes run on this machine, with a device
each and a fully sharded train state of 0.26 GB. In each round both ways alternate, and all processes begin at the same
time. Prints the medians of the process with the largest values, and exits with code 1 if a bound is missed:
- the seconds that training waits for a save, in both ways, and their ratio;
- the bytes that a process writes, over those of the file;
- the peak memory that a save adds to a process, over its share of the state (a fourth).

The processes exchange data through this machine's memory in place of a network. On two cores, training waits 0.13 s
for a save, with the gather 0.74 s: a ratio of 0.17. Each process writes 0.252 of the file and adds 1.00 of its share to
its memory. With the gather, process 0 writes all, and adds 4.00 of a share.
"""

import dataclasses
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"

import jax
import ml_collections
import optax
from jax.experimental import multihost_utils

from EasyLM import checkpoints
from EasyLM.flags import Flag, run
from EasyLM.models.llama import llama_model
from EasyLM.models.llama.llama_config import PRESETS
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.parallel import JAX_DISTRIBUTED_FLAGS, fail_together, initialize_distributed, make_mesh, shardings
from EasyLM.training import step

PROCESSES = 4
SHARES, GATHER = WAYS = ("shares", "gather")
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}

FLAGS = {
    "directory": Flag(tempfile.gettempdir(), "Directory for temporary files; the benchmark measures its disk."),
    "rounds": Flag(5, "Rounds; the medians are printed.", least=1),
    "output": Flag("", "File for the results of one process; the benchmark runs itself with this flag."),
    "jax_distributed": JAX_DISTRIBUTED_FLAGS,
}

# Of a save by shares; the pause is over that of the gather.
BOUNDS = {"pause": 0.5, "written": 1.1 / PROCESSES, "memory": 1.1}

Results = dict[str, dict[str, list[float]]]  # a key of BOUNDS -> the way -> a value of each round, or of one save


def main(config: ml_collections.ConfigDict) -> None:
    """Starts the processes and prints their results, or measures in one of them."""
    if config.output:
        with fail_together():
            results = measure(config)
        pathlib.Path(config.output).write_text(json.dumps(results))
        return
    with tempfile.TemporaryDirectory(dir=config.directory) as directory:
        processes = run_processes(directory, config.rounds)
    if not all(print_results(processes)):
        sys.exit(1)


def run_processes(directory: str, rounds: int) -> list[Results]:
    """Measures in new processes. Returns the results of each."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
    flags = {
        "directory": directory,
        "rounds": rounds,
        "jax_distributed.initialize_jax_distributed": True,
        "jax_distributed.coordinator_address": address,
        "jax_distributed.num_processes": PROCESSES,
    }
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in flags.items())]
    outputs = [f"{directory}/results_{process}.json" for process in range(PROCESSES)]
    running = [
        subprocess.Popen([*command, f"--output={output}", f"--jax_distributed.process_id={process}"])
        for process, output in enumerate(outputs)
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        sys.exit(f"the processes ended with {codes}")
    return [json.loads(pathlib.Path(output).read_text()) for output in outputs]


def measure(config: ml_collections.ConfigDict) -> Results:
    """Saves in both ways in turn. Returns the results of this process."""
    initialize_distributed(config.jax_distributed)
    state = make_state()
    share = sum(array.nbytes for array in jax.tree.leaves(state)) / PROCESSES
    # Where not all processes see the files of process 0, it gathers the state.
    directories = {SHARES: f"{config.directory}/shared", GATHER: f"{config.directory}/of_{jax.process_index()}"}
    results: Results = {name: {way: [] for way in WAYS} for name in BOUNDS}
    savers = {}
    for way, directory in directories.items():
        make_saver(directory, state)  # compiles the collectives, whose memory is not that of a save
        before = reset_peak_memory()
        savers[way] = make_saver(directory, state)
        results["memory"][way].append((memory("VmHWM") - before) / share)
    file_bytes = os.path.getsize(f"{directories[SHARES]}/streaming_train_state")
    for i in range(config.rounds):
        for way, saver in savers.items():
            multihost_utils.sync_global_devices("all begin now")
            written, begin = bytes_written(), time.perf_counter()
            save(saver, state, i)
            results["pause"][way].append(time.perf_counter() - begin)
            saver.wait()
            results["written"][way].append((bytes_written() - written) / file_bytes)
    return results


def make_state() -> step.TrainState:
    """Returns a train state whose arrays are split over all processes."""
    model = dataclasses.replace(PRESETS["vqlm_100m"], **SIZES)

    def init(key):
        return llama_model.init_params(model, key), {}

    optimizer = step.Optimizer(optax.adamw(1e-3), lambda opt_state: 1e-3)
    places = shardings(make_mesh("1,-1,1"), PARTITION_RULES, step.state_shapes(init, optimizer))
    return jax.block_until_ready(step.init_state(init, optimizer, 0, places))


def make_saver(directory: str, state: step.TrainState) -> checkpoints.Checkpointer:
    """Returns a saver that has allocated its memory and saved once."""
    saver = checkpoints.Checkpointer(directory, save_optimizer_state=True)
    saver.prepare(state)
    saver.wait()  # during training, this overlaps with compilation
    save(saver, state, 0)
    saver.wait()
    return saver


def save(saver: checkpoints.Checkpointer, state: step.TrainState, number: int) -> None:
    """Saves the state. Returns when training could continue."""
    saver.save(state, number, {}, {"step": number})


def bytes_written() -> int:
    """Returns the bytes that this process has written to disks. File systems in memory do not count."""
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


def memory(name: str) -> int:
    """Returns VmRSS or VmHWM of this process, in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def reset_peak_memory() -> int:
    """Makes VmHWM, the peak, the present memory. Returns it, in bytes."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return memory("VmHWM")


def print_results(processes: list[Results]) -> list[bool]:
    """Prints the medians of the rounds, for the process with the largest. Returns whether each bound is met."""
    worst = {
        (name, way): statistics.median(max(values) for values in zip(*(results[name][way] for results in processes)))
        for name in BOUNDS
        for way in WAYS
    }
    print(f"seconds that training waits: {worst['pause', SHARES]:.2f}; with the gather {worst['pause', GATHER]:.2f}")
    measured = {
        "pause": (worst["pause", SHARES] / worst["pause", GATHER], "seconds that training waits / with the gather"),
        "written": (worst["written", SHARES], "bytes written by a process / file"),
        "memory": (worst["memory", SHARES], "peak memory that a save adds / share of the state"),
    }
    met = []
    for name, (value, title) in measured.items():
        met.append(0 < value <= BOUNDS[name])  # 0: a disk whose bytes are not counted
        with_gather = "" if name == "pause" else f"; with the gather {worst[name, GATHER]:.2f}"
        print(f"{title:50s} {value:6.3f}  (bound {BOUNDS[name]}: {'met' if met[-1] else 'NOT MET'}{with_gather})")
    return met


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
