"""Compares training speed on a CPU with the machine's float32 matmul rate: `python scripts/bench_train.py`.

Times the trainer's step of vqlm_100m, batch 1 x 1024, float32, and a large matmul before and after each step, so that
other load on the machine slows both. Model FLOPs are those of MFU (costs.flops_per_token): causal attention
counts half, recomputation does not count. Bounds: half of the matmul rate, 20 seconds to compile. With
--document_length, the step has a document mask. A step without it is timed in turns with it. Bound: 1.05 times as long.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from EasyLM.flags import Flag, run
from EasyLM.models.llama import costs, llama_config, llama_model
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.training import OPTIMIZER_FLAGS, TrainState, make_optimizer, make_train_step, model_without_extra

SIDE = 2048  # of the matmul: 17 GFLOP and 50 MB; larger ones reach no higher rate
LEAST_SHARE, MOST_COMPILE_SECONDS, MOST_MASK_COST = 0.5, 20.0, 1.05

FLAGS = {
    "load_llama_config": Flag("vqlm_100m", "Preset of the model, or json::PATH."),
    "update_llama_config": Flag("", "A Python dict literal of settings to change."),
    "batch_size": Flag(1, "Rows of a step.", least=1),
    "seq_length": Flag(1024, "Tokens of a row.", least=1),
    "document_length": Flag(0, "Tokens of a sentence, with a document mask; 0: no mask.", least=0),
    "steps": Flag(5, "Steps to time, after one warm-up step.", least=1),
    "optimizer": OPTIMIZER_FLAGS,
}


def main(config: ConfigDict) -> None:
    """Compiles the step, times it, and prints each measurement with its bound."""
    model = llama_config.build_config(config.load_llama_config, {}, config.update_llama_config)
    optimizer = make_optimizer(config.optimizer)
    trained = model_without_extra(
        partial(llama_model.init_params, model),
        llama_model.make_loss_fn(model, jnp.float32),
        PARTITION_RULES,
    )
    step = jax.jit(make_train_step(trained.loss_and_gradients, optimizer, seed=0), donate_argnums=0)
    params, _ = jax.jit(trained.init)(jax.random.key(0))
    state = TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(params))
    shape = config.batch_size, config.seq_length
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, *shape)).astype(np.int32)
    batch = {"input_tokens": tokens[0], "target_tokens": tokens[1], "loss_masks": np.ones(shape, np.float32)}
    plain_batch = jax.device_put(batch)
    if config.document_length:
        segments = np.arange(config.seq_length, dtype=np.int32) // config.document_length
        batch = batch | {"segment_ids": np.broadcast_to(segments, shape)}
    batch = jax.device_put(batch)

    plain_step = step.lower(state, plain_batch).compile() if config.document_length else None
    begin = time.perf_counter()
    step = step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - begin
    state, _ = timed(step, state, batch)  # warm-up: touches all memory for the first time

    square = jnp.asarray(np.random.default_rng(0).normal(size=(SIDE, SIDE)), jnp.float32)
    matmul = jax.jit(jnp.matmul)
    matmul(square, square).block_until_ready()

    def matmul_rate() -> float:
        begin = time.perf_counter()
        for _ in range(4):
            matmul(square, square).block_until_ready()
        return 4 * 2 * SIDE**3 / (time.perf_counter() - begin)

    flops = config.batch_size * config.seq_length * costs.flops_per_token(model, config.seq_length)
    seconds, shares, costs_of_mask, rates = [], [], [], [matmul_rate()]
    for _ in range(config.steps):
        state, duration = timed(step, state, batch)
        seconds.append(duration)
        rates.append(matmul_rate())
        shares.append(flops / seconds[-1] / max(rates[-2:]))
        if plain_step is not None:
            state, duration = timed(plain_step, state, plain_batch)
            costs_of_mask.append(seconds[-1] / duration)
    share = statistics.median(shares)
    print(f"step            {statistics.median(seconds):8.2f} s (best {min(seconds):.2f})")
    print(f"tokens          {config.batch_size * config.seq_length / statistics.median(seconds):8.1f} /s")
    print(f"model           {flops / statistics.median(seconds) / 1e9:8.1f} GFLOP/s")
    print(f"matmul          {max(rates) / 1e9:8.1f} GFLOP/s ({SIDE} x {SIDE} float32, {min(rates) / 1e9:.1f} at worst)")
    print(f"share of matmul {share:8.1%} (bound: at least {LEAST_SHARE:.0%}) {_verdict(share >= LEAST_SHARE)}")
    fast = compile_seconds < MOST_COMPILE_SECONDS
    print(f"compile         {compile_seconds:8.2f} s (bound: below {MOST_COMPILE_SECONDS:.0f} s) {_verdict(fast)}")
    if costs_of_mask:
        cost = statistics.median(costs_of_mask)
        print(f"with the mask   {cost:8.3f} times as long (bound: {MOST_MASK_COST}) {_verdict(cost <= MOST_MASK_COST)}")


def timed(step: Callable, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, float]:
    """Runs a step. Returns the new state, and the seconds."""
    begin = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, batch))
    return state, time.perf_counter() - begin


def _verdict(good: bool) -> str:
    return "ok" if good else "MISSED"


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
