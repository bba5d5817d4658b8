"""What a tokenizer keeps of pictures: `python -m tokenizer.eval_vqgan --vqgan=DIR --input_dirs=D1,D2`.

Prints, for each folder, PSNR and SSIM (means over its pictures) and how its pictures use the codebook; with
`--output_json` the same as JSON, with `--output_picture` a sheet of pictures, each above what its codes keep of it.
"""

import concurrent.futures
import json
import os

import numpy as np
from tqdm import tqdm

from EasyLM.errors import UserError
from EasyLM.flags import Flag, run
from tokenizer import images, metrics
from tokenizer.codec import CODEC_FLAGS, Codec

FLAGS = {
    "input_dirs": Flag("", "Comma list of folders of pictures, those below them included."),
    "limit": Flag(0, "Take only the first so many pictures of each folder; 0: all."),
    "output_json": Flag("", "File for the figures."),
    "output_picture": Flag("", "PNG file for a row of each folder's first pictures above what the codes keep of them."),
    "columns": Flag(12, "Pictures of a row there."),
    **CODEC_FLAGS,
}


def main(config) -> None:
    """Measures and prints."""
    folders = [name for name in config.input_dirs.split(",") if name]
    if not folders:
        raise UserError("--input_dirs is missing: a comma list of folders of pictures")
    for name, least in {"limit": 0, "columns": 1}.items():
        if config[name] < least:
            raise UserError(f"--{name}={config[name]}: must be at least {least}")
    files = [images.find(folder, "input_dirs")[: config.limit or None] for folder in folders]
    codec = Codec(config.vqgan, config.dtype, config.batch_size)
    figures, used, rows = {}, np.zeros(codec.config.num_embeddings, np.int64), []
    for folder, paths in zip(folders, files, strict=True):
        figures[folder], counts_K, row = measure(codec, paths, config)
        used += counts_K
        rows += row
        print(_line(folder, figures[folder]))
    figures["all"] = {"pictures": sum(map(len, files)), **code_usage(used)}
    usage = figures["all"]
    print(f"all: {usage['codes_used']:.1%} of {len(used)} codes used, perplexity {usage['code_perplexity']:.0f}")
    if config.output_json:
        _write_json(config.output_json, figures)
    if config.output_picture:
        images.save(config.output_picture, images.grid(np.concatenate(rows), config.columns))


def measure(codec: Codec, paths, config) -> tuple[dict, np.ndarray, list]:
    """(figures of the pictures, how often each code was chosen [K], the sheet's two rows of bytes)."""
    values, rows = {"psnr": [], "ssim": []}, []
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
            if start < config.columns:
                rows.append((pixels, drawn))
            bar.update(len(part))
    means = {name: float(np.concatenate(parts).mean()) for name, parts in values.items()}
    sheet = [images.to_uint8(_filled(np.concatenate(side), config.columns)) for side in zip(*rows)]
    return {"pictures": len(paths), **means, **code_usage(counts_K)}, counts_K, sheet


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
        f"codes used {figures['codes_used']:.1%}, perplexity {figures['code_perplexity']:.0f}"
    )


def _write_json(path: str, figures: dict) -> None:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.tmp", "w") as file:
        json.dump(figures, file, indent=2)
    os.replace(f"{path}.tmp", path)


if __name__ == "__main__":
    run(main, FLAGS)
