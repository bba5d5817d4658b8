"""Calculates what it costs to filter and tokenize many images: `python scripts/data_cost.py --images=1200000000`.

Prints the tables of DATASET.md: hours of cores and cards, memory and disk space, from the measured rates below. Network
and disks are assumed to keep up.
"""

import itertools

from ml_collections import ConfigDict

from EasyLM.flags import Flag, run

# Measured on one core by scripts/bench_filter.py, with JPEG files of 512x512 pixels; see BENCHMARKS.md.
MEASURED_PER_SECOND, READ_PER_SECOND = 847, 204
# A list reads the measurements twice: to decide, and to write the names.
DECIDED_PER_SECOND = 290_000 / 2
SECONDS_PER_HASH, SECONDS_PER_COMPARISON = 237e-9, 62e-9
# Measured on an H100 in bf16 by scripts/gpu_day.sh, with the released tokenizer.
ENCODED_PER_SECOND = 1998
FASTER_PER_SECOND = 2500  # of a card with a smaller tokenizer, for comparison
CORES_OF_A_CARD = (1, 2, 4, 8, 12, 16)
# Of an image: while near duplicates are searched; with two scores, compressed; 256 tokens in base64 and 115 bytes of
# other fields; 256 tokens and the end of the sentence.
MEMORY_BYTES, MEASUREMENT_BYTES, JSONL_BYTES, PACKED_BYTES = 80, 101, 1368 + 115, 2 * 256 + 8

FLAGS = {
    "images": Flag(1_200_000_000, "Images.", least=1),
    "kept": Flag(0.8, "Share of the images that the filter keeps.", above=0, most=1),
    "image_kb": Flag(48.0, "Mean size of an image file in kB.", above=0),
    "distance": Flag(2, "--near_duplicates of the filter.", least=0, most=8),
    "cores": Flag(512, "Cores.", least=1),
    "cards": Flag(64, "Cards.", least=1),
}


def main(config: ConfigDict) -> None:
    """Prints the tables."""
    print(tables(config))


def tables(config: ConfigDict) -> str:
    """Returns the tables: time, space, and how long a card waits for images."""
    kept = round(config.images * config.kept)
    search_rate = config.images / search_seconds(config.images, config.distance)
    rows = [
        ("filter: measure", MEASURED_PER_SECOND, "core", config.images, config.cores),
        ("filter: decide by the rules", DECIDED_PER_SECOND, "core", config.images, 1),
        ("filter: find near duplicates", search_rate, "core", config.images, 1),
        ("build: read and resize", READ_PER_SECOND, "core", kept, config.cores),
        ("build: encode", ENCODED_PER_SECOND, "card", kept, config.cards),
    ]
    lines = ["| step | images | rate of one | hours of one | hours |", "|---|---|---|---|---|"]
    for step, rate, unit, images, count in rows:
        hours = images / rate / 3600
        units = f"{count} {unit}s" if count > 1 else f"one {unit}"
        total = f"{hours:,.1f} {unit}-hours"
        lines.append(
            f"| {step} | {images:,} | {rate:,.0f} images/s a {unit} | {total} | {hours / count:,.1f} on {units} |"
        )
    space = {
        "images, as stored": 1e3 * config.image_kb * config.images,
        "measurements": MEASUREMENT_BYTES * config.images,
        "memory, while near duplicates are searched": MEMORY_BYTES * config.images,
        "sentences of one image, JSONL": JSONL_BYTES * kept,
        "the same, packed with `--keep_others=False`": PACKED_BYTES * kept,
    }
    lines += ["", "| | size |", "|---|---|", *(f"| {name} | {size / 1e9:,.0f} GB |" for name, size in space.items())]
    lines += ["", f"| cores that read for a card | {' | '.join(map(str, CORES_OF_A_CARD))} |"]
    lines.append("|---" * (len(CORES_OF_A_CARD) + 1) + "|")
    for rate in (ENCODED_PER_SECOND, FASTER_PER_SECOND):
        shares = " | ".join(f"{waiting_share(cores, rate):.0%}" for cores in CORES_OF_A_CARD)
        lines.append(f"| a card of {rate:,} images/s waits | {shares} |")
    return "\n".join(lines)


def waiting_share(cores: int, images_per_second: float) -> float:
    """Returns the share of the time that a card waits for images, if cores read for it without a pause."""
    return max(0.0, 1 - cores * READ_PER_SECOND / images_per_second)


def search_seconds(hashes: int, distance: int) -> float:
    """Returns the seconds of the search for near duplicates among random hashes (tokenizer/filter/near_hashes.py)."""
    blocks = distance + 2
    widths = [64 * (i + 1) // blocks - 64 * i // blocks for i in range(blocks)]
    return sum(
        SECONDS_PER_HASH * hashes + SECONDS_PER_COMPARISON * hashes**2 / 2 ** (one + other)
        for one, other in itertools.combinations(widths, 2)
    )


if __name__ == "__main__":
    run(main, FLAGS)
