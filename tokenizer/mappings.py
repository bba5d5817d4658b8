"""Writes sentences of synthetic mappings: `python -m tokenizer.mappings --output_file=F.jsonl --num=1000 --seed=0`.

Each sentence has 8 pairs [input, answer, input, answer, ...] of one mapping. It is drawn anew for each sentence, from a
family, so that only its examples define it. Further families are the tasks of the rendered benchmark. DATASET.md
describes them. Scenes, clips and photographs are rendered once into a pool. Sentence i depends on the flags and i only.
The same command resumes an interrupted run.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from EasyLM.errors import UserError, choose, prefix_errors
from EasyLM.flags import Flag, run
from EasyLM.process_pool import Workers
from EasyLM.storage import check_output
from tokenizer.builders.resumable_file import ResumableFile, folder_fingerprint
from tokenizer.synthetic import pool, seed_ranges, writing
from tokenizer.synthetic.pool import PoolSettings
from tokenizer.synthetic.sentences import FAMILIES, FRAMES, PAIRS, Mixture
from tokenizer.vqgan import CODEC_FLAGS, Codec

VERSION = 1  # increases when the same flags give other sentences; a run resumes only with its own version

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
    "num_scenes": Flag(2048, "Scenes of the pool.", least=PAIRS, most=seed_ranges.SEEDS_PER_BLOCK),
    "num_clips": Flag(256, "Clips of the pool.", least=1, most=seed_ranges.SEEDS_PER_BLOCK),
    "num_photos": Flag(1024, "Crops of photographs of the pool.", least=PAIRS, most=seed_ranges.SEEDS_PER_BLOCK),
    "vqgan": CODEC_FLAGS["vqgan"],
    "dtype": CODEC_FLAGS["dtype"],
}
FLAGS = {
    **SENTENCE_FLAGS,
    "batch_size": CODEC_FLAGS["batch_size"],
    "output_file": Flag(
        "", "The JSONL file, written atomically, with OUTPUT_FILE.report.json beside it.", required=True
    ),
    "fresh": Flag(False, "Discard an interrupted or finished run of the file."),
    "workers": Flag(os.cpu_count() or 1, "Processes that render and compose.", least=1),
}


def main(config: ConfigDict) -> None:
    """Renders the pool, writes the file and prints the rates."""
    with prefix_errors(f"--seed={config.seed}"):
        first_seed = seed_ranges.training_seed(config.seed)
    mixture = parse_families(config.families)
    codec = Codec(config.vqgan, config.dtype, config.batch_size)
    fingerprint = {
        "version": VERSION,
        "tokenizer": folder_fingerprint(config.vqgan),
        **{name: config[name] for name in SENTENCE_FLAGS},
    }
    with contextlib.closing(ResumableFile(config.output_file, fingerprint, config.fresh)) as file:
        if file.finished_report is not None:
            print(f"{config.output_file} is already complete: {_summary(file.finished_report)}")
            return
        check_output(config.output_file, "output_file")
        settings = _pool_settings(config, mixture, first_seed, codec.config.resolution)
        seeds = range(first_seed, first_seed + config.num)
        with tempfile.TemporaryDirectory() as directory:
            start = time.monotonic()
            with Workers(config.workers) as workers:
                pool.render(settings, directory, workers)
            rendering = round(time.monotonic() - start, 1)
            report = writing.write_sentences(directory, mixture, seeds, codec, file, config.workers)
        report["rendering_seconds"] = rendering
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
