"""Measures how fast images are read for a build: `python scripts/bench_reading.py` on an idle machine (3 minutes).

Prints each measurement with its bound:
- the rate of reading JPEG files of 1, 3 and 12 megapixels at 256 x 256, by the pipeline and the worker processes of
  `tokenizer.build`, relative to loops of Pillow alone in as many processes as there are cores;
- the same with --fast_decode, and how much its pixels differ;
- the rates of the same files in a tar and in a parquet file, relative to loose files;
- the peak memory of a process that lists a tar of a million members and shuffles them.
The sides of a relative rate alternate in both orders, so that other load on the machine slows both. The images are
mosaics of the photographs in scikit-image, the files are in the page cache. Needs the extras quickstart and dev.
"""

import contextlib
import dataclasses
import functools
import io
import multiprocessing
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from ml_collections import ConfigDict
from PIL import Image

from EasyLM.flags import Flag, run
from EasyLM.process_pool import Workers, available_cores
from EasyLM.shared_results import SharedResults
from EasyLM.skipped_inputs import SkippedInputs
from tokenizer.builders import file_index, image_ref, samplers
from tokenizer.builders.code_cache import CodeCache
from tokenizer.builders.image_ref import ImageRef
from tokenizer.builders.pipeline import Encoder, Pipeline
from tokenizer.builders.settings import SentenceSettings
from tokenizer.media import images
from tokenizer.sources import detection
from tokenizer.synthetic import photos

SIDE, TILE, BATCH = 256, 256, 32
MEGAPIXELS = {1: (1152, 864), 3: (2048, 1536), 12: (4000, 3000)}
DISTINCT = 4  # images of a size; further files are links to them
QUALITY = 90
GROUP_ROWS = 100  # of a parquet file, as Hugging Face writes them
MEMBERS_READ = 600  # has more row groups than stay in memory, so that each turn reads them
FLAGS = {
    "seconds": Flag(2.0, "About how long each of the sides is measured in a turn.", least=0.1),
    "turns": Flag(5, "Turns; the median counts.", least=1),
    "cores": Flag(available_cores(), "Processes that read.", least=1),
    "members": Flag(1_000_000, "Members of the tar that is listed.", least=1000),
    "directory": Flag("", "Directory of the temporary files (2 GB); empty: the system's."),
    "list_only": Flag("", "List and shuffle this tar and print the memory; the benchmark runs itself with this flag."),
}


def main(config: ConfigDict) -> None:
    """Prints each measurement with its bound. Exits with code 1 if one is missed."""
    if config.list_only:
        list_and_shuffle(config.list_only)
        return
    met = []
    # Forked before there are threads.
    pool = multiprocessing.get_context("fork").Pool(config.cores)
    with pool, tempfile.TemporaryDirectory(dir=config.directory or None) as directory, Workers(config.cores) as workers:
        for megapixels, size in MEGAPIXELS.items():
            files = write_images(os.path.join(directory, str(megapixels)), size)
            count = rounded(config.seconds * config.cores / seconds_of(files[0]))
            refs = repeated(files, count, os.link)
            sides = {
                "Pillow": lambda refs=refs: pool.map(read_plainly, [ref.path for ref in refs], chunksize=4),
                "ours": functools.partial(read_all, workers, refs, False),
                "fast": functools.partial(read_all, workers, refs, True),
            }
            rates = rates_in_turns(sides, count, config.turns)
            print(f"{megapixels} million pixels, {config.cores} processes, images/s: {shown(rates)}")
            met.append(report("--fast_decode=False / Pillow", ratio(rates, "ours", "Pillow"), at_least=0.9))
            met.append(report("--fast_decode=True / Pillow", ratio(rates, "fast", "Pillow"), at_least=1.5))
            print(f"  --fast_decode against bicubic: {difference(files)}")
        # Copies: the four files of links would stay in the processor's caches, unlike the members of a tar.
        originals = write_images(os.path.join(directory, "many"), MEGAPIXELS[1])
        files = [ref.path for ref in repeated(originals, MEMBERS_READ, shutil.copyfile)]
        sides = {
            name: functools.partial(read_all, workers, refs, False)
            for name, refs in containers(directory, files).items()
        }
        rates = rates_in_turns(sides, len(files), config.turns)
        print(f"1 million pixels, images/s: {shown(rates)}")
        met += [report(f"{name} / files", ratio(rates, name, "files"), at_least=0.95) for name in ("tar", "parquet")]
        path = os.path.join(directory, "members.tar")
        write_tar_of_small_members(path, config.members)
        megabytes = peak_megabytes([sys.executable, __file__, f"--list_only={path}"])
        met.append(report(f"memory of listing and shuffling {config.members} members, MB", megabytes, at_most=200))
    sys.exit(0 if all(met) else 1)


def rounded(count: float) -> int:
    """Returns a whole number of batches."""
    return BATCH * max(1, round(count / BATCH))


def write_images(folder: str, size: tuple[int, int]) -> list[str]:
    """Writes JPEG files (width, height) that are mosaics of photographs; returns their paths."""
    os.makedirs(folder)
    paths = []
    for number in range(DISTINCT):
        image = Image.new("RGB", size)
        corners = [(x, y) for y in range(0, size[1], TILE) for x in range(0, size[0], TILE)]
        for i, corner in enumerate(corners):
            image.paste(Image.fromarray(photos.crop(number * len(corners) + i, TILE)), corner)
        paths.append(os.path.join(folder, f"{number}.jpg"))
        image.save(paths[-1], quality=QUALITY)
    return paths


def repeated(files: Sequence[str], count: int, write: Callable[[str, str], Any]) -> list[ImageRef]:
    """Writes links to files, or copies of them, of different names, as a build reads each image once."""
    refs = []
    for number in range(count):
        source = files[number % len(files)]
        path = f"{source}.{number:06d}.jpg"
        write(source, path)
        refs.append(ImageRef(path))
    return refs


def read_plainly(path: str) -> None:
    """Reads an image as a loop of Pillow alone does."""
    with Image.open(path) as image:
        np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def seconds_of(path: str) -> float:
    """Returns the seconds of reading an image in this process."""
    read_plainly(path)
    begin = time.perf_counter()
    read_plainly(path)
    return time.perf_counter() - begin


class NoTokenizer:
    """Takes the place of the tokenizer, in no time."""

    resolution, tokens_per_image = SIDE, 1

    def encode(self, pixels_nSS3: np.ndarray) -> np.ndarray:
        """Returns a code for each image."""
        return np.zeros((len(pixels_nSS3), 1), np.int32)


@dataclasses.dataclass(frozen=True)
class OneImage:
    """A sentence of one image."""

    images: list[ImageRef]


def read_all(workers: Workers, refs: Sequence[ImageRef], fast_decode: bool) -> None:
    """Reads images as a build does, up to its batches of pixels."""
    reader = functools.partial(image_ref.read, size=SIDE, fast_decode=fast_decode)
    with (
        contextlib.closing(Encoder(NoTokenizer())) as encoder,  # type: ignore[arg-type]  # it needs no more
        SharedResults(workers, reader, (SIDE, SIDE, 3), 6 * BATCH + workers.processes) as pixels,
    ):
        cache = CodeCache(0, 1, ".")
        pipeline = Pipeline(pixels.submit, encoder, cache, BATCH, 6 * BATCH, workers.processes)
        for _, codes in pipeline.run(OneImage([ref]) for ref in refs):
            assert isinstance(codes, np.ndarray), codes


def containers(directory: str, files: Sequence[str]) -> dict[str, list[ImageRef]]:
    """Writes files into a tar and a parquet file; returns the images of each form in one order."""
    tar, table = os.path.join(directory, "images.tar"), os.path.join(directory, "images.parquet")
    contents = [pathlib.Path(path).read_bytes() for path in files]
    with tarfile.open(tar, "w") as archive:
        for path, content in zip(files, contents):
            info = tarfile.TarInfo(os.path.basename(path))
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    # A dictionary would hold each of the few distinct images once.
    pyarrow.parquet.write_table(
        pyarrow.table({"image": contents}), table, row_group_size=GROUP_ROWS, use_dictionary=False
    )
    return {"files": [ImageRef(path) for path in files], "tar": listed(tar), "parquet": listed(table)}


def listed(path: str) -> list[ImageRef]:
    """Returns the images of a tar or table."""
    skipped = SkippedInputs(0)
    index = file_index.FileIndex(file_index.by_name, [detection.find_source(path, "input_dir", (".jpg",))], skipped)
    return [index.row(item, 0)[0] for item in range(len(index))]


def rates_in_turns(sides: dict[str, Callable[[], Any]], count: int, turns: int) -> dict[str, list[float]]:
    """Returns the images per second of each side in each turn."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, side in list(sides.items())[:: 1 if turn % 2 else -1]:
            begin = time.perf_counter()
            side()
            if turn:  # the first is a warm-up
                rates[name].append(count / (time.perf_counter() - begin))
    return rates


def shown(rates: dict[str, list[float]]) -> str:
    """Returns the median rates as text."""
    return ", ".join(f"{name} {np.median(values):.1f}" for name, values in rates.items())


def ratio(rates: dict[str, list[float]], ours: str, theirs: str) -> float:
    """Returns the median over the turns of the ratio of two sides."""
    return float(np.median(np.divide(rates[ours], rates[theirs])))


def difference(files: Sequence[str]) -> str:
    """Returns by how much fast decoding changes the pixels."""
    errors = [images.read(path, SIDE, True).astype(np.float64) - images.read(path, SIDE) for path in files]
    psnr = 10 * np.log10(255**2 / np.mean(np.square(errors)))
    return f"PSNR {psnr:.1f} dB, mean absolute difference {np.mean(np.abs(errors)):.2f} of 255"


def write_tar_of_small_members(path: str, count: int) -> None:
    """Writes a tar of members of a block each."""
    with open(path, "wb", buffering=1 << 20) as file:
        for number in range(count):
            info = tarfile.TarInfo(f"{number // 1000:06d}/{number:09d}.jpg")
            info.size = tarfile.BLOCKSIZE
            file.write(info.tobuf(tarfile.USTAR_FORMAT) + b"x" * tarfile.BLOCKSIZE)
        file.write(bytes(2 * tarfile.BLOCKSIZE))


def list_and_shuffle(path: str) -> None:
    """Lists a tar, reads the rows of every tenth example of a shuffled epoch, and prints the status of the process."""
    source = detection.find_source(path, "input_dir", (".jpg",))
    index = file_index.FileIndex(file_index.by_stem, [source], SkippedInputs(0))
    settings = SentenceSettings(
        seed=0, n_shots=8, images_per_shot=1, n_frames=16, max_stride=1, strides=(1,), hole_mask_ratio=0.5
    )
    sampler = samplers.Shots(index, settings)
    for example in range(0, sampler.num_examples, 10):
        sampler.rows(0, example)
    with open("/proc/self/status") as status:
        print(status.read())


def peak_megabytes(command: Sequence[str]) -> float:
    """Returns VmHWM of a command that prints /proc/self/status."""
    status = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    match = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert match, status
    return int(match[1]) * 1024 / 1e6


def report(name: str, value: float, at_least: float = 0, at_most: float = float("inf")) -> bool:
    """Prints a measurement with its bound; returns whether it is met."""
    met = at_least <= value <= at_most
    bound = f"at least {at_least}" if at_least else f"at most {at_most}"
    print(f"  {name}: {value:.2f} (bound: {bound}) {'ok' if met else 'MISSED'}", flush=True)
    return met


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
