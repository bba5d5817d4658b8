"""Thousands of mutated files: none stops a build, and reports name every unusable one."""

import base64
import gzip
import json
import pathlib

import numpy as np
import pytest
import zstandard
from PIL import Image
from tokenizer_kit import TINY, run_main, smooth_image, tiny_vqgan
from video_kit import write_video

from EasyLM import flags
from EasyLM.data import records
from EasyLM.data.dataset import DATASET_FLAGS, make_dataset
from EasyLM.errors import UserError
from tokenizer import build, mix

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
    """Yields copies with changed, removed or repeated bytes, or a changed header."""
    for i in range(count):
        data = bytearray(whole)
        position = int(rng.integers(len(data)))
        if i % 4 == 0:
            for index in rng.integers(0, len(data), rng.integers(1, 9)):
                data[index] = rng.integers(256)
        elif i % 4 == 1:
            del data[position:]
        elif i % 4 == 2:
            data[position:position] = data[position : position + int(rng.integers(1, 60))]
        else:  # in the header
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
def test_mutated_images(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for name, options in FORMATS.items():
        Image.fromarray(smooth_image(0, 24)).save(tmp_path / f"whole.{name}", **options)
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
    for name, codec in {"mp4": "mpeg4", "webm": "libvpx-vp9", "mkv": "mpeg4", "avi": "mjpeg"}.items():
        write_video(tmp_path / f"whole.{name}", codec, range(0, 8 * 125, 125))
        for i, data in enumerate(mutations((tmp_path / f"whole.{name}").read_bytes(), rng, 62)):
            (tmp_path / "in" / f"{i}.{name}").write_bytes(data)
    tiny = tiny_vqgan(tmp_path / "vqgan")
    used, named = every_input_is_used_or_named(tmp_path / "in", tiny, kind="video", n_frames=4, workers=2)
    assert len(used) > 10 and len(named) > 100  # a file with one good and one bad window is in both


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_mutated_compressed_files(tmp_path, ending):
    """Each file is mixed without a changed sentence, or rejected by name."""
    rng = np.random.default_rng(0)
    lines = [records.record_line(rng.integers(0, 512, 40), number=i) for i in range(50)]
    pack = gzip.compress if ending == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress
    path, refused = tmp_path / f"mutated.jsonl{ending}", 0
    for data in mutations(pack(b"".join(lines)), rng, 100):
        path.write_bytes(data)
        try:
            run_main(mix, inputs=str(path), output_file=str(tmp_path / "out.jsonl"), vocab_size=512)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert set((tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)) <= set(lines)
    assert refused > 50


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["map_color", "co3d"])
def test_mutated_labels_and_depths(tmp_path, kind):
    """Label and depth images of 16 bits have their own reader. Each is in a sentence or reported by name."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(0x3C00, 0x4400, (12, 16)).astype(np.uint16)  # as float16: 1 to 4
    Image.fromarray(numbers).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    sequence = tmp_path / "in" / "apple" / "1"
    mutated = {}
    for i, data in enumerate(mutations(whole, rng, 120)):
        name = f"frame{i:06d}"
        if kind == "co3d":
            for folder, ending in {"images": "jpg", "masks": "png", "depth_masks": "png"}.items():
                (sequence / folder).mkdir(parents=True, exist_ok=True)
                Image.new("L", (16, 12), 1).save(sequence / folder / f"{name}.{ending}")
            mutated[sequence / "depths" / f"{name}.jpg.geometric.png"] = data
        else:
            (tmp_path / "in").mkdir(exist_ok=True)
            Image.fromarray(smooth_image(i, 16)).save(tmp_path / "in" / f"{name}.png")
            mutated[tmp_path / "labels" / f"{name}.png"] = data
    for path, data in mutated.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    settings = {"n_frames": 1} if kind == "co3d" else {"n_shots": 1, "target_dir": str(tmp_path / "labels")}
    output, tiny = tmp_path / "out.jsonl", tiny_vqgan(tmp_path / "vqgan")
    settings |= {"input_dir": str(tmp_path / "in"), "output_file": str(output), "max_errors": 10**6, "workers": 1}
    run_main(build, kind=kind, vqgan=tiny, **settings)
    used = {path for _, r in records.read_records(str(output), TINY.num_embeddings) for path in r["sources"]}
    named = {entry["input"] for entry in json.loads(pathlib.Path(f"{output}.report.json").read_text())["skipped"]}
    depths = set(map(str, mutated))
    assert used.isdisjoint(named) and (used & depths) | named == depths
    assert len(used & depths) > 3 and len(named) > 20


def is_record(line: bytes, vocab_size: int) -> bool:
    """Returns whether the line is a record, using only the standard library."""
    try:
        ids = np.frombuffer(base64.b64decode(json.loads(line)["tokens"], validate=True), "<i4")
    except (ValueError, KeyError, TypeError):  # ValueError includes UnicodeDecodeError and binascii.Error
        return False
    return not ids.size or (ids.min() >= 0 and ids.max() < vocab_size)


def test_mutated_lines(tmp_path, capsys):
    rng = np.random.default_rng(0)
    whole = records.record_line(rng.integers(0, 512, 40), kind="paired", sources=["a.png", "b.png"]).rstrip()
    lines = [line.replace(b"\n", b" ") for line in mutations(whole, rng, 2000)]
    lines = [line for line in lines if line.strip()]  # blank lines are skipped
    path = tmp_path / "mutated.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    good = [line for line in lines if is_record(line, 512)]
    assert len(good) > 50 and len(lines) - len(good) > 500

    run_main(mix, inputs=str(path), output_file=str(tmp_path / "out.jsonl"), vocab_size=512, max_errors=10**6)
    assert sorted((tmp_path / "out.jsonl").read_bytes().splitlines()) == sorted(good)
    named = [line.split(": ")[1] for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert named == [f"{path}:{n}" for n, line in enumerate(lines, start=1) if not is_record(line, 512)]

    config = flags.defaults(DATASET_FLAGS)
    config.text_processor.fields = "{tokens}"
    config.json_dataset.update(path=str(path), seq_length=8, batch_size=1, skip_bad_lines=True)
    rows = make_dataset(config, None, 512)
    assert rows.skipped_lines == len(named)
    assert rows.num_tokens == sum(len(records.read_record(line, 512)[0]) for line in good)
