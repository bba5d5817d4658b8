"""Speed and held-out quality of a tokenizer: `python scripts/bench_vqgan.py [--vqgan=DIR]`; under a minute on a CPU.

Prints images/s of encoding and decoding, the share of the codebook in use, and PSNR in dB (mean over pictures) for
scenes, each annotation, and photographs, all of seeds and photographs that no training set has.
"""

import time

import numpy as np

from EasyLM.flags import Flag, run
from tokenizer import photos, scenes
from tokenizer.codec import CODEC_FLAGS, Codec

FLAGS = {"num": Flag(64, "Pictures of each sort."), **CODEC_FLAGS}
_FIRST_SEED = 900 * 10**6  # beyond the seeds of tokenizer.render that the recipes use


def main(config) -> None:
    """Measures and prints."""
    codec = Codec(config.vqgan, config.dtype, config.batch_size)
    size = codec.config.resolution
    sets = {"photographs": [photos.crop(i, size, held_out=True) for i in range(config.num)]}
    for i in range(config.num):
        for name, picture in scenes.scene(_FIRST_SEED + i, size).items():
            sets.setdefault(name, []).append(picture)
    used = set()
    for name, pictures in sets.items():
        pixels = np.stack(pictures) / np.float32(255)
        codes = codec.encode(pixels)
        used |= set(codes.ravel().tolist())
        error = np.mean((codec.decode(codes) - pixels) ** 2, axis=(1, 2, 3))
        print(f"{name:>13}: {np.mean(-10 * np.log10(error + 1e-10)):.2f} dB")
    print(f"codes in use: {len(used)} of {codec.config.num_embeddings}")
    for name, function, inputs in (("encode", codec.encode, pixels), ("decode", codec.decode, codes)):
        begin = time.perf_counter()
        function(inputs)  # compiled above
        print(f"{name}: {len(inputs) / (time.perf_counter() - begin):.1f} images/s")


if __name__ == "__main__":
    run(main, FLAGS)
