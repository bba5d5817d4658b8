"""Mutated files by the thousand: none ends a build, and none that cannot be used goes without being named."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image
from tokenizer_kit import TINY, run_main, smooth_picture, tiny_vqgan

from EasyLM import records
from tokenizer import build, videos

FORMATS = {
    "png": {},
    "jpg": {"quality": 90},
    "gif": {},
    "webp": {},
    "bmp": {},
    "tif": {"compression": "tiff_lzw"},
    "ppm": {},
}


def mutations(whole: bytes, rng, count: int):
    """Bytes changed, cut off, doubled, or swapped."""
    for i in range(count):
        data = bytearray(whole)
        place = int(rng.integers(len(data)))
        if i % 4 == 0:
            for spot in rng.integers(0, len(data), rng.integers(1, 9)):
                data[spot] = rng.integers(256)
        elif i % 4 == 1:
            del data[place:]
        elif i % 4 == 2:
            data[place:place] = data[place : place + int(rng.integers(1, 60))]
        else:  # where the headers are
            data[int(rng.integers(min(len(data), 60)))] = rng.integers(256)
        yield bytes(data)


def every_input_is_used_or_named(root, tiny, **settings):
    run_main(build, input_dir=str(root), output_file=f"{root}.jsonl", vqgan=tiny, max_errors=10**6, **settings)
    used = {path for _, r in records.read_records(f"{root}.jsonl", TINY.num_embeddings) for path in r["sources"]}
    report = json.loads(pathlib.Path(f"{root}.jsonl.report.json").read_text())
    named = {entry["input"]: entry["reason"] for entry in report["skipped"]}
    assert all(reason.startswith(path) and "\n" not in reason for path, reason in named.items())
    assert used | named.keys() == {str(path) for path in root.iterdir()}
    return used, named


@pytest.mark.slow
def test_mutated_pictures(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for name, options in FORMATS.items():
        Image.fromarray(smooth_picture(0, 24)).save(tmp_path / f"whole.{name}", **options)
        whole = (tmp_path / f"whole.{name}").read_bytes()
        for i, data in enumerate(mutations(whole, rng, 250)):
            (tmp_path / "in" / f"{name}_{i}.{name}").write_bytes(data)
    used, named = every_input_is_used_or_named(
        tmp_path / "in", tiny_vqgan(tmp_path / "vqgan"), kind="images", workers=2
    )
    assert len(used) > 100 and len(named) > 500 and used.isdisjoint(named)


@pytest.mark.slow
def test_mutated_videos(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    frames = np.stack([smooth_picture(i, 32) for i in range(8)])
    videos.write(tmp_path / "whole.mp4", frames, fps=8)
    for i, data in enumerate(mutations((tmp_path / "whole.mp4").read_bytes(), rng, 250)):
        (tmp_path / "in" / f"{i}.mp4").write_bytes(data)
    tiny = tiny_vqgan(tmp_path / "vqgan")
    used, named = every_input_is_used_or_named(tmp_path / "in", tiny, kind="video", n_frames=4, workers=2)
    assert len(used) > 10 and len(named) > 100  # some are both: one of their two windows is sound
