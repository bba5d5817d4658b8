"""Small inputs for every kind of sentence, builds of them, and reference images and codes."""

import functools
import itertools
import json
import os
import pathlib

import numpy as np
from PIL import Image
from tokenizer_kit import TINY, run_main, write_image
from video_kit import numbered_frame

from EasyLM.data import records
from tokenizer import build
from tokenizer.builders.resumable_file import ResumableFile
from tokenizer.media import video_writer
from tokenizer.vqgan import Codec

N, SIDE = TINY.tokens_per_image, TINY.resolution

CLASSES = {"ant": 5, "bee": 4, "cat": 2, "dog": 3}  # images of each class

load_codec = functools.cache(Codec)  # loading takes longer than a build of this size


def write_inputs(root: pathlib.Path) -> None:
    """Writes a small input for every kind. Labels and images have different extensions."""
    for i in range(5):
        write_image(root / "image" / f"{i}.png", i)
        write_image(root / "label" / f"{i}.BMP", 100 + i)
        write_image(root / "other" / f"{i}.webp", 200 + i)
        (root / "ids").mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 300, (20, 24)).astype(np.uint16)).save(
            root / "ids" / f"{i}.png"
        )
    # The frame numbers are not padded: frame 10 follows frame 9.
    for (clip, length), seed in itertools.product({"a": 11, "b": 3}.items(), (1, 2)):
        for i in range(length):
            write_image(root / f"clips{seed}" / clip / f"frame_{i}.png", seed * 1000 + ord(clip) * 100 + i)
    for name, size in CLASSES.items():
        for i in range(size):
            write_image(root / "classes" / name / f"{i}.jpg", ord(name[0]) * 100 + i)
    (root / "videos").mkdir()
    for name, length in {"one.mp4": 9, "two.MP4": 5}.items():
        frames = np.stack([numbered_frame(i) for i in range(length)])
        video_writer.write(root / "videos" / name.lower(), frames, fps=10)
        (root / "videos" / name.lower()).rename(root / "videos" / name)
    for i in range(4):
        _write_co3d_frame(root / "co3d" / "apple" / "110_1", i)


def _write_co3d_frame(sequence, i):
    write_image(sequence / "images" / f"frame{i:06d}.jpg", 400 + i, size=24)
    rng = np.random.default_rng(i)
    depth = (2 + rng.random((12, 16))).astype(np.float16)
    depth[0, :4] = 0, np.inf, np.nan, 60000  # invalid depths; the mask excludes the last one
    valid = np.full((12, 16), 1, np.uint8)
    valid[0, 3] = valid[5] = 0
    mask = np.zeros((12, 16), np.uint8)
    mask[3:9, 4:12] = 255
    for folder, name, array in (
        ("depths", f"frame{i:06d}.jpg.geometric.png", depth.view(np.uint16)),
        ("depth_masks", f"frame{i:06d}.png", valid),
        ("masks", f"frame{i:06d}.png", mask),
    ):
        (sequence / folder).mkdir(exist_ok=True)
        Image.fromarray(array).save(sequence / folder / name)


# The flags of a small build of each kind. Folders are relative to those of `write_inputs`.
SETTINGS = {
    "images": {"input_dir": "image"},
    "paired": {"input_dir": "image", "target_dir": "label", "n_shots": 2, "n_epochs": 2},
    "map_color": {"input_dir": "image", "target_dir": "ids", "n_shots": 2},
    "multi_dataset": {"input_dir": "image", "target_dir": "label,other", "n_shots": 2, "n_epochs": 6},
    "colorization": {"input_dir": "image", "n_shots": 2, "n_epochs": 2},
    "inpainting": {"input_dir": "image", "n_shots": 2, "n_epochs": 3},
    "category": {"input_dir": "classes", "n_shots": 2, "images_per_shot": 2, "n_epochs": 2},
    "frames": {"input_dir": "clips1", "n_frames": 3, "max_stride": 2, "n_epochs": 3},
    "video": {"input_dir": "videos", "n_frames": 3, "strides": "1,2"},
    "multi_sequence": {"input_dir": "clips1", "target_dir": "clips2", "n_frames": 3},
    "co3d": {"input_dir": "co3d", "n_frames": 2},
}


def build_records(root, vqgan, output, kind, **changes) -> list[tuple[np.ndarray, dict]]:
    """Builds sentences of a kind; returns (ids, record) of each."""
    settings = {"seed": 5, "batch_size": 8, "workers": 1, "cache_pictures": 64, **SETTINGS[kind], **changes}
    for flag in ("input_dir", "target_dir"):
        if settings.get(flag):
            settings[flag] = ",".join(os.path.join(root, part) for part in settings[flag].split(","))
    run_main(build, kind=kind, output_file=str(output), vqgan=vqgan, **settings)
    return list(records.read_records(str(output), TINY.num_embeddings))


def report_of(output) -> dict:
    """Returns the report of a finished build."""
    return json.loads(pathlib.Path(f"{output}.report.json").read_text())


def skipped_names(output) -> dict[str, str]:
    """Returns the reasons of the skipped inputs by file name."""
    return {pathlib.Path(entry["input"]).name: entry["reason"] for entry in report_of(output)["skipped"]}


def read_rgb(path, side=SIDE) -> np.ndarray:
    """Reads an image file at the tokenizer's size with Pillow alone: uint8 [S,S,3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))


def assert_codes_of(codec, tokens, expected) -> None:
    """Asserts that the tokens are the codes of the expected images, each uint8 [S,S,3]."""
    codes = codec.encode(np.stack(expected).astype(np.float32) / 255)
    np.testing.assert_array_equal(tokens.reshape(-1, N), codes)
    assert len(np.unique(codes, axis=0)) > 1 or len(expected) == 1  # otherwise the order is not tested


def stem(path: str) -> str:
    """Returns a file's name up to its first dot."""
    return pathlib.Path(path).name.split(".")[0]


class Killed(BaseException):
    """Simulates SIGKILL: `except Exception` does not catch it."""


def kill_at_line(patch, last, write_line=ResumableFile.write) -> list[bytes]:
    """Makes builds raise Killed after half of line `last`. Returns a list that collects the earlier lines."""
    written = []

    def write(file, data):
        if len(written) == last and data:
            write_line(file, data[: len(data) // 2])
            file._file.flush()
            raise Killed
        write_line(file, data)
        written.extend([data] if data else [])

    patch.setattr(ResumableFile, "write", write)
    return written


def clip_and_frames(record, count) -> tuple[str, list[int]]:
    """Returns the clip and the frame numbers of a record's sources."""
    clips = {pathlib.Path(path).parent for path in record["sources"]}
    assert len(record["sources"]) == count and len(clips) == 1
    return clips.pop().name, [int(stem(path).removeprefix("frame_")) for path in record["sources"]]
