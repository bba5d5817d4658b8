"""Builds a JSONL file of visual sentences from images or videos: `python -m tokenizer.build --kind=K ...`.

    python -m tokenizer.build --kind=paired --input_dir=data/image --target_dir=data/depth --output_file=depth.jsonl

DATASET.md describes the kinds. The same command resumes an interrupted build; the bytes of the file do not change.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from EasyLM.errors import UserError, prefix_errors
from EasyLM.flags import Flag, Required, run
from EasyLM.process_pool import Workers, available_cores
from EasyLM.skipped_inputs import SkippedInputs
from EasyLM.storage import check_output, check_plain_file, is_remote
from tokenizer.builders import views
from tokenizer.builders.claims import build_parts
from tokenizer.builders.division import ByExamples, ByFiles, Division, Inputs, naming
from tokenizer.builders.inputs import find_sources
from tokenizer.builders.kinds import KINDS
from tokenizer.builders.mixture_file import Entry, read_entries
from tokenizer.builders.output import open_output
from tokenizer.builders.settings import SentenceSettings
from tokenizer.builders.shards import BY_FILES, name_part, parse_share
from tokenizer.builders.writing import Resources, write_sentences
from tokenizer.media import folders
from tokenizer.sources.keep_list import read_keep_list
from tokenizer.vqgan import CODEC_FLAGS, Codec

VERSION = 3  # increases when the same flags and inputs give other sentences; a build resumes only with its own version

_KINDS_WITH_TARGETS = [name for name, kind in KINDS.items() if kind.targets != "none"]
# What a data set of --inputs may set itself.
DATA_SET_FLAGS = {
    "kind": Flag("images", "The kind of sentences.", choices=tuple(KINDS)),
    "input_dir": Flag(
        "",
        "The inputs: a folder with its subfolders; tars or parquet files, as a folder of them, a glob or a range such "
        "as 'DIR/{000..019}.tar'; or a folder of Dataset.save_to_disk. Also s3://, gs://, hf://datasets/OWNER/NAME/...",
        required=Required("unless --inputs is given", lambda config: not config.inputs),
    ),
    "target_dir": Flag(
        "",
        "The annotations or further clips, like --input_dir; for multi_* a comma list.",
        required=Required(
            f"for --kind={'|'.join(_KINDS_WITH_TARGETS)}, unless --keys or --columns lists several",
            lambda config: (
                not config.inputs and config.kind in _KINDS_WITH_TARGETS and "," not in config["keys"] + config.columns
            ),
        ),
    ),
    "keys": Flag(
        "",
        "For tars: the part after the first dot in the names of the inputs, such as jpg. jpg,seg.png takes the "
        "annotations from the same tars, without --target_dir. Empty: every image.",
    ),
    "columns": Flag(
        "",
        "For parquet files and save_to_disk: the column of the inputs. image,label takes the annotations from the same "
        "rows. Empty: the only image column.",
    ),
    "keep": Flag("", "A list of tokenizer.filter: build only from the images in it, and from their annotations."),
    "n_shots": Flag(8, "Pairs, images or classes in a sentence.", least=1),
    "images_per_shot": Flag(1, "category: images of each class in a sentence.", least=1),
    "n_frames": Flag(16, "Frames in a sentence.", least=1),
    "max_stride": Flag(1, "frames, multi_sequence, co3d: largest random step between frames.", least=1),
    "strides": Flag("1", "video: steps between frames, a comma list; each makes its own sentences."),
    "frame_seconds": Flag(
        "",
        "video: instead of --strides, steps in seconds, such as 0.5,2. The frame that is shown at each time is taken, "
        "whatever the frame rate of the video.",
    ),
    "split_at_cuts": Flag(False, "video: no sentence crosses a hard cut. Decodes every video once more."),
    "hole_mask_ratio": Flag(0.5, "inpainting: probability that a mask is one hole, not patches.", least=0, most=1),
    "depth_range": Flag(
        "",
        "near,far: distances of white and black in annotations of 16 bits or floating point, in the unit of the files, "
        "such as 500,10000; empty: black is 0 and white the largest value of the format.",
    ),
}
# Flags that determine the sentences. An interrupted build resumes only with the same values.
SENTENCE_FLAGS = {
    **DATA_SET_FLAGS,
    "n_epochs": Flag(
        1, "Passes over all inputs, each in another order; with weights, over the data set that ends first.", least=1
    ),
    "seed": Flag(0, "Seed of every random choice.", least=0),
    "shard": Flag(
        "0/1",
        "i/n: build only part i (from 0) of n; the concatenated parts equal the whole file. auto: build the part of "
        "this task (of a SLURM array or of srun) or of this host of a pod, then parts whose tasks have died; see "
        "--parts.",
    ),
    "fast_decode": Flag(
        False,
        "Decode JPEG files at 1/2, 1/4 or 1/8 of their sides, but not below that of the tokenizer's images. This is "
        "faster, and changes some pixels; DATASET.md states how much.",
    ),
    "vqgan": CODEC_FLAGS["vqgan"],
    "dtype": CODEC_FLAGS["dtype"],
}
# Flags that earlier versions lack. With their defaults, the files of those versions count as complete.
_LATER_FLAGS = ("keys", "columns", "keep", "frame_seconds", "split_at_cuts", "fast_decode")
FLAGS = {
    "inputs": Flag(
        "",
        "Instead of --input_dir: a YAML file with a list of data sets. Each has kind, input_dir, weight (its share of "
        "the examples), and the flags in which it differs from the command.",
    ),
    **SENTENCE_FLAGS,
    "parts": Flag(
        "",
        "With --shard=auto: the number of parts, for any number of processes. Each process builds parts that no other "
        f"process builds, until all are finished. {BY_FILES}: each tar or table is a part. Empty: one part a task.",
    ),
    "resolution": CODEC_FLAGS["resolution"],
    "batch_size": CODEC_FLAGS["batch_size"],
    "output_file": Flag(
        "",
        "The JSONL file, written atomically, with OUTPUT_FILE.report.json beside it; also on s3://, gs://, ... {i} is "
        "replaced by the number of the part, {n} by the number of parts.",
        required=True,
        may_be_remote=True,
    ),
    "max_errors": Flag(0, "Maximum number of broken, unmatched or short inputs to skip; each is reported.", least=0),
    "fresh": Flag(False, "Discard an interrupted or finished build of the file. Not with --parts."),
    "workers": Flag(available_cores(), "Processes that read images.", least=1),
    "cache_pictures": Flag(
        1 << 21, "Images whose codes are cached on disk for later epochs, 2 bytes per token.", least=1
    ),
}


def main(config: ConfigDict) -> None:
    """Builds the file, or parts of it, and prints their statistics."""
    check_plain_file(config.output_file, "output_file")
    entries = _entries(config)
    inputs = [_inputs(entry) for entry in entries]
    by_files = _by_files(inputs, config) if config.parts == BY_FILES else None
    files = by_files.count if by_files else None
    share = parse_share(config.shard, config.parts, config.output_file, config.fresh, files)
    codec = Codec.from_flags(config)
    skipped = SkippedInputs(config.max_errors)
    division: Division = by_files or ByExamples(inputs, config.n_epochs, config.seed, share.parts, skipped)
    paths = [name_part(config.output_file, part, share.parts) for part in range(share.parts)]
    with Workers(config.workers) as workers:

        def build(part: int) -> None:
            _build(paths[part], division, part, codec, workers, config)

        if not share.takes_over:
            build(share.first)
            return
        left = build_parts(paths, share.first, build, begun_only=not config.parts, waiting_lock=config.output_file)
    finished = f"{share.parts - len(left)} of {share.parts} parts are finished"
    print(f"{finished}, the others are left to other processes" if left else f"{finished}: {config.output_file}")


def _build(path: str, division: Division, part: int, codec: Codec, workers: Workers, config: ConfigDict) -> None:
    """Builds a part.

    Raises:
      LockedError: if another process builds it.
    """
    with contextlib.closing(open_output(path, _fingerprint(config, codec, division, part), config.fresh)) as file:
        if file.finished_report is None:
            if not is_remote(path):
                check_output(path, "output_file", [config.inputs, config.keep])
            file.claim()
        if file.finished_report is not None:
            if config.shard != "auto" or "{i}" not in config.output_file:  # otherwise there can be thousands
                print(f"{path} is already complete: {_summary(file.finished_report)}")
            return
        work = division.work(part)
        folders.report_ignored(work.ignored, "inputs")
        resources = Resources(config.batch_size, workers, config.cache_pictures if work.repeats_images else 0)
        report = write_sentences(work.plan, codec, file, work.skipped, resources, config.fast_decode)
        if not report["sentences"] and division.count == 1:
            name = f"--inputs={config.inputs}" if config.inputs else f"--input_dir={config.input_dir}"
            not_kept = f", {work.not_kept} not kept" if work.not_kept else ""
            raise UserError(f"{name}: no sentence was built, {len(work.skipped)} inputs skipped{not_kept}")
        file.finish({**report, "files_passed_over": work.ignored, "not_kept": work.not_kept})
    print(f"{path}: {_summary(report)}")


def _entries(config: ConfigDict) -> list[Entry]:
    """Returns the data sets: those of --inputs, or the one of the flags."""
    given = [name for name in ("input_dir", "target_dir", "keys", "columns", "keep") if config[name]]
    if config.inputs and given:
        raise UserError(f"--inputs={config.inputs}: its data sets name their inputs: leave out --{', --'.join(given)}")
    if config.inputs:
        return read_entries(config.inputs, DATA_SET_FLAGS, config)
    return [Entry("", config, {}, None)]


def _inputs(entry: Entry) -> Inputs:
    """Checks the settings of a data set, finds its sources, and reads its keep list."""
    config = entry.config
    with naming(entry):
        settings = _settings(config)
        sources = find_sources(config.kind, config.input_dir, config.target_dir, config["keys"], config.columns)
        if config.keep and not KINDS[config.kind].takes_keep_list:
            kinds = ", ".join(name for name, kind in KINDS.items() if kind.takes_keep_list)
            raise UserError(f"--keep={config.keep}: a keep list is for the kinds of single images: {kinds}")
        return Inputs(entry, settings, sources, read_keep_list(config.keep) if config.keep else None)


def _by_files(inputs: list[Inputs], config: ConfigDict) -> ByFiles:
    with prefix_errors(f"--parts={config.parts}"):
        if config.inputs:
            raise UserError(f"--inputs={config.inputs} mixes data sets: give the number of parts")
        return ByFiles(inputs[0], config.n_epochs, config.max_errors)


def _summary(report: Mapping[str, Any]) -> str:
    skipped = f", {len(report['skipped'])} inputs skipped" if report["skipped"] else ""
    idle = f"the device was idle for {report['device_waiting_share']:.0%} of {report['seconds']:.0f} s"
    return f"{report['sentences']} sentences of {report['pictures']} images{skipped}; {idle}"


def _settings(config: ConfigDict) -> SentenceSettings:
    strides = _numbers("strides", config.strides, int)
    frame_seconds = _numbers("frame_seconds", config.frame_seconds, float) if config.frame_seconds else ()
    if frame_seconds and config.strides != DATA_SET_FLAGS["strides"].default:
        raise UserError(f"--strides={config.strides} and --frame_seconds={config.frame_seconds}: give one of the two")
    for name in ("frame_seconds", "split_at_cuts"):
        if config[name] and not KINDS[config.kind].is_video:
            raise UserError(f"--{name}={config[name]}: is for --kind=video, not --kind={config.kind}")
    if config.depth_range:
        with prefix_errors(f"--depth_range={config.depth_range}"):
            if KINDS[config.kind].targets == "none" or config.kind == "map_color":
                raise UserError(f"--kind={config.kind} has no annotations with depths")
            views.parse_depth_range(config.depth_range)
    names = ("depth_range", "seed", "n_shots", "images_per_shot", "n_frames", "max_stride", "hole_mask_ratio")
    others = {name: config[name] for name in (*names, "split_at_cuts")}
    return SentenceSettings(strides=strides, frame_seconds=frame_seconds, **others)


def _numbers(name: str, value: str, parse: Callable[[str], Any]) -> tuple:
    """Parses a comma list of steps."""
    kind, least = ("integers", 1) if parse is int else ("numbers", 1e-3)
    try:
        numbers = tuple(parse(part) for part in value.split(","))
    except ValueError:
        raise UserError(f"--{name}={value}: must be {kind} separated by ','") from None
    if not all(least <= number < math.inf for number in numbers):
        raise UserError(f"--{name}={value}: each must be at least {least:g}")
    return numbers


def _fingerprint(config: ConfigDict, codec: Codec, division: Division, part: int) -> dict[str, Any]:
    """Returns what determines the sentences of a part."""
    flags = {name: config[name] for name in SENTENCE_FLAGS if config[name] or name not in _LATER_FLAGS}
    return {"version": VERSION, "tokenizer": codec.digest, **flags, **division.fingerprint(part)}


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
