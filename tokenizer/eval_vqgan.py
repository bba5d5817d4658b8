"""What a tokenizer keeps of pictures: `python -m tokenizer.eval_vqgan --vqgan=DIR --input_dirs=D1,D2`.

Prints, for each folder, PSNR and SSIM (means over its pictures) and how its pictures use the codebook, with
`--inception_weights` also rFID, the distance between the features of pictures and of what their codes keep; with
`--output_json` the same as JSON, with `--output_picture` a sheet of pictures, each above what its codes keep of it.
"""

import concurrent.futures
import os

import numpy as np
from tqdm import tqdm

from EasyLM.errors import UserError
from EasyLM.flags import Flag, run
from EasyLM.storage import check_output, write_json
from tokenizer.image_quality import inception, metrics
from tokenizer.media import folders, grids, images
from tokenizer.vqgan import CODEC_FLAGS, Codec

FLAGS = {
    "input_dirs": Flag("", "Comma list of folders of pictures, those below them included.", required=True),
    "limit": Flag(0, "Take only the first so many pictures of each folder; 0: all.", least=0),
    "inception_weights": Flag("", "File of pytorch-fid's InceptionV3. Adds rFID."),
    "output_json": Flag("", "File for the figures."),
    "output_picture": Flag(
        "", "Picture file: a row of each folder's first pictures above what the codes keep of them."
    ),
    "columns": Flag(12, "Pictures of a row there.", least=1),
    **CODEC_FLAGS,
}


def main(config) -> None:
    """Measures and prints."""
    directories = [name for name in config.input_dirs.split(",") if name]
    if not directories:
        raise UserError(f"--input_dirs={config.input_dirs}: names no folder")
    if config.output_json:
        check_output(config.output_json, "output_json")
    if config.output_picture:
        images.check_output(config.output_picture, "output_picture")
    found = [folders.list_images(folder, "input_dirs")[: config.limit or None] for folder in directories]
    network = inception.Inception(config.inception_weights, config.batch_size) if config.inception_weights else None
    codec = Codec(config.vqgan, config.dtype, config.batch_size)
    figures, used, rows = {}, np.zeros(codec.config.num_embeddings, np.int64), []
    sides = metrics.Gaussian(), metrics.Gaussian()
    for folder, paths in zip(directories, found, strict=True):
        figures[folder], counts_K, row, parts = measure(codec, network, paths, config)
        used += counts_K
        rows += row
        if network:
            figures[folder]["rfid"] = rfid(folder, *parts)
            for side, part in zip(sides, parts, strict=True):
                side.join(part)
        print(_line(folder, figures[folder]))
    usage = figures["all"] = {"pictures": sum(map(len, found)), **code_usage(used)}
    if network:
        usage["rfid"] = rfid("all", *sides)
    shares = f"{usage['codes_used']:.1%} of {len(used)} codes used, perplexity {usage['code_perplexity']:.0f}"
    print(f"all: {shares}{_rfid_words(usage)}")
    if config.output_json:
        write_json(config.output_json, figures)
    if config.output_picture:
        images.save(config.output_picture, grids.grid(np.concatenate(rows), config.columns))


def measure(codec: Codec, network: inception.Inception | None, paths, config) -> tuple[dict, np.ndarray, list, tuple]:
    """(figures of the pictures, how often each code was chosen [K], the sheet's two rows of bytes, gaussians).

    The gaussians are of the features of the pictures and of what is kept of them, or empty without a network.
    """
    values, rows, sides = {"psnr": [], "ssim": []}, [], (metrics.Gaussian(), metrics.Gaussian())
    counts_K = np.zeros(codec.config.num_embeddings, np.int64)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(paths), unit="image") as bar:
        for start in range(0, len(paths), config.batch_size):
            part = paths[start : start + config.batch_size]
            pixels = np.stack(list(pool.map(lambda path: images.load(path, codec.config.resolution), part)))
            codes = codec.encode(pixels)
            drawn = codec.decode(codes)
            counts_K += np.bincount(codes.ravel(), minlength=len(counts_K))
            values["psnr"].append(metrics.psnr(drawn, pixels))
            values["ssim"].append(metrics.ssim(drawn, pixels))
            if network:
                for side, shown in zip(sides, (pixels, drawn), strict=True):
                    side.join(metrics.Gaussian.of(network(shown)))
            if start < config.columns:
                rows.append((pixels, drawn))
            bar.update(len(part))
    means = {name: float(np.concatenate(parts).mean()) for name, parts in values.items()}
    sheet = [images.to_uint8(_filled(np.concatenate(side), config.columns)) for side in zip(*rows)]
    return {"pictures": len(paths), **means, **code_usage(counts_K)}, counts_K, sheet, sides


def rfid(what: str, pictures: metrics.Gaussian, kept: metrics.Gaussian) -> float:
    """FID of what is kept of pictures against the pictures themselves; a warning where they are too few."""
    inception.warn_of_few(what, pictures.count)
    return metrics.frechet_distance(pictures, kept)


def code_usage(counts_K: np.ndarray) -> dict[str, float]:
    """`codes_used`, the share of the codebook in use, and `code_perplexity`, exp of the codes' entropy."""
    share_K = counts_K / counts_K.sum()
    entropy = -(share_K[share_K > 0] * np.log(share_K[share_K > 0])).sum()
    return {"codes_used": float((counts_K > 0).mean()), "code_perplexity": float(np.exp(entropy))}


def _filled(pixels_nSS3: np.ndarray, count: int) -> np.ndarray:
    """The first `count` pictures, white ones after them where there are fewer."""
    white = np.ones((max(count - len(pixels_nSS3), 0), *pixels_nSS3.shape[1:]), np.float32)
    return np.concatenate([pixels_nSS3[:count], white])


def _line(folder: str, figures: dict) -> str:
    return (
        f"{folder}: {figures['pictures']} pictures, PSNR {figures['psnr']:.2f} dB, SSIM {figures['ssim']:.3f}, "
        f"codes used {figures['codes_used']:.1%}, perplexity {figures['code_perplexity']:.0f}{_rfid_words(figures)}"
    )


def _rfid_words(figures: dict) -> str:
    return f", rFID {figures['rfid']:.2f}" if "rfid" in figures else ""


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
