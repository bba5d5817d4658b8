"""Measures what the filter costs: `python scripts/bench_filter.py`. Prints times of one core, as the process used it:

- the search for near duplicates among random hashes, a hundredth of which have a near one, and its memory. Both are
  proportional to the number of hashes. Exits with code 1 if a near duplicate is missed;
- a comparison of two hashes, from a search that compares each with many others, as among very many hashes;
- the images that are decided from their measurements;
- the JPEG files that are measured, and those that are read for a tokenizer of 256 pixels.
"""

import io
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import orjson
from ml_collections import ConfigDict
from PIL import Image

from EasyLM.flags import Flag, run
from tokenizer.filter import measuring, near_hashes
from tokenizer.filter.decision import Decision, Duplicates
from tokenizer.filter.listing import Entry
from tokenizer.filter.rules import Blocklist, Limits, make_rules
from tokenizer.media import images

FLAGS = {
    "hashes": Flag(10_000_000, "Random hashes.", least=1000),
    "distance": Flag(2, "Bits in which near duplicates differ.", least=1, most=8),
    "measurements": Flag(100_000, "Images that are decided.", least=1000),
    "files": Flag(100, "JPEG files of each size.", least=1),
    "sides": Flag("256,512,1024,2048", "Sides of the JPEG files in pixels, a comma list."),
}
READ_SIDE = 256


def main(config: ConfigDict) -> None:
    """Prints each measurement."""
    hashes_n, planted_n = random_hashes(config.hashes, config.distance)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    left_out_n = near_hashes.near_earlier(hashes_n, config.distance)
    seconds = time.process_time() - start
    memory = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / config.hashes
    searches = (config.distance + 2) * (config.distance + 1) // 2
    print(
        f"near duplicates among {config.hashes:,} hashes, distance {config.distance}: {seconds:.1f} s, "
        f"{1e9 * seconds / searches / config.hashes:.0f} ns a hash in each of {searches} searches, "
        f"{memory:.0f} bytes a hash"
    )
    compared, seconds = crowded_search()
    print(f"comparison of two hashes: {1e9 * seconds / compared:.0f} ns")
    print(f"decision: {decision_rate(config.measurements):,.0f} images/s")
    for side in map(int, config.sides.split(",")):
        with tempfile.TemporaryDirectory() as directory:
            paths, size = write_files(directory, side, config.files)
            measured = rate(lambda path: measuring.measure([Entry("x", path, "")], ()), paths)
            read = rate(lambda path: images.read(path, READ_SIDE), paths)
        print(f"JPEG of {side}x{side}, {size / 1e3:.0f} kB: {measured:.0f} images/s measured, {read:.0f} read")
    if not np.array_equal(left_out_n, planted_n):
        sys.exit("near duplicates were missed, or others were found")


def random_hashes(count: int, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns hashes, uint64 [n], and which of them are at the distance from the one before, bool [n]."""
    rng = np.random.default_rng(0)
    hashes_n = rng.integers(0, 2**64, count, np.uint64)
    planted_n = np.zeros(count, bool)
    planted_n[1::100] = True
    bits = np.argsort(rng.random((len(hashes_n[1::100]), 64)), axis=1)[:, :distance].astype(np.uint64)
    hashes_n[1::100] = hashes_n[:-1:100] ^ np.bitwise_or.reduce(np.uint64(1) << bits, axis=1)
    return hashes_n, planted_n


def crowded_search() -> tuple[int, float]:
    """Searches among few hashes with short blocks. Returns the number of comparisons, and the seconds."""
    count, distance = 300_000, 6  # blocks of 8 bits: 2^16 places for the hashes, in each of 28 searches
    hashes_n, _ = random_hashes(count, distance)
    start = time.process_time()
    near_hashes.near_earlier(hashes_n, distance)
    return 28 * count * count // 2**16, time.process_time() - start


class Lines:
    """The measurements of an image, repeated, as JSON lines in memory."""

    def __init__(self, count: int):
        self.measured = count
        with tempfile.TemporaryDirectory() as directory:
            (path,), _ = write_files(directory, 256, 1)
            self._line = orjson.dumps(measuring.measure([Entry("x", path, "")], ())[0])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(self.measured):
            yield orjson.loads(self._line)


def decision_rate(count: int) -> float:
    """Returns the images per second whose measurements are read and judged by four rules."""
    rules = make_rules(Limits(128, 3.0, 0.05, 2.0, {}, {}))
    start = time.process_time()
    Decision(Lines(count), rules, Blocklist(), 3, Duplicates(exact=False, distance=None))
    return count / (time.process_time() - start)


def write_files(directory: str, side: int, count: int) -> tuple[list[str], float]:
    """Writes JPEG files with the statistics of photographs; returns their paths and mean size in bytes."""
    paths, total = [], 0
    for number in range(count):
        buffer = io.BytesIO()
        Image.fromarray(photograph(side, number)).save(buffer, "JPEG", quality=85)
        paths.append(f"{directory}/{number}.jpg")
        with open(paths[-1], "wb") as file:
            total += file.write(buffer.getvalue())
    return paths, total / count


def photograph(side: int, seed: int) -> np.ndarray:
    """Returns noise at all scales, whose power falls with the square of the frequency: uint8 [S,S,3]."""
    rng = np.random.default_rng(seed)
    image_SS3, scale = np.full((side, side, 3), 128.0), 2
    while scale <= side:
        coarse = Image.fromarray(rng.integers(0, 256, (scale, scale, 3), dtype=np.uint8))
        layer_SS3 = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), float) - 128
        image_SS3 += layer_SS3 / scale**0.5
        scale *= 2
    return np.clip(image_SS3, 0, 255).astype(np.uint8)


def rate(function: Callable[[str], Any], paths: list[str]) -> float:
    """Returns the files per second of a function, in this process."""
    start = time.process_time()
    for path in paths:
        function(path)
    return len(paths) / (time.process_time() - start)


if __name__ == "__main__":
    run(main, FLAGS)
