"""Measures the reconstructions of a tokenizer: `python -m tokenizer.eval_vqgan --vqgan=DIR --input_dirs=D1,D2`.

Prints mean PSNR, mean SSIM and code usage of each folder; `--inception_weights` adds rFID. `--output_json` writes the
metrics as JSON. `--output_picture` writes originals above their reconstructions as one image.
"""

import concurrent.futures
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from EasyLM.errors import UserError, prefix_errors
from EasyLM.flags import Flag, run
from EasyLM.process_pool import available_cores
from EasyLM.progress import progress
from EasyLM.skipped_inputs import SkippedInputs
from EasyLM.storage import check_output, split_paths, write_json
from tokenizer.formats import ImageTokenizer
from tokenizer.image_quality import FeatureStatistics, code_usage, frechet_distance, inception, psnr, ssim, warn_if_few
from tokenizer.media import folders, grids, images
from tokenizer.vqgan import CODEC_FLAGS, Codec

FLAGS = {
    "input_dirs": Flag("", "Comma list of folders of images, searched recursively.", required=True),
    "max_errors": Flag(0, "Maximum number of unusable images to skip; each is reported.", least=0),
    "limit": Flag(0, "Number of images taken from each folder, in name order; 0: all.", least=0),
    "inception_weights": Flag("", "Local weights of pytorch-fid's InceptionV3; enables rFID."),
    "output_json": Flag("", "File for the metrics."),
    "output_picture": Flag("", "Image file for each folder's first images, in a row above their reconstructions."),
    "columns": Flag(12, "Images in a row of --output_picture.", least=1),
    **CODEC_FLAGS,
}


@dataclasses.dataclass(frozen=True)
class FolderResult:
    """Metrics and example images of a folder.

    Attributes:
      metrics: by name, as in the JSON file but without rFID.
      counts_K: how often each code occurs.
      rows: the first originals and their reconstructions, two arrays uint8 [columns,S,S,3].
      features: feature statistics of originals and of reconstructions; empty without a network.
    """

    metrics: dict[str, float]
    counts_K: np.ndarray  # noqa: N815
    rows: list[np.ndarray]
    features: tuple[FeatureStatistics, FeatureStatistics]


def main(config: ConfigDict) -> None:
    """Measures each folder and prints and writes the results."""
    directories = split_paths(config.input_dirs)
    if not directories:
        raise UserError(f"--input_dirs={config.input_dirs}: names no folder")
    if len({*directories, "all"}) <= len(directories):
        raise UserError(f"--input_dirs={config.input_dirs}: names must differ, also from `all`, the name of the total")
    if config.output_json:
        check_output(config.output_json, "output_json")
    if config.output_picture:
        images.check_output(config.output_picture, "output_picture")
    skipped = SkippedInputs(config.max_errors)
    paths = {name: folders.list_images(name, "input_dirs", skipped.add)[: config.limit or None] for name in directories}
    network = None
    if config.inception_weights:
        with prefix_errors(f"--inception_weights={config.inception_weights}"):
            network = inception.Inception(config.inception_weights, config.batch_size)
    codec = Codec.from_flags(config)

    metrics: dict[str, dict[str, Any]] = {}
    counts_K, rows = np.zeros(codec.num_codes, np.int64), []
    features = FeatureStatistics(), FeatureStatistics()
    for folder in directories:
        result = measure(codec, network, paths[folder], skipped, config.batch_size, config.columns)
        metrics[folder] = result.metrics
        counts_K += result.counts_K
        rows += result.rows
        if network:
            metrics[folder]["rfid"] = rfid(folder, *result.features)
            for total, part in zip(features, result.features, strict=True):
                total.merge(part)
        print(_summary(folder, metrics[folder]))
    overall = metrics["all"] = {"pictures": sum(part["pictures"] for part in metrics.values()), **_code_usage(counts_K)}
    if network:
        overall["rfid"] = rfid("all", *features)
    usage = f"{overall['codes_used']:.1%} of {len(counts_K)} codes used, perplexity {overall['code_perplexity']:.0f}"
    print(f"all: {usage}{_rfid_suffix(overall)}")
    if config.output_json:
        write_json(config.output_json, metrics)
    if config.output_picture:
        images.save(config.output_picture, grids.grid(np.concatenate(rows), config.columns))


def measure(
    codec: ImageTokenizer,
    network: inception.Inception | None,
    paths: Sequence[pathlib.Path],
    skipped: SkippedInputs,
    batch_size: int,
    columns: int,
) -> FolderResult:
    """Encodes and decodes the images of a folder and compares them with the originals.

    Args:
      network: computes the features for rFID; None: no features.
      skipped: is updated with the images that cannot be read.
      columns: number of images in `rows`.

    Raises:
      UserError: if more images cannot be read than may be skipped, or none can be read.
    """
    values: dict[str, list[np.ndarray]] = {"psnr": [], "ssim": []}
    pairs, features = [], (FeatureStatistics(), FeatureStatistics())
    counts_K = np.zeros(codec.num_codes, np.int64)
    with (
        concurrent.futures.ThreadPoolExecutor(available_cores()) as pool,
        progress(total=len(paths), unit="image") as bar,
    ):
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            bar.update(len(batch))
            readable = _load(pool, batch, codec.resolution, skipped)
            if not readable:
                continue
            pixels = np.stack(readable)
            codes = codec.encode(pixels)
            reconstructions = codec.decode(codes)
            counts_K += np.bincount(codes.ravel(), minlength=len(counts_K))
            values["psnr"].append(psnr(reconstructions, pixels))
            values["ssim"].append(ssim(reconstructions, pixels))
            if network:
                for statistics, side in zip(features, (pixels, reconstructions), strict=True):
                    statistics.merge(FeatureStatistics.of(network(side)))
            if start < columns:
                pairs.append((pixels, reconstructions))
    if not values["psnr"]:
        raise UserError(f"{paths[0]}: neither this image nor any other one of its folder can be read")
    count = sum(map(len, values["psnr"]))
    means = {name: float(np.concatenate(parts).mean()) for name, parts in values.items()}
    rows = [images.to_uint8(_fill_row(np.concatenate(side), columns)) for side in zip(*pairs)]
    return FolderResult({"pictures": count, **means, **_code_usage(counts_K)}, counts_K, rows, features)


def _load(
    pool: concurrent.futures.Executor, paths: Sequence[pathlib.Path], size: int, skipped: SkippedInputs
) -> list[np.ndarray]:
    """Returns the readable images, each float32 [size,size,3]. Adds the others to `skipped`."""
    pixels = []
    for path, future in [(path, pool.submit(images.load, path, size)) for path in paths]:
        try:
            pixels.append(future.result())
        except UserError as error:
            skipped.add(str(path), str(error))
    return pixels


def rfid(name: str, originals: FeatureStatistics, reconstructions: FeatureStatistics) -> float:
    """Returns the FID of reconstructions against their originals. Logs a warning if there are too few images."""
    warn_if_few(name, originals.count)
    return frechet_distance(originals, reconstructions)


def _code_usage(counts_K: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in code_usage(counts_K).items()}


def _fill_row(pixels_nSS3: np.ndarray, columns: int) -> np.ndarray:
    """Returns the first `columns` images, padded with white ones."""
    white = np.ones((max(columns - len(pixels_nSS3), 0), *pixels_nSS3.shape[1:]), np.float32)
    return np.concatenate([pixels_nSS3[:columns], white])


def _summary(folder: str, metrics: dict[str, float]) -> str:
    return (
        f"{folder}: {metrics['pictures']} images, PSNR {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.3f}, "
        f"codes used {metrics['codes_used']:.1%}, perplexity {metrics['code_perplexity']:.0f}{_rfid_suffix(metrics)}"
    )


def _rfid_suffix(metrics: dict[str, float]) -> str:
    return f", rFID {metrics['rfid']:.2f}" if "rfid" in metrics else ""


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
