"""Folders of pictures to a JSONL file of visual sentences: `python -m tokenizer.build --kind=K ...`; see DATASET.md.

    python -m tokenizer.build --kind=paired --input_dir=data/image --target_dir=data/depth --output_file=depth.jsonl

Every picture is encoded once; then its kind's function (sentences.py) says who follows whom. Shapes: N tokens an image.
"""

import collections
import concurrent.futures
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from tqdm import tqdm

from EasyLM import records
from EasyLM.errors import UserError
from EasyLM.flags import Flag, run
from tokenizer import images, sentences
from tokenizer.codec import CODEC_FLAGS, Codec

Paths = tuple[pathlib.Path, ...]

FLAGS = {
    "kind": Flag("images", "The sentences to make.", choices=tuple(sentences.KINDS)),
    "input_dir": Flag("", "Folder of pictures (folders below it included); for frames: of folders, one a clip."),
    "target_dir": Flag("", "paired: folder of the labels, matched by stem (the path without its extension)."),
    "output_file": Flag("", "The JSONL file to write; it appears when it is whole."),
    "n_shots": Flag(8, "paired: pairs of a sentence."),
    "n_epochs": Flag(1, "paired, frames: how often all pairs or clips are gone through, each time in another way."),
    "n_frames": Flag(16, "frames: pictures of a sentence."),
    "max_stride": Flag(1, "frames: the largest random step from one frame to the next."),
    "seed": Flag(0, "Of every random choice."),
    "max_errors": Flag(0, "Skip up to so many broken or unmatched inputs, each named; one more is an error."),
    "workers": Flag(os.cpu_count() or 1, "Threads that open pictures."),
    **CODEC_FLAGS,
}


class Problems:
    """Inputs that cannot be used: named as they are met, an error once there are more than allowed."""

    def __init__(self, allowed: int):
        self.allowed, self.count = allowed, 0

    def add(self, messages: list[str]) -> None:
        """Raises UserError if these are too many; else names each on standard error."""
        self.count += len(messages)
        if self.count > self.allowed:
            more = f", and {len(messages) - 3} more like it" if len(messages) > 3 else ""
            hint = f"--max_errors={self.allowed}; a higher one skips such inputs"
            raise UserError(f"{'; '.join(messages[:3])}{more} ({hint})")
        for message in messages:
            tqdm.write(f"skipped: {message}", file=sys.stderr)


def main(config) -> None:
    """Builds the file and prints what it holds."""
    _check(config)
    problems = Problems(config.max_errors)
    items = COLLECTORS[config.kind](config, problems)
    codec = Codec(config.vqgan, config.dtype, config.batch_size)
    paths = sorted({path for item in items for path in item})
    codes_by_path = encode_files(codec, paths, config, problems)
    readable = [path for path in paths if path in codes_by_path]
    number = {path: i for i, path in enumerate(readable)}
    usable = [tuple(number[path] for path in item) for item in items if all(path in number for path in item)]
    composed = sentences.KINDS[config.kind](usable, np.random.default_rng(config.seed), config)
    count = _write(config, composed, readable, codes_by_path, codec.config.num_embeddings)
    dropped = f", {problems.count} inputs skipped" if problems.count else ""
    print(f"{config.output_file}: {count} sentences of {len(readable)} pictures{dropped}")


def _check(config) -> None:
    for name in ("input_dir", "output_file", *(["target_dir"] if config.kind == "paired" else [])):
        if not config[name]:
            raise UserError(f"--{name} is missing: --kind={config.kind} needs it")
    for name in ("n_shots", "n_epochs", "n_frames", "max_stride", "workers"):
        if config[name] < 1:
            raise UserError(f"--{name}={config[name]}: must be at least 1")
    if os.path.isdir(config.output_file):
        raise UserError(f"--output_file={config.output_file}: is a folder")


def collect_pictures(config, problems: Problems) -> list[Paths]:
    """Each picture of the folder by itself."""
    return [(path,) for path in images.find(config.input_dir, "input_dir")]


def collect_pairs(config, problems: Problems) -> list[Paths]:
    """(image, label) of each stem that both folders have; the others are problems."""
    sides = []
    for flag in ("input_dir", "target_dir"):
        sides.append(images.stems(images.find(config[flag], flag), config[flag], flag))
    lone = [
        f"{mine[stem]} has no partner in --{flag}={config[flag]}"
        for mine, other, flag in ((sides[0], sides[1], "target_dir"), (sides[1], sides[0], "input_dir"))
        for stem in sorted(mine.keys() - other.keys())
    ]
    if lone:
        problems.add(lone)
    return [(sides[0][stem], sides[1][stem]) for stem in sorted(sides[0].keys() & sides[1].keys())]


def collect_clips(config, problems: Problems) -> list[Paths]:
    """The pictures of each folder, by name order: a clip."""
    clips: dict[pathlib.Path, list[pathlib.Path]] = {}
    for path in images.find(config.input_dir, "input_dir"):
        clips.setdefault(path.parent, []).append(path)
    return [tuple(clips[folder]) for folder in sorted(clips)]


# What each kind of sentences.KINDS is made of.
COLLECTORS: dict[str, Callable[..., list[Paths]]] = {
    "images": collect_pictures,
    "paired": collect_pairs,
    "frames": collect_clips,
}


def encode_files(codec: Codec, paths: list[pathlib.Path], config, problems: Problems) -> dict[pathlib.Path, np.ndarray]:
    """Codes [N] of every readable picture (two bytes a token: a million pictures of 256 take half a gigabyte)."""

    def load(path):
        try:
            return images.load(path, codec.config.resolution)
        except UserError as error:
            return error

    codes: dict[pathlib.Path, np.ndarray] = {}
    batch: list[tuple[pathlib.Path, np.ndarray]] = []

    def flush():
        pixels = np.stack([pixels for _, pixels in batch])
        codes.update(zip((path for path, _ in batch), codec.encode(pixels).astype(np.uint16)))
        batch.clear()

    with (
        tqdm(total=len(paths), unit="image", desc="encoding") as bar,
        concurrent.futures.ThreadPoolExecutor(config.workers) as pool,
    ):
        for path, loaded in zip(paths, in_order(pool, load, paths, depth=2 * config.batch_size + config.workers)):
            bar.update()
            if isinstance(loaded, UserError):
                problems.add([str(loaded)])
                continue
            batch.append((path, loaded))
            if len(batch) == config.batch_size:
                flush()
        if batch:
            flush()
    if not codes:
        raise UserError(f"--input_dir={config.input_dir}: not one readable picture")
    return codes


def in_order(pool, function: Callable, inputs: Iterable, depth: int) -> Iterator:
    """`function` of each input, in order, computed by the pool at most `depth` ahead of what is taken."""
    waiting: collections.deque = collections.deque()
    for value in inputs:
        waiting.append(pool.submit(function, value))
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _write(config, composed: Iterable, paths: list[pathlib.Path], codes_by_path: dict, num_codes: int) -> int:
    temporary = f"{config.output_file}.tmp"
    os.makedirs(os.path.dirname(config.output_file) or ".", exist_ok=True)
    count = 0
    try:
        with open(temporary, "wb") as file:
            for sentence in composed:
                tokens = np.concatenate([codes_by_path[paths[i]] for i in sentence]).astype(np.int32)
                records.check_ids(tokens, num_codes)
                sources = [str(paths[i]) for i in sentence]
                file.write(records.record_line(tokens, kind=config.kind, sources=sources))
                count += 1
        os.replace(temporary, config.output_file)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return count


if __name__ == "__main__":
    run(main, FLAGS)
