"""Trains a tokenizer with each quantizer and prints a table: `python scripts/compare_quantizers.py` (BENCHMARKS.md).

All variants see the same images in the same order for the same number of steps. The images are rendered as in
make_tokenizer.sh, but with 64x64 pixels. All have the same network, about 1,024 codes, and no discriminator. The
metrics are those of held-out images. The results are kept in --results; the same command resumes an interrupted run.

rFID needs the weights of InceptionV3, which are not part of this repository. `rFD` takes its place: the Frechet
distance between the vectors of the shipped tokenizer's encoder at all positions of originals and of reconstructions.
"""

import json
import math
import os
import shlex
import subprocess
import sys
import time

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from EasyLM.errors import choose
from EasyLM.flags import Flag, run
from EasyLM.storage import write_json
from tokenizer.image_quality import FeatureStatistics, code_usage, frechet_distance, psnr, ssim
from tokenizer.media import folders, images
from tokenizer.vqgan import PRETRAINED, Codec, weights

FLAGS = {
    "work_dir": Flag("build/quantizers", "Directory of the images and the runs."),
    "results": Flag("scripts/compare_quantizers.json", "File of the results, which is read and updated."),
    "only": Flag("all", "Comma list of variants to train, such as FSQ,LFQ, or all; empty: only print the table."),
    "steps": Flag(200, "Steps of each variant.", least=21),
    "batch_size": Flag(16, "Images of a step.", least=1),
    "scenes": Flag(
        100, "Rendered scenes for training, as many photographs, and three times as many flat images.", least=1
    ),
    "held_out": Flag(24, "Held-out images of each kind.", least=1),
}
SIZE, SEED = 64, 42
KINDS = ("image", "segmentation", "depth", "normals", "edges", "photo_color", "photo_gray", "flat")
_LEARNED = ("--vqgan.num_embeddings=1024", "--vqgan.quantized_embed_dim=8")
_GRADIENT = (*_LEARNED, "--codebook_update=gradient")
VARIANTS: dict[str, tuple[str, ...]] = {
    "VQ": _GRADIENT,
    "VQ+l2": (*_GRADIENT, "--vqgan.normalize_codes=True"),
    "VQ+EMA": _LEARNED,
    "VQ+entropy": (*_GRADIENT, "--entropy_weight=0.1"),
    "FSQ": ("--vqgan.quantizer=fsq", "--vqgan.fsq_levels=8,5,5,5"),
    "LFQ": ("--vqgan.quantizer=lfq", "--vqgan.num_embeddings=1024"),
}
COLUMNS = {  # a metric -> its name and form in the table
    "codes": ("codes", "{:,}"),
    "bits_per_pixel": ("bits a pixel", "{:.3f}"),
    "psnr": ("PSNR (dB)", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "rfd": ("rFD", "{:.3f}"),
    "codes_used": ("codes used", "{:.1%}"),
    "code_perplexity": ("perplexity of the codes", "{:.0f}"),
}


def main(config: ConfigDict) -> None:
    """Trains and measures the chosen variants, and prints the table of all results."""
    names = list(VARIANTS) if config.only == "all" else [name for name in config.only.split(",") if name]
    for name in names:
        choose("--only", name, tuple(VARIANTS))
    results: dict[str, dict] = {}
    if os.path.exists(config.results):
        with open(config.results) as file:
            results = json.load(file)
    if names:
        render(config)
        held_out = load_images(os.path.join(config.work_dir, "held_out"))
    for name in names:
        started = time.monotonic()
        model = train(config, name)
        results[name] = {"flags": list(VARIANTS[name]), "run": settings(config), **measure(model, held_out)}
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        write_json(config.results, results)
    print(table(results))


def settings(config: ConfigDict) -> dict[str, int]:
    """Returns what all variants of a table have in common."""
    return {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "images": (len(KINDS) - 1 + 3) * config.scenes,
        "held_out_images": len(KINDS) * config.held_out,
        "size": SIZE,
        "seed": SEED,
    }


def render(config: ConfigDict) -> None:
    """Renders the training images and the held-out ones, unless they exist."""
    n, m = config.scenes, config.held_out
    for name, flags in {
        "train": [f"--num={n}", f"--num_photos={n}", f"--num_flat={3 * n}", "--seed=1"],
        "held_out": [f"--num={m}", f"--num_photos={m}", f"--num_flat={m}", "--seed=2", "--held_out_photos=True"],
    }.items():
        folder = os.path.join(config.work_dir, name)
        if not os.path.isdir(folder):
            _run("tokenizer.render", f"--output_dir={folder}.part", f"--size={SIZE}", *flags)
            os.rename(f"{folder}.part", folder)


def train(config: ConfigDict, name: str) -> str:
    """Trains a variant, or finishes its run, and returns the folder of its model."""
    directories = ",".join(os.path.join(config.work_dir, "train", kind) for kind in KINDS)
    network = [f"--vqgan.resolution={SIZE}", "--vqgan.hidden_channels=8", "--vqgan.channel_mult=1,2,4"]
    network += ["--vqgan.num_res_blocks=1", "--vqgan.z_channels=32", "--vqgan.norm_groups=4"]
    network += ["--vqgan.resample_with_conv=False"]
    _run(
        "tokenizer.train_vqgan",
        f"--input_dirs={directories}",
        *network,
        *VARIANTS[name],
        f"--total_steps={config.steps}",
        f"--batch_size={config.batch_size}",
        f"--lr_warmup_steps={config.steps // 20}",
        "--lr=2e-3",
        f"--seed={SEED}",
        "--average_decay=0.98",
        "--log_freq=20",
        f"--save_model_freq={config.steps}",
        f"--logger.output_dir={config.work_dir}",
        f"--logger.experiment_id={name}",
    )
    return os.path.join(config.work_dir, name, "vqgan")


def load_images(directory: str) -> np.ndarray:
    """Returns the images of all kinds, [n,S,S,3] float32."""
    paths = [path for kind in KINDS for path in folders.list_images(os.path.join(directory, kind), "work_dir")]
    return np.stack([images.load(path, SIZE) for path in paths])


def measure(model: str, pixels_nSS3: np.ndarray) -> dict[str, float]:
    """Returns the metrics of a tokenizer."""
    codec = Codec(model)
    codes_nN = codec.encode(pixels_nSS3)
    reconstructed_nSS3 = codec.decode(codes_nN)
    usage = code_usage(np.bincount(codes_nN.ravel(), minlength=codec.num_codes))
    return {
        "codes": codec.num_codes,
        "bits_per_pixel": codec.tokens_per_image * math.log2(codec.num_codes) / codec.resolution**2,
        "psnr": float(psnr(reconstructed_nSS3, pixels_nSS3).mean()),
        "ssim": float(ssim(reconstructed_nSS3, pixels_nSS3).mean()),
        "rfd": frechet_distance(features(pixels_nSS3), features(reconstructed_nSS3)),
        **{name: float(value) for name, value in usage.items()},
    }


def features(pixels_nSS3: np.ndarray) -> FeatureStatistics:
    """Returns the statistics of the vectors of the shipped tokenizer's encoder at all positions of all images."""
    graphdef, state = nnx.split(weights.load(PRETRAINED))
    encode = jax.jit(lambda state, pixels: nnx.merge(graphdef, state).encoder(pixels))
    statistics = FeatureStatistics()
    for start in range(0, len(pixels_nSS3), 32):
        vectors_BhwC = np.asarray(encode(state, pixels_nSS3[start : start + 32]))
        statistics.merge(FeatureStatistics.of(vectors_BhwC.reshape(-1, vectors_BhwC.shape[-1])))
    return statistics


def table(results: dict[str, dict]) -> str:
    """Returns the results as a Markdown table."""
    names = ["quantizer", *(name for name, _ in COLUMNS.values())]
    rows = [names, ["---"] * len(names)]
    for variant in VARIANTS:
        if variant in results:
            rows.append([variant, *(form.format(results[variant][metric]) for metric, (_, form) in COLUMNS.items())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _run(module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    print(shlex.join(["python", *command[1:]]), flush=True)
    subprocess.run(command, check=True, env={**os.environ, "WANDB_MODE": "disabled"})


if __name__ == "__main__":
    run(main, FLAGS)
