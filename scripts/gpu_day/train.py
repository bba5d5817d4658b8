"""Measures the trainer's step of one preset: tokens per second, memory and kernels of each candidate."""

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from EasyLM.flags import Flag, defaults, run
from EasyLM.models.llama import adapters, costs, llama_config, llama_model, training_task
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.parallel import batch_sharding, make_mesh
from EasyLM.training import OPTIMIZER_FLAGS, TrainState, abstract_state, make_optimizer, trace_step
from EasyLM.training.step import init_state
from gpu_day.candidates import CANDIDATES, STATE_BYTES, Candidate
from gpu_day.measure import emit, peak_bytes, reason
from gpu_day.profile import time_by_kernel

FLAGS = {
    "preset": Flag("vqlm_1b", "Preset of the model.", choices=tuple(CANDIDATES)),
    "only": Flag("", "Measure the candidates whose names contain this text; empty: all."),
    "seq_length": Flag(4096, "Tokens of a row.", least=1),
    "seconds": Flag(2.0, "Time to measure each candidate, after two warm-up steps.", above=0),
}


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A compiled step, and functions that create its arguments.

    Attributes:
      step: (state, batch) -> (state, metrics); donates the state.
      new_state: creates a fresh state.
      batch: a batch of random tokens on the device.
    """

    step: Any
    new_state: Callable[[], TrainState]
    batch: dict[str, jax.Array]


def main(config: ConfigDict) -> None:
    """Measures and traces the candidates. A candidate that fails is a record too."""
    candidates = [candidate for candidate in CANDIDATES[config.preset] if config.only in candidate.name]
    model, limit = llama_config.PRESETS[config.preset], (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    needed = STATE_BYTES * costs.num_parameters(model)
    if limit and needed > limit and any(not candidate.lora for candidate in candidates):
        reason_text = f"the state and gradients need {needed / 1e9:.0f} GB, the device has {limit / 1e9:.0f}"
        emit("train", config.preset, preset=config.preset, error=reason_text)
    for candidate in candidates:
        settings = llama_config.updated(model, repr(dict(candidate.settings)))
        name = f"{config.preset}, {candidate.name}"
        labels = {
            "preset": config.preset,
            "rows": candidate.rows,
            "parameters": trained_parameters(settings, candidate),
        }
        try:
            trainer, measured = measure(settings, candidate, config.seq_length, config.seconds)
            emit("train", name, **labels, **measured)
            emit("kernels", f"train step, {name}", milliseconds=profiled(trainer))
        except Exception as error:  # such as too little memory
            emit("train", name, **labels, error=reason(error))


def measure(model: LLaMAConfig, candidate: Candidate, length: int, seconds: float) -> tuple[Trainer, dict]:
    """Compiles and times a candidate. Returns the trainer and the values of its record."""
    before = peak_bytes() or 0
    begin = time.perf_counter()
    trainer, planned = compiled_trainer(model, candidate, length)
    compile_seconds = time.perf_counter() - begin
    state = trainer.new_state()
    for _ in range(2):
        state, metrics = trainer.step(state, trainer.batch)
        jax.block_until_ready((state, metrics))
        begin, steps = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds or steps < 3:
        state, metrics = trainer.step(state, trainer.batch)
        steps += 1
        if steps % 2 == 0:  # at most two steps are in flight, as in the trainer
            jax.block_until_ready(metrics)
    jax.block_until_ready((state, metrics))
    step_seconds = (time.perf_counter() - begin) / steps
    tokens = candidate.rows * length
    peak = peak_bytes() or 0
    return trainer, {
        "tokens_per_second": tokens / step_seconds,
        "tokens_per_step": tokens,
        "step_seconds": step_seconds,
        "steps": steps,
        "loss": float(metrics["loss"]),
        "flops_per_second": tokens
        * costs.flops_per_token(model, length, frozen=candidate.lora is not None)
        / step_seconds,
        "compile_seconds": compile_seconds,
        "planned_bytes": planned,
        "peak_bytes": peak if peak > before else None,  # a smaller peak than an earlier one is not known
    }


def trained_parameters(model: LLaMAConfig, candidate: Candidate) -> int:
    """Returns the number of parameters that an optimizer changes."""
    if not candidate.lora:
        return costs.num_parameters(model)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(adapters.adapter_shapes(model, candidate.lora)))


def compiled_trainer(model: LLaMAConfig, candidate: Candidate, length: int) -> tuple[Trainer, int | None]:
    """Returns the trainer's compiled step with its optimizer's default flags, and XLA's plan of its peak memory."""
    mesh, optimizer = make_mesh("1,1,1", jax.devices()[:1]), make_optimizer(defaults(OPTIMIZER_FLAGS))
    parts = training_task.make_model(model, "bf16", mesh, candidate.lora)
    state = abstract_state(parts, optimizer, mesh)
    shape = candidate.rows, length
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, *shape)).astype(np.int32)
    batch = {"input_tokens": tokens[0], "target_tokens": tokens[1], "loss_masks": np.ones(shape, np.float32)}
    batch = jax.device_put(batch, batch_sharding(mesh))
    step = trace_step(parts, optimizer, 0, mesh, state, batch)
    compiled = step.lower().compile()
    planned = getattr(compiled.memory_analysis(), "peak_memory_in_bytes", None)
    places = jax.tree.map(lambda array: array.sharding, state)

    def new_state() -> TrainState:
        if not candidate.lora:
            return init_state(parts.init, optimizer, 0, places)
        trained = init_state(parts.init, optimizer, 0, dataclasses.replace(places, extra={}))
        return dataclasses.replace(trained, extra=jax.jit(partial(_frozen, model), out_shardings=places.extra)())

    return Trainer(compiled, new_state, batch), planned


def _frozen(model: LLaMAConfig) -> dict:
    """Returns random parameters with kernels in bf16."""
    return llama_model.with_kernels(llama_model.init_params(model, jax.random.key(0)), jnp.bfloat16)


def profiled(trainer: Trainer, steps: int = 2) -> dict[str, float]:
    """Returns milliseconds of a step by kernel. Empty if the trace holds no events of the device."""
    state = trainer.new_state()
    state, _ = trainer.step(state, trainer.batch)
    jax.block_until_ready(state)

    def traced():
        nonlocal state
        for _ in range(steps):
            state, _ = trainer.step(state, trainer.batch)
        jax.block_until_ready(state)

    return {name: milliseconds / steps for name, milliseconds in time_by_kernel(traced).items()}


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
