"""Measures how a tokenizer preserves flat colours: `python scripts/flat_colours.py [--vqgan=DIR]` (ten seconds).

Encodes and decodes each of the 64 colours of `tokenizer.synthetic.palette` as a whole image, and as the shapes of the
segmentations of eight held-out scenes on the usual background. Counts the colours that are drawn within 12 of 255, and
the codes that a colour takes in the cells it fills. A language model can use a palette only if a colour takes few
codes.
"""

import numpy as np
from ml_collections import ConfigDict

from EasyLM.flags import run
from tokenizer.synthetic import palette, scenes, seed_ranges
from tokenizer.vqgan import CODEC_FLAGS, Codec

BOUND = 12  # mean absolute error, of 255
FLAGS = CODEC_FLAGS


def main(config: ConfigDict) -> None:
    """Prints the two measurements."""
    codec = Codec.from_flags(config)
    size = codec.resolution
    flat = np.broadcast_to(palette.COLOURS[:, None, None], (len(palette.COLOURS), size, size, 3))
    everywhere = np.ones((1, size, size), bool)
    _print("whole images", *measure(codec, flat[:, None], everywhere))
    seeds = seed_ranges.benchmark_seeds(0, 8)
    shapes = np.stack([scenes.label_ids(scenes.scene(seed, size)["segmentation"]) > 0 for seed in seeds])
    on_background = np.where(shapes[None, ..., None], flat[:, None], np.array(scenes.BACKGROUND, np.uint8))
    _print("shapes of segmentations", *measure(codec, on_background, shapes))


def measure(codec: Codec, images_CnSS3: np.ndarray, areas_nSS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the error, of 255, and the number of different codes of each colour [C].

    Args:
      images_CnSS3: n uint8 images for each colour.
      areas_nSS: where they have the colour. The measurements are of the codes' cells that lie in it entirely.
    """
    side, size = codec.config.side, codec.resolution
    cells_nhw = areas_nSS.reshape(-1, side, size // side, side, size // side).all(axis=(2, 4))
    inside_nSS = cells_nhw.repeat(size // side, axis=1).repeat(size // side, axis=2)
    errors, counts = [], []
    for images_nSS3 in images_CnSS3:
        pixels_nSS3 = (images_nSS3 / 255).astype(np.float32)
        codes_nN = codec.encode(pixels_nSS3)
        difference_nSS3 = np.abs(codec.decode(codes_nN) - pixels_nSS3)
        errors.append(255 * difference_nSS3[inside_nSS].mean())
        counts.append(len(np.unique(codes_nN.reshape(cells_nhw.shape)[cells_nhw])))
    return np.array(errors), np.array(counts)


def _print(name: str, errors: np.ndarray, counts: np.ndarray) -> None:
    print(
        f"{name}: {np.sum(errors <= BOUND)} of {len(errors)} colours within {BOUND}/255 (mean {errors.mean():.1f}, "
        f"largest {errors.max():.1f}); codes of a colour: mean {counts.mean():.1f}, largest {counts.max()}, "
        f"{np.sum(counts <= 2)} colours with at most 2"
    )


def cli() -> None:
    """Runs the script with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
