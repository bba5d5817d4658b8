"""Writes sentences of synthetic mappings: `python -m tokenizer.mappings --output_file=F.jsonl --num=1000 --seed=0`.

Each sentence has 8 pairs [input, answer, input, answer, ...] of one mapping. It is drawn anew for each sentence, from a
family, so that only its examples define it. Further families are the tasks of the rendered benchmark. DATASET.md
describes them. Scenes, clips and photographs are rendered once into a pool. Sentence i depends on the flags and i only.
The same command resumes an interrupted run.
"""

import contextlib
import dataclasses
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from EasyLM.errors import UserError, choose, prefix_errors
from EasyLM.flags import Flag, run
from EasyLM.process_pool import Workers, available_cores
from EasyLM.storage import check_output, check_plain_file
from tokenizer.builders.resumable_file import ResumableFile
from tokenizer.formats import ImageTokenizer
from tokenizer.mappings import pool, sentences, writing
from tokenizer.mappings.pool import Pool, PoolSettings
from tokenizer.mappings.sentences import FAMILIES, FRAMES, PAIRS, Mixture
from tokenizer.media import grids, images
from tokenizer.synthetic import photos, seed_ranges
from tokenizer.vqgan import CODEC_FLAGS, Codec

VERSION = 2  # increases when the same flags give other sentences; a run resumes only with its own version
_SHEET_SIDE, _SHEET_LABEL_WIDTH = 64, 176  # pixels

DEFAULT_FAMILIES = (
    "mosaic:4,recolour:4,marks:2,channels:1,geometry:3,ramps:2,composed:3,segmentation:3,depth:1.5,normals:1.5,edges:1.5,"
    "inpainting:1.5,colorization:1.5,photo_color:1.5,frames:2.5"
)
# Flags that determine the sentences. An interrupted run resumes only with the same values.
SENTENCE_FLAGS = {
    "num": Flag(1000, "Sentences to write.", least=1, most=seed_ranges.SEEDS_PER_BLOCK),
    "seed": Flag(
        0,
        "Different seeds give different scenes and mappings; "
        f"{seed_ranges.FIRST_HELD_OUT} and above are reserved for test sets.",
        least=0,
    ),
    "families": Flag(
        DEFAULT_FAMILIES, f"Families with their shares, a comma list of NAME:SHARE: {', '.join(FAMILIES)}."
    ),
    "num_mappings": Flag(
        0,
        "Mappings of each family, the same ones for all seeds; 0: a new one for each sentence. A model of few mappings "
        "memorizes them.",
        least=0,
    ),
    "num_scenes": Flag(2048, "Scenes of the pool.", least=PAIRS, most=seed_ranges.SEEDS_PER_BLOCK),
    "num_clips": Flag(256, "Clips of the pool.", least=1, most=seed_ranges.SEEDS_PER_BLOCK),
    "num_photos": Flag(1024, "Crops of photographs of the pool.", least=PAIRS, most=seed_ranges.SEEDS_PER_BLOCK),
    "vqgan": CODEC_FLAGS["vqgan"],
    "dtype": CODEC_FLAGS["dtype"],
}
FLAGS = {
    **SENTENCE_FLAGS,
    "resolution": CODEC_FLAGS["resolution"],
    "batch_size": CODEC_FLAGS["batch_size"],
    "output_file": Flag(
        "", "The JSONL file, written atomically, with OUTPUT_FILE.report.json beside it.", required=True
    ),
    "output_picture": Flag("", "Image file for a sentence of each family, as composed and as decoded from its codes."),
    "fresh": Flag(False, "Discard an interrupted or finished run of the file."),
    "workers": Flag(available_cores(), "Processes that render and compose.", least=1),
}


def main(config: ConfigDict) -> None:
    """Renders the pool, writes the file and prints the rates."""
    check_plain_file(config.output_file, "output_file")
    with prefix_errors(f"--seed={config.seed}"):
        first_seed = seed_ranges.training_seed(config.seed)
    mixture = dataclasses.replace(parse_families(config.families), num_mappings=config.num_mappings)
    if "photo_color" in mixture.families:
        photos.check_available("the family photo_color of --families")
    codec = Codec.from_flags(config)
    fingerprint = {
        "version": VERSION,
        "tokenizer": codec.digest,
        **{name: config[name] for name in SENTENCE_FLAGS},
    }
    with contextlib.closing(ResumableFile(config.output_file, fingerprint, config.fresh)) as file:
        if file.finished_report is None:
            check_output(config.output_file, "output_file")
            file.claim()
        if file.finished_report is not None:
            print(f"{config.output_file} is already complete: {_summary(file.finished_report)}")
            return
        if config.output_picture:
            images.check_output(config.output_picture, "output_picture")
        settings = _pool_settings(config, mixture, first_seed, codec.resolution)
        seeds = range(first_seed, first_seed + config.num)
        with tempfile.TemporaryDirectory() as directory, Workers(config.workers) as workers:
            rendering_seconds = _render(settings, directory, workers, codec)
            if config.output_picture:
                images.save(config.output_picture, _sheet(Pool(directory), mixture.families, first_seed, codec))
            report = writing.write_sentences(directory, mixture, seeds, codec, file, workers)
        report["rendering_seconds"] = rendering_seconds
        file.finish(report)
    print(f"{config.output_file}: {_summary(report)}")


def parse_families(text: str) -> Mixture:
    """Parses a comma list of NAME:SHARE.

    Raises:
      UserError: naming the flag, if a family does not exist or is repeated, or a share is not a positive number.
    """
    families, weights = [], []
    for part in text.split(","):
        family, _, share = part.strip().partition(":")
        choose("--families", family, FAMILIES)
        try:
            weight = float(share)
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise UserError(f"--families={text}: {part.strip()!r} must be {family}:SHARE with a positive number")
        if family in families:
            raise UserError(f"--families={text}: {family} occurs twice")
        families.append(family)
        weights.append(weight)
    return Mixture(tuple(families), tuple(weights))


def _pool_settings(config: ConfigDict, mixture: Mixture, first_seed: int, size: int) -> PoolSettings:
    """Returns what the pool contains: nothing that no family uses."""
    uses_scenes = set(mixture.families) - {"photo_color", FRAMES}
    return PoolSettings(
        first_seed,
        scenes=config.num_scenes if uses_scenes else 0,
        clips=config.num_clips if FRAMES in mixture.families else 0,
        photos=config.num_photos if "photo_color" in mixture.families else 0,
        size=size,
    )


def _render(settings: PoolSettings, directory: str, workers: Workers, codec: ImageTokenizer) -> float:
    """Renders the pool, and compiles the encoder meanwhile; returns the seconds."""
    start = time.monotonic()
    no_images = np.zeros((1, settings.size, settings.size, 3), np.float32)
    compiling = threading.Thread(target=codec.encode, args=(no_images,), daemon=True)
    compiling.start()
    pool.render(settings, directory, workers)
    compiling.join()
    return round(time.monotonic() - start, 1)


def _sheet(rendered: Pool, families: Sequence[str], seed: int, codec: ImageTokenizer) -> np.ndarray:
    """Draws the first sentence of each family as composed, and below it as decoded from its codes."""
    rows = []
    for family in families:
        pixels_nSS3 = sentences.sentence_images(rendered, family, seed)
        decoded_nSS3 = codec.decode(codec.encode(images.to_float32(pixels_nSS3)))
        rows += [(family, pixels_nSS3), (f"{family}, decoded", images.to_uint8(decoded_nSS3))]
    return grids.labelled_rows(rows, _SHEET_SIDE, _SHEET_LABEL_WIDTH)


def _summary(report: Mapping[str, Any]) -> str:
    return (
        f"{report['sentences']} sentences; the pool was rendered in {report['rendering_seconds']:.0f} s; "
        f"{report['sentences_per_second']:.0f} sentences/s, {report['composing_ms']:.2f} ms of CPU each to compose, "
        f"{report['images_encoded']} images encoded, {report['waiting_share']:.0%} of the time waited for the workers"
    )


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
