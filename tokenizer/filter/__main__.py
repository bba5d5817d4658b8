"""Lists the images to train on: `python -m tokenizer.filter --input_dir=D --output_file=keep.jsonl.gz ...`.

    python -m tokenizer.filter --input_dir=D --min_side=128 --near_duplicates=2 --output_file=keep.jsonl.gz
    python -m tokenizer.build --input_dir=D --keep=keep.jsonl.gz ...

It reads each image once, and measures it (`--measurements`). Then it drops images by the rules that are given, and
duplicates, and prints how many. The same command with other rules reads no image again. DATASET.md describes the rules.
"""

import dataclasses

from ml_collections import ConfigDict

from EasyLM.errors import UserError
from EasyLM.flags import Flag, Required, run
from EasyLM.process_pool import available_cores
from EasyLM.skipped_inputs import SkippedInputs
from EasyLM.storage import check_output, expand_paths, is_remote, lock_output
from tokenizer.builders.shards import name_part, parse_shard
from tokenizer.filter import report
from tokenizer.filter.decision import Decision, Duplicates
from tokenizer.filter.listing import Listing
from tokenizer.filter.measurements import Measurements, write_measurements
from tokenizer.filter.rules import Blocklist, Limits, make_rules, read_blocklist
from tokenizer.filter.scores import field_of, parse_limits
from tokenizer.media import folders, images
from tokenizer.sources import detection
from tokenizer.sources.items import Source
from tokenizer.sources.tables import Tables

MOST_DISTANCE = 8  # bits; beyond it, different images have near hashes, and the search takes many passes

RULE_FLAGS = {
    "min_side": Flag(0, "Least length of the shorter side in pixels; 0: any.", least=0),
    "max_aspect_ratio": Flag(0.0, "Greatest ratio of the longer side to the shorter one, such as 3; 0: any.", least=0),
    "min_bytes_per_pixel": Flag(
        0.0, "Least size of the file over the number of pixels, such as 0.05; 0: any.", least=0
    ),
    "min_contrast": Flag(
        2.0, "Least standard deviation of the luminance (0 to 255): drops uniform images; 0: any.", least=0
    ),
    "exact_duplicates": Flag(True, "Drop an image whose file has the same bytes as an earlier one."),
    "near_duplicates": Flag(
        -1,
        "Drop an image whose perceptual hash differs from that of a kept image in at most this many of 64 bits, such "
        "as 2; -1: keep near duplicates.",
        least=-1,
        most=MOST_DISTANCE,
    ),
    "blocklist": Flag(
        "",
        "A text file with the hashes of images that must not be used, one on each line: MD5, SHA-256, or a perceptual "
        "hash such as phash:0123456789abcdef.",
    ),
    "blocklist_distance": Flag(
        4, "Bits in which a perceptual hash may differ from one in the blocklist.", least=0, most=MOST_DISTANCE
    ),
    "min": Flag(
        "",
        "Smallest scores, a comma list such as aesthetic:5,length(caption):10. A score is a field of the JSON file of "
        "the same sample (in a tar) or stem (in a folder), or a column of a table. Drops images without the score.",
    ),
    "max": Flag("", "Largest scores, in the same form, such as pwatermark:0.8."),
}
FLAGS = {
    "input_dir": Flag(
        "",
        "The images: a folder with its subfolders; tars or parquet files, as a folder of them, a glob or a range such "
        "as 'DIR/{000..019}.tar'; or a folder of Dataset.save_to_disk. Also s3://, gs://, hf://datasets/OWNER/NAME/...",
        required=Required("unless --measurements of an earlier run is given", lambda config: not config.measurements),
    ),
    "keys": Flag("", "For tars: the part after the first dot in the names of the images; empty: every image."),
    "columns": Flag("", "For parquet files and save_to_disk: the column of the images; empty: the only image column."),
    **RULE_FLAGS,
    "output_file": Flag(
        "",
        "The keep list, .jsonl, .jsonl.gz or .jsonl.zst, with OUTPUT_FILE.report.json beside it.",
        required=Required(
            "unless --measurements and --input_dir are given, to measure only",
            lambda config: not (config.measurements and config.input_dir),
        ),
    ),
    "output_picture": Flag("", "Image file with examples of dropped images for each rule."),
    "measurements": Flag(
        "",
        "File of the measurements, .zst; empty: OUTPUT_FILE.measurements.jsonl.zst. Without --input_dir: a complete "
        "file, or the files of all parts, as a comma list or a glob.",
        reads_local_disk=True,
    ),
    "shard": Flag(
        "0/1",
        "i/n: measure part i (from 0) of n, without --output_file; --measurements may contain {i} and {n}. auto: the "
        "part of this task of a SLURM array or of srun, or of this host of a pod.",
    ),
    "max_errors": Flag(0, "Maximum number of unreadable images to skip; each is reported.", least=0),
    "fresh": Flag(False, "Discard interrupted or finished measurements."),
    "workers": Flag(available_cores(), "Processes that read images.", least=1),
}


def main(config: ConfigDict) -> None:
    """Measures the images, decides, and prints the counts by reason."""
    part, parts = parse_shard(config.shard)
    _check(config, parts)
    minimum, maximum = (parse_limits(name, config[name]) for name in ("min", "max"))
    limits = Limits(
        minimum=minimum,
        maximum=maximum,
        **{name: config[name] for name in ("min_side", "max_aspect_ratio", "min_bytes_per_pixel", "min_contrast")},
    )
    blocklist = read_blocklist(config.blocklist) if config.blocklist else Blocklist()
    scores = tuple(sorted({*minimum, *maximum}))
    paths = [name_part(config.measurements or f"{config.output_file}.measurements.jsonl.zst", part, parts)]
    if not config.input_dir:
        paths = expand_paths("measurements", config.measurements)
    _check_paths(config, paths)
    if config.input_dir:
        skipped = SkippedInputs(config.max_errors)
        source, sidecars = _sources(config, scores)
        check_output(paths[0], "measurements")
        listing = Listing(source, sidecars, skipped, part, parts)
        folders.report_ignored(listing.ignored, source.flag)
        write_measurements(paths[0], listing, scores, f"{part}/{parts}", skipped, config.workers, config.fresh)
    if not config.output_file:
        return
    measurements = Measurements(paths)
    if missing := [score for score in scores if score not in measurements.scores]:
        known = ", ".join(measurements.scores) or "none"
        raise UserError(f"{paths[0]}: --min and --max need {', '.join(missing)}; the measured scores are {known}")
    _check_scores(measurements, scores)
    duplicates = Duplicates(config.exact_duplicates, None if config.near_duplicates < 0 else config.near_duplicates)
    with lock_output(config.output_file, "output_file"):
        decision = Decision(measurements, make_rules(limits), blocklist, config.blocklist_distance, duplicates)
        written = report.write_list(config.output_file, measurements, decision)
    print(report.table(written, config.output_file))
    if config.output_picture and written["examples"]:
        images.save(config.output_picture, report.example_sheet(written))
    elif config.output_picture:
        print(f"--output_picture={config.output_picture}: not drawn, as no image is dropped")


def _check(config: ConfigDict, parts: int) -> None:
    """Checks which flags are given together."""
    if parts > 1 and (config.output_file or not config.input_dir):
        raise UserError(
            f"--shard={config.shard}: measures a part of --input_dir: give --measurements, not --output_file. Then "
            "run it once without --shard and --input_dir, with --measurements of all parts and --output_file"
        )
    if config.input_dir and is_remote(config.measurements):
        raise UserError(f"--measurements={config.measurements}: must be a local path")
    if config.output_picture:
        if not config.output_file:
            raise UserError(f"--output_picture={config.output_picture}: needs --output_file")
        images.check_output(config.output_picture, "output_picture")


def _check_paths(config: ConfigDict, measurements: list[str]) -> None:
    """Checks the files of the measurements and of the keep list, which must not replace what it is made from."""
    if config.input_dir and not measurements[0].lower().endswith(".zst"):
        raise UserError(f"--measurements={config.measurements}: must end in .zst: the file is compressed")
    if config.output_file:
        check_output(config.output_file, "output_file", [*measurements, config.blocklist])


def _check_scores(measurements: Measurements, scores: tuple[str, ...]) -> None:
    """Raises UserError naming the scores that no image has: their names are misspelt, or they are no numbers."""
    missing = set(scores)
    for measurement in measurements:
        missing -= {score for score in missing if measurement["scores"][score] is not None}
        if not missing:
            return
    if missing and measurements.measured:
        raise UserError(f"--min and --max: no image has the score {' or '.join(sorted(missing))}: check its name")


def _sources(config: ConfigDict, scores: tuple[str, ...]) -> tuple[Source, Source | None]:
    """Returns the images, and the JSON files of their scores, if scores are wanted and they are not columns."""
    if config["keys"] and config.columns:
        raise UserError(
            f"--keys={config['keys']} and --columns={config.columns}: keys are for tars, columns for tables"
        )
    for flag in ("keys", "columns"):
        if "," in config[flag]:
            raise UserError(f"--{flag}={config[flag]}: give one, for the images")
    keys, columns = (tuple(filter(None, (config[flag],))) for flag in ("keys", "columns"))
    source = detection.find_source(config.input_dir, "input_dir", images.IMAGE_EXTENSIONS, keys, columns)
    if isinstance(source, Tables):
        return dataclasses.replace(source, others=tuple(map(field_of, scores))), None
    return source, detection.find_source(config.input_dir, "input_dir", (".json",)) if scores else None


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
