"""Compares the tokenizer's speed with torch's, with the same weights: `python scripts/bench_vqgan.py` (a minute).

Both models run in this process and alternate: ours is `Codec`, torch's is torch_vqgan.py with a thread for each core.
They encode and decode with the released layout (random weights, small images) and with the shipped tokenizer. The
ratio is the median of torch's time to ours, so that other load on the machine slows both; the bound is at least 1.
The largest difference of the results is printed too. On an accelerator it prints our rates only (`--resolution=256
--batch_size=64 --dtype=bf16`).
"""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from EasyLM.flags import Flag, run
from tokenizer.vqgan import codec, weights
from tokenizer.vqgan.config import VQGANConfig
from tokenizer.vqgan.model import VQGAN

LEAST_RATIO = 1.0
FLAGS = {
    "resolution": Flag(64, "Side of the images for the released layout.", least=16),
    "batch_size": Flag(32, "Images of that size in a batch; the shipped tokenizer gets as many pixels.", least=1),
    "turns": Flag(5, "Runs of each side, after one warm-up.", least=1),
    "dtype": Flag("fp32", "Compute type of the model in JAX.", choices=tuple(codec.COMPUTE_DTYPES)),
}


def main(config: ConfigDict) -> None:
    """Compares both models with each of the two layouts."""
    shipped = weights.load(codec.PRETRAINED).config
    batch_of_shipped = config.batch_size * config.resolution**2 // shipped.resolution**2
    with tempfile.TemporaryDirectory() as directory:
        weights.save(random_model(dataclasses.replace(VQGANConfig(), resolution=config.resolution)), directory)
        for name, folder, batch in (
            ("released", directory, config.batch_size),
            ("shipped", codec.PRETRAINED, batch_of_shipped),
        ):
            compare(name, folder, batch, config)


def random_model(config: VQGANConfig) -> VQGAN:
    """Returns a model with random weights, which is as fast as one with trained weights."""
    rng = np.random.default_rng(0)
    shapes = weights.parameters(nnx.eval_shape(lambda: VQGAN(config, rngs=nnx.Rngs(0))))
    arrays = {name: rng.normal(size=s.shape, scale=np.prod(s.shape[:-1]) ** -0.5) for name, s in shapes.items()}
    arrays = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    return weights.with_parameters(lambda: VQGAN(config, rngs=nnx.Rngs(0)), arrays)


def compare(name: str, folder: str, batch: int, config: ConfigDict) -> None:
    """Prints the rates of encoding and decoding of both models, and their ratios."""
    ours_of = codec.Codec(folder, config.dtype, batch)
    side = ours_of.config.resolution
    pixels = np.random.default_rng(1).random((batch, side, side, 3), np.float32)
    codes = ours_of.encode(pixels)
    ours = {"encode": lambda: ours_of.encode(pixels), "decode": lambda: ours_of.decode(codes)}
    peers = torch_peer(folder, pixels, codes) if jax.default_backend() == "cpu" else {}
    for task, function in ours.items():
        print(f"{name} {side}x{side} {task}: ", end="", flush=True)
        peer = peers.get(task)
        seconds, peer_seconds = in_turns(function, peer, config.turns)
        print(f"{batch / np.median(seconds):.1f} images/s", end="")
        if peer is not None:
            difference = np.abs(np.asarray(function(), np.float64) - peer().numpy()).max()
            ratio = np.median(np.array(peer_seconds) / seconds)
            verdict = "ok" if ratio >= LEAST_RATIO else "MISSED"
            print(
                f", torch {batch / np.median(peer_seconds):.1f}; ratio {ratio:.3f} (bound: at least {LEAST_RATIO:.0f}) "
                f"{verdict}; largest difference {difference:.1e}",
                end="",
            )
        print()


def torch_peer(folder: str, pixels: np.ndarray, codes: np.ndarray) -> dict[str, Callable]:
    """Returns the same two tasks in torch, with the same weights."""
    import torch
    from torch_vqgan import TorchVQGAN

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    peer = TorchVQGAN(folder)
    pixels_B3HW = torch.tensor(peer.low + (peer.high - peer.low) * pixels).permute(0, 3, 1, 2)
    codes_BN = torch.tensor(codes, dtype=torch.long)
    return {
        "encode": lambda: peer.encode(pixels_B3HW),
        "decode": lambda: peer.decode(codes_BN).permute(0, 2, 3, 1),
    }


def in_turns(ours: Callable, peer: Callable | None, turns: int) -> tuple[list[float], list[float]]:
    """Returns the seconds of each turn of both functions, which alternate."""
    our_seconds: list[float] = []
    peer_seconds: list[float] = []
    for turn in range(turns + 1):
        for seconds, function in (our_seconds, ours), (peer_seconds, peer):
            if function is not None:
                begin = time.perf_counter()
                function()
                if turn:  # the first is a warm-up
                    seconds.append(time.perf_counter() - begin)
    return our_seconds, peer_seconds


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
