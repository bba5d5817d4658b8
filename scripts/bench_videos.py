"""Measures the rate of reading short videos: `python scripts/bench_videos.py` on an idle machine.

Writes short H.264 files, and reads all their frames at the size of a tokenizer in two ways that alternate over parts of
the files, so that other load on the machine slows both:
- PyAV and Pillow alone, in one process a core, each with one thread;
- a build without its tokenizer: frame times, windows, reading in worker processes, batches of bytes.
Prints the rates and their ratio, which has a bound. A build's own process receives the frames of several workers and
needs a part of a core besides: 0.06 ms of CPU time for each frame, of 1.5 ms that PyAV and Pillow need alone. On
two idle cores the ratio is 0.86 to 0.92 (three runs). With --workers=1, where it reads them itself, it was 0.98.
"""

import contextlib
import fractions
import functools
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor

import av
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from EasyLM.errors import UserError
from EasyLM.flags import Flag, run
from EasyLM.process_pool import Workers, available_cores
from EasyLM.shared_results import SharedResults
from EasyLM.skipped_inputs import SkippedInputs
from tokenizer.builders import file_index, image_ref, samplers
from tokenizer.builders.code_cache import CodeCache
from tokenizer.builders.file_index import FileIndex
from tokenizer.builders.kinds import DataSet, compose
from tokenizer.builders.pipeline import IMAGES_PER_READ, Pipeline
from tokenizer.builders.schedule import in_order
from tokenizer.builders.settings import SentenceSettings
from tokenizer.media import videos
from tokenizer.sources.local import LocalFolder

WIDTH, HEIGHT, RATE = 320, 240, 25
N_FRAMES, BATCH = 16, 32
TURNS = 5
LEAST_RATIO = 0.7

FLAGS = {
    "files": Flag(1000, "Number of files.", least=TURNS),
    "frames": Flag(80, "Frames of a file, a multiple of 16.", least=N_FRAMES),
    "size": Flag(256, "Side of the images.", least=1),
    "workers": Flag(available_cores(), "Processes of both sides.", least=1),
    "directory": Flag("", "Directory of the temporary files; empty: the system's."),
}


class NoEncoder:
    """Stands for a tokenizer that takes no time."""

    def submit(self, pixels_nSS3: np.ndarray) -> Future[np.ndarray]:
        """Returns a code for each image."""
        future: Future[np.ndarray] = Future()
        future.set_result(np.zeros((len(pixels_nSS3), 1), np.uint16))
        return future


def main(config: ConfigDict) -> None:
    """Prints the rates. Exits with code 1 if the bound is missed."""
    if config.frames % N_FRAMES:
        raise UserError(f"--frames={config.frames}: must be a multiple of {N_FRAMES}")
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory(dir=config.directory or None))
        workers = stack.enter_context(Workers(config.workers))
        pool = stack.enter_context(ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn")))
        parts = [os.path.join(root, str(turn)) for turn in range(TURNS + 1)]
        for turn, part in enumerate(parts):
            write_files(part, config.workers if turn == TURNS else len(range(turn, config.files, TURNS)), config.frames)
        seconds, frames = np.zeros(2), 0
        for turn in (TURNS, *range(TURNS)):  # the first one starts the processes
            begin = time.perf_counter()
            paths = [f"{parts[turn]}/{name}" for name in sorted(os.listdir(parts[turn]))]
            decoded = sum(pool.map(functools.partial(decode_alone, size=config.size), paths))
            middle = time.perf_counter()
            built = read_as_build(parts[turn], workers, config.size)
            assert built == decoded == len(paths) * config.frames, f"{built} of {decoded} frames"
            if turn < TURNS:
                frames += decoded
                seconds += middle - begin, time.perf_counter() - middle
    alone, build = config.files / seconds
    ratio = build / alone
    print(f"{config.files} files of {config.frames} frames {WIDTH}x{HEIGHT}, {config.workers} processes")
    print(f"PyAV alone: {alone:.1f} files/s, {frames / seconds[0]:.0f} frames/s")
    print(f"a build: {build:.1f} files/s, {frames / seconds[1]:.0f} frames/s")
    print(f"ratio: {ratio:.2f} (required: at least {LEAST_RATIO}) {'ok' if ratio >= LEAST_RATIO else 'MISSED'}")
    sys.exit(0 if ratio >= LEAST_RATIO else 1)


def write_files(folder: str, count: int, frames: int) -> None:
    """Writes videos of a moving texture."""
    os.makedirs(folder)
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (HEIGHT // 8, (WIDTH + frames * 4) // 8 + 1, 3)).astype(np.uint8)
    wide = np.asarray(Image.fromarray(coarse).resize((WIDTH + frames * 4, HEIGHT), Image.Resampling.BICUBIC))
    for number in range(count):
        with av.open(f"{folder}/{number}.mp4", "w") as container:
            stream = container.add_stream("libx264", rate=RATE)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            stream.options = {"preset": "veryfast", "crf": str(20 + number % 5)}
            for i in range(frames):
                pixels = np.ascontiguousarray(wide[:, 4 * i : 4 * i + WIDTH])
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = i, fractions.Fraction(1, RATE)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


def decode_alone(path: str, size: int) -> int:
    """Decodes a file to resized frames with PyAV and Pillow. Returns their number."""
    count = 0
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for frame in container.decode(video=0):
            image = Image.fromarray(frame.to_ndarray(format="rgb24", threads=1))
            np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
            count += 1
    return count


def read_as_build(folder: str, workers: Workers, size: int) -> int:
    """Reads the sentences of a folder as `tokenizer.build` does. Returns the number of images."""
    skipped = SkippedInputs(0)
    settings = SentenceSettings(0, 1, 1, N_FRAMES, 1, (1,), 0.5)
    index = FileIndex(file_index.by_name, [LocalFolder(folder, "input_dir", videos.VIDEO_EXTENSIONS)], skipped)
    data_set = DataSet("video", samplers.SingleItems(index, settings), settings)
    read = functools.partial(image_ref.read, size=size)
    cache = CodeCache(0, 1, tempfile.gettempdir())
    sentences = compose([data_set], in_order(range(len(index))), workers, skipped)
    places = 6 * BATCH + workers.processes * IMAGES_PER_READ
    with SharedResults(workers, read, (size, size, 3), places) as pixels:
        pipeline = Pipeline(pixels.submit, NoEncoder(), cache, BATCH, 6 * BATCH, workers.processes)  # type: ignore[arg-type]
        return sum(len(codes) for _, codes in pipeline.run(sentences))


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
