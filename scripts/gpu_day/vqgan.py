"""Measures the tokenizer in the released layout with random weights: images per second, and FLOP/s of its network."""

import dataclasses
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from bench_vqgan import random_model
from flax import nnx
from ml_collections import ConfigDict

from EasyLM.flags import Flag, run
from gpu_day.measure import emit, peak_bytes, reason
from gpu_day.profile import time_by_kernel
from tokenizer.vqgan import VQGAN, Codec, VQGANConfig
from tokenizer.vqgan.weights import save

FLAGS = {
    "resolution": Flag(256, "Side of the images.", least=16),
    "cases": Flag("fp32x32,bf16x128", "Comma list of compute type x images of a batch."),
    "batches": Flag(6, "Batches to measure, after one to compile.", least=1),
}


def main(config: ConfigDict) -> None:
    """Measures each type and batch size. One that fails is a record too."""
    vqgan = dataclasses.replace(VQGANConfig(), resolution=config.resolution)
    with tempfile.TemporaryDirectory() as directory:
        save(random_model(vqgan), directory)
        for case in config.cases.split(","):
            dtype, batch_size = case.split("x")
            values = {"dtype": dtype, "batch_size": int(batch_size)}
            codec = Codec(directory, dtype, int(batch_size), jax.devices()[:1])
            try:
                measured = rates(codec, config.batches)
            except Exception as error:  # such as too little memory
                emit("vqgan", case, **values, error=reason(error))
                continue
            for task, task_values in measured.items():
                emit("vqgan", f"{task}, {case}", **values, **task_values)
            pixels = np.zeros((codec.batch_size, config.resolution, config.resolution, 3), np.float32)
            traced = time_by_kernel(lambda codec=codec, pixels=pixels: codec.decode(codec.encode(pixels)))
            emit("kernels", f"a batch of images, {case}", milliseconds=traced)


def rates(codec: Codec, batches: int) -> dict[str, dict]:
    """Returns images per second and the network's FLOP/s of encoding and decoding, with copies to and from the host."""
    size, side = codec.batch_size, codec.resolution
    pixels = np.random.default_rng(1).random((size, side, side, 3), np.float32)
    begin = time.perf_counter()
    codes = codec.encode(pixels)
    compiled = {"encode": time.perf_counter() - begin}
    begin = time.perf_counter()
    codec.decode(codes)
    compiled["decode"] = time.perf_counter() - begin
    tasks = {"encode": (codec.encode_batches, pixels), "decode": (codec.decode_batches, codes)}
    values = {}
    for task, (function, batch) in tasks.items():
        begin = time.perf_counter()
        for _ in function(batch for _ in range(batches)):
            pass
        seconds = (time.perf_counter() - begin) / batches
        values[task] = {
            "images_per_second": size / seconds,
            "flops_per_second": size * flops_per_image(codec.config, task) / seconds,
            "first_call_seconds": compiled[task],
            "peak_bytes": peak_bytes(),
        }
    return values


def flops_per_image(config: VQGANConfig, task: str) -> float:
    """Returns XLA's count of the FLOPs of one image, before optimization."""
    graph, state = nnx.split(nnx.eval_shape(lambda: VQGAN(config, rngs=nnx.Rngs(0))))
    side = config.resolution
    pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    codes = jax.ShapeDtypeStruct((1, config.tokens_per_image), jnp.int32)
    functions = {
        "encode": (lambda state, pixels: nnx.merge(graph, state).encode(pixels)[1], pixels),
        "decode": (lambda state, codes: nnx.merge(graph, state).decode(codes), codes),
    }
    function, shape = functions[task]
    with jax.default_device(jax.devices("cpu")[0]):  # other backends need not count
        return jax.jit(function).lower(state, shape).cost_analysis()["flops"]


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
