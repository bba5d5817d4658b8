"""Sentences of every kind: what stands where, against references made here; the same bytes whatever stops or splits."""

import collections
import errno
import functools
import io
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest
from PIL import Image
from tokenizer_kit import TINY, run_main, tiny_vqgan, write_image
from tqdm import tqdm
from video_kit import number_of, numbered_frame

from EasyLM.data import records
from EasyLM.errors import UserError
from tokenizer import build
from tokenizer.builders import image_ref, resumable_file
from tokenizer.builders.kinds import KINDS
from tokenizer.media import video_writer
from tokenizer.vqgan import PRETRAINED, Codec

N, SIDE = TINY.tokens_per_image, TINY.resolution
CLASSES = {"ant": 5, "bee": 4, "cat": 2, "dog": 3}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_vqgan(tmp_path_factory.mktemp("vqgan"))


CODEC = functools.cache(Codec)  # loading takes longer than a build of these sizes


@pytest.fixture(autouse=True)
def load_once(monkeypatch):
    monkeypatch.setattr(build, "Codec", CODEC)


@pytest.fixture
def codec(tiny):
    return CODEC(tiny, "fp32", 8)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A small input for every kind, which no test changes; the labels have other extensions than their images."""
    root = tmp_path_factory.mktemp("inputs")
    for i in range(5):
        write_image(root / "image" / f"{i}.png", i)
        write_image(root / "label" / f"{i}.BMP", 100 + i)
        write_image(root / "other" / f"{i}.webp", 200 + i)
        (root / "ids").mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 300, (20, 24)).astype(np.uint16)).save(
            root / "ids" / f"{i}.png"
        )
    # Unpadded numbers: frame 10 comes after frame 9.
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
    return root


def _write_co3d_frame(sequence, i):
    write_image(sequence / "images" / f"frame{i:06d}.jpg", 400 + i, size=24)
    rng = np.random.default_rng(i)
    depth = (2 + rng.random((12, 16))).astype(np.float16)
    depth[0, :4] = 0, np.inf, np.nan, 60000  # none of them a depth: the last one is outside the mask
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


# By kind: where in `tree` its inputs are, and settings.
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


def make(tree, tiny, output, kind, **changes):
    """The records of a build of that kind."""
    settings = {"seed": 5, "batch_size": 8, "workers": 1, "cache_pictures": 64, **SETTINGS[kind], **changes}
    for flag in ("input_dir", "target_dir"):
        if settings.get(flag):
            settings[flag] = ",".join(os.path.join(tree, part) for part in settings[flag].split(","))
    run_main(build, kind=kind, output_file=str(output), vqgan=tiny, **settings)
    return list(records.read_records(str(output), TINY.num_embeddings))


def report_of(output) -> dict:
    return json.loads(pathlib.Path(f"{output}.report.json").read_text())


def plain(path, side=SIDE) -> np.ndarray:
    """A picture file at the tokenizer's size, by Pillow alone: bytes [S,S,3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))


def check(codec, tokens, expected) -> None:
    """The tokens are those of these pictures, bytes."""
    codes = codec.encode(np.stack(expected).astype(np.float32) / 255)
    np.testing.assert_array_equal(tokens.reshape(-1, N), codes)
    assert len(np.unique(codes, axis=0)) > 1 or len(expected) == 1  # else order would not show


def stem(path: str) -> str:
    return pathlib.Path(path).name.split(".")[0]


def test_every_kind_is_tested():
    assert SETTINGS.keys() == KINDS.keys()


def test_images_are_one_sentence_each_in_name_order(tree, tiny, codec, tmp_path):
    found = make(tree, tiny, tmp_path / "out.jsonl", "images")
    assert [record["sources"] for _, record in found] == [[str(tree / "image" / f"{i}.png")] for i in range(5)]
    for tokens, record in found:
        check(codec, tokens, [plain(path) for path in record["sources"]])
        assert record["kind"] == "images" and record.keys() == {"tokens", "kind", "sources"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "paired", "multi_dataset", "category", "frames", "multi_sequence"])
def test_sentences_decode_to_their_pictures(tree, tmp_path, kind):
    """With a tokenizer that was trained, what a place holds looks more like its picture than like another one."""
    shipped = CODEC(PRETRAINED, "fp32", 8)
    settings = {"seed": 5, "batch_size": 8, "workers": 1, **SETTINGS[kind]}
    for flag in ("input_dir", "target_dir"):
        settings[flag] = ",".join(str(tree / part) for part in settings.get(flag, "").split(",") if part)
    run_main(build, kind=kind, output_file=str(tmp_path / "out.jsonl"), vqgan=PRETRAINED, **settings)
    found = list(records.read_records(str(tmp_path / "out.jsonl"), shipped.config.num_embeddings))
    paths = sorted({path for _, record in found for path in record["sources"]})
    references = np.stack([plain(path, shipped.config.resolution) for path in paths]).astype(np.float32) / 255
    for tokens, record in found:
        drawn = shipped.decode(tokens.reshape(-1, shipped.config.tokens_per_image))
        distance = np.mean((drawn[:, None] - references[None]) ** 2, axis=(2, 3, 4))
        assert [paths[i] for i in distance.argmin(axis=1)] == record["sources"]


def test_pairs_are_each_image_and_its_own_label(tree, tiny, codec, tmp_path):
    found = make(tree, tiny, tmp_path / "out.jsonl", "paired")
    assert len(found) == 4  # two epochs of five pairs, two pairs a sentence
    for tokens, record in found:
        folders = [pathlib.Path(path).parent.name for path in record["sources"]]
        stems = [stem(path) for path in record["sources"]]
        assert folders == ["image", "label"] * 2 and stems[0::2] == stems[1::2]
        check(codec, tokens, [plain(path) for path in record["sources"]])
    for epoch in (found[:2], found[2:]):
        used = [path for _, record in epoch for path in record["sources"]]
        assert len(set(used)) == 8
    assert [r["sources"] for _, r in found[:2]] != [r["sources"] for _, r in found[2:]]


def test_label_ids_become_colours_of_the_voc_palette(tree, tiny, codec, tmp_path):
    def voc(label):
        colour = [0, 0, 0]
        for i in range(8):
            for channel in range(3):
                colour[channel] |= (label >> (3 * i + channel) & 1) << (7 - i)
        return colour

    assert [voc(i) for i in (0, 1, 2, 15, 255)] == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [224, 224, 192]
    ]  # fmt: skip  # as VOC2012 has them
    for tokens, record in make(tree, tiny, tmp_path / "out.jsonl", "map_color"):
        assert record["views"] == ["plain", "palette"] * 2
        expected = []
        for image, label in zip(record["sources"][0::2], record["sources"][1::2]):
            assert stem(image) == stem(label)
            with Image.open(label) as opened:
                ids = np.asarray(opened.resize((SIDE, SIDE), Image.Resampling.NEAREST)).astype(int)
            expected += [plain(image), np.array([[voc(i) for i in row] for row in ids], np.uint8)]
        check(codec, tokens, expected)


def test_label_ids_of_palette_files_are_numbers_and_colours_are_refused(tmp_path):
    ids = np.array([[0, 1], [2, 7]], np.uint8)
    image = Image.fromarray(ids, "P")
    image.putpalette([200] * 768)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(image_ref.label_ids(tmp_path / "a.png", 4), ids.repeat(2, 0).repeat(2, 1))
    write_image(tmp_path / "b.png", 0)
    with pytest.raises(UserError, match=r"b\.png: .*RGB, no label ids"):
        image_ref.label_ids(tmp_path / "b.png", 4)
    assert len(np.unique(image_ref.colours(np.arange(1 << 16)), axis=0)) == 1 << 16


def test_modalities_come_in_one_drawn_order_a_sentence(tree, tiny, codec, tmp_path):
    orders = set()
    for tokens, record in make(tree, tiny, tmp_path / "out.jsonl", "multi_dataset"):
        folders = [pathlib.Path(path).parent.name for path in record["sources"]]
        assert sorted(folders[:3]) == ["image", "label", "other"] and folders[3:] == folders[:3]
        assert len({stem(path) for path in record["sources"][:3]}) == 1
        orders.add(tuple(folders[:3]))
        check(codec, tokens, [plain(path) for path in record["sources"]])
    assert len(orders) > 2


def test_colorization_is_gray_then_colour(tree, tiny, codec, tmp_path):
    found = make(tree, tiny, tmp_path / "out.jsonl", "colorization")
    assert len(found) == 4
    for tokens, record in found:
        assert record["views"] == ["gray", "plain"] * 2 and record["sources"][0::2] == record["sources"][1::2]
        expected = []
        for path in record["sources"][1::2]:
            colour = plain(path)
            light = 0.2989 * colour[..., 0] + 0.5870 * colour[..., 1] + 0.1140 * colour[..., 2]
            expected += [np.stack([np.round(light).astype(np.uint8)] * 3, axis=-1), colour]
        check(codec, tokens, expected)


def test_inpainting_is_masked_then_whole(tree, tiny, codec, tmp_path):
    views = []
    for tokens, record in make(tree, tiny, tmp_path / "out.jsonl", "inpainting"):
        sentence = image_ref.of_record(record)
        expected = []
        for masked, whole in zip(sentence[0::2], sentence[1::2]):
            assert masked.path == whole.path and whole.view == "plain"
            views.append(masked.view)
            pixels = plain(whole.path).copy()
            pixels[_masked(masked.view, np.random.default_rng(masked.key))] = 0
            expected += [pixels, plain(whole.path)]
        check(codec, tokens, expected)
    assert {*views} == {"hole", "patches"}
    for ratio, view in {0.0: "patches", 1.0: "hole"}.items():
        found = make(tree, tiny, tmp_path / f"{view}.jsonl", "inpainting", hole_mask_ratio=ratio)
        assert {v.split(":")[0] for _, record in found for v in record["views"]} == {view, "plain"}


def _masked(view: str, rng) -> np.ndarray:
    """Which pixels are masked, as DATASET.md has it, of the draws that the code makes: bool [S,S]."""
    lost = np.zeros((SIDE, SIDE), bool)
    if view == "hole":
        side = round(rng.uniform(0.1, 0.5) * SIDE)  # 10 to 50% of the side
        top, left = rng.integers(0, SIDE - side + 1, 2)
        for row, column in itertools.product(range(side), repeat=2):
            lost[top + row, left + column] = True
        return lost
    order, dropped = rng.permutation(64), rng.integers(1, 64)
    for cell in np.flatnonzero(order < dropped):  # row by row, each 1/8 of the side
        top, left = cell // 8 * SIDE // 8, cell % 8 * SIDE // 8
        lost[top : top + SIDE // 8, left : left + SIDE // 8] = True
    return lost


def test_holes_come_as_often_as_asked(tree, tiny, tmp_path):
    found = make(tree, tiny, tmp_path / "out.jsonl", "inpainting", hole_mask_ratio=0.2, n_epochs=75)
    views = [view.split(":")[0] for _, record in found for view in record["views"][0::2]]
    assert len(views) == 300 and abs(views.count("hole") / 300 - 0.2) < 4 * (0.2 * 0.8 / 300) ** 0.5


def test_masks_are_squares_of_the_sizes_documented(tmp_path):
    size = 64
    Image.new("RGB", (size, size), "white").save(tmp_path / "white.png")
    sides, ratios, places = set(), [], set()
    for key in range(200):
        lost = ~image_ref.VIEWS["hole"](tmp_path / "white.png", size, key).any(-1)
        rows, columns = np.flatnonzero(lost.any(1)), np.flatnonzero(lost.any(0))
        assert lost.sum() == len(rows) * len(columns) and len(rows) == len(columns) == np.ptp(rows) + 1
        sides.add(len(rows))
        places.add((rows[0], columns[0]))
        dropped = ~image_ref.VIEWS["patches"](tmp_path / "white.png", size, key).any(-1)
        cells = dropped.reshape(8, 8, 8, 8).mean((1, 3))  # patches of 32 of 256 pixels: an eighth of the side
        assert np.isin(cells, (0, 1)).all() and 0 < cells.sum() < 64
        ratios.append(cells.mean())
    assert min(sides) in (6, 7) and max(sides) in (31, 32) and len(places) > 150
    assert min(ratios) < 0.1 and max(ratios) > 0.9 and 0.4 < np.mean(ratios) < 0.6


def test_categories_are_distinct_classes_of_fresh_pictures(tree, tiny, codec, tmp_path):
    found = make(tree, tiny, tmp_path / "out.jsonl", "category")
    # An epoch: round one has all four classes, round two the two that have four pictures.
    assert len(found) == 2 * 3
    for epoch in (found[:3], found[3:]):
        used = [path for _, record in epoch for path in record["sources"]]
        assert len(set(used)) == len(used) == 12
    for tokens, record in found:
        names = [pathlib.Path(path).parent.name for path in record["sources"]]
        assert names[0] == names[1] != names[2] == names[3]
        check(codec, tokens, [plain(path) for path in record["sources"]])


def windows_of(record, count):
    """(clip, frame numbers) of the sources."""
    clips = {pathlib.Path(path).parent for path in record["sources"]}
    assert len(record["sources"]) == count and len(clips) == 1
    return clips.pop().name, [int(stem(path).removeprefix("frame_")) for path in record["sources"]]


def test_frames_are_windows_at_one_stride_in_numeric_order(tree, tiny, codec, tmp_path):
    strides = collections.Counter()
    found = make(tree, tiny, tmp_path / "out.jsonl", "frames")
    for tokens, record in found:
        clip, numbers = windows_of(record, 3)
        (step,) = set(np.diff(numbers))
        strides[clip, int(step)] += 1
        check(codec, tokens, [plain(path) for path in record["sources"]])
    assert strides.keys() == {("a", 1), ("a", 2), ("b", 1)}  # b is too short for a stride of 2
    assert strides["b", 1] == 3 and strides["a", 1] % 3 == 0 and strides["a", 2] % 2 == 0  # all that fit into 11


def test_video_frames_are_windows_of_each_stride(tree, tiny, codec, tmp_path):
    found = make(tree, tiny, tmp_path / "out.jsonl", "video")
    strides = collections.Counter()
    for tokens, record in found:
        (path,) = set(record["sources"])
        numbers = np.round(np.array(record["seconds"]) * 10).astype(int)  # 10 frames a second
        (step,) = set(np.diff(numbers))
        strides[pathlib.Path(path).name, int(step)] += 1
        with av.open(path) as container:  # not by the code under test
            whole = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert [number_of(frame / 255) for frame in whole] == list(range(len(whole)))
        sized = [Image.fromarray(whole[i]).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for i in numbers]
        check(codec, tokens, [np.asarray(frame) for frame in sized])
    assert strides == {("one.mp4", 1): 3, ("one.mp4", 2): 1, ("two.MP4", 1): 1, ("two.MP4", 2): 1}


def test_aligned_sequences_come_task_by_task_and_interleaved(tree, tiny, codec, tmp_path):
    found = make(tree, tiny, tmp_path / "out.jsonl", "multi_sequence")
    assert len(found) == 2 * (3 + 1)
    for (_, apart), (_, mixed) in zip(found[0::2], found[1::2]):
        folders = [pathlib.Path(path).parts[-3] for path in apart["sources"]]
        assert folders == ["clips1"] * 3 + ["clips2"] * 3
        assert mixed["sources"] == [path for pair in zip(apart["sources"][:3], apart["sources"][3:]) for path in pair]
        numbers = [int(stem(path).removeprefix("frame_")) for path in apart["sources"]]
        assert numbers[:3] == numbers[3:] == list(range(numbers[0], numbers[0] + 3))
    for tokens, record in found:
        check(codec, tokens, [plain(path) for path in record["sources"]])


def test_co3d_is_image_mask_and_depth_of_each_frame(tree, tiny, codec, tmp_path):
    found = make(tree, tiny, tmp_path / "out.jsonl", "co3d")
    assert len(found) == 2
    for tokens, record in found:
        assert [pathlib.Path(path).parent.name for path in record["sources"]] == ["images", "masks", "depths"] * 2
        assert record["views"] == ["plain", "plain", "co3d_depth"] * 2
        expected = []
        for image, mask, depth in zip(*(record["sources"][i::3] for i in range(3))):
            assert stem(image) == stem(mask) == stem(depth)
            expected += [plain(image), plain(mask), _reference_depth(depth)]
        check(codec, tokens, expected)


def _reference_depth(path):
    with Image.open(path) as opened:
        metres = np.asarray(opened).astype(np.uint16).view(np.float16).astype(float)
    mask = pathlib.Path(path).parent.parent / "depth_masks" / f"{stem(path)}.png"
    with Image.open(mask) as opened:
        valid = np.asarray(opened) > 0
    row, column = (np.floor((np.arange(SIDE) + 0.5) * extent / SIDE).astype(int) for extent in metres.shape)
    metres, valid = metres[np.ix_(row, column)], valid[np.ix_(row, column)]
    valid &= (metres > 0) & (metres < 10)
    near, far = metres[valid].min(), metres[valid].max()
    bright = np.where(valid, 1 - 0.8 * (metres - near) / (far - near), 0)
    assert valid.any() and not valid.all() and np.isfinite(near) and far < 3.1
    return np.round(255 * bright).astype(np.uint8)[..., None].repeat(3, -1)


@pytest.mark.parametrize("kind", ["paired", "video", "inpainting"])
def test_shards_stand_one_behind_the_other_in_the_whole(tree, tiny, tmp_path, kind):
    make(tree, tiny, tmp_path / "whole.jsonl", kind)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for count in (2, 3, 9):
        parts = [tmp_path / f"{i}.jsonl" for i in range(count)]
        for i, part in enumerate(parts):
            make(tree, tiny, part, kind, shard=f"{i}/{count}")
        assert b"".join(part.read_bytes() for part in parts) == whole


class Killed(BaseException):
    """Nothing may catch it, as nothing catches SIGKILL."""


def kill_at(patch, last, real=resumable_file.ResumableFile.write) -> list[bytes]:
    """Builds die from now on in their line `last`, of which half reaches the disk. The list takes the lines before."""
    written = []

    def write(file, data):
        if len(written) == last and data:
            real(file, data[: len(data) // 2])
            file._file.flush()
            raise Killed
        real(file, data)
        written.extend([data] if data else [])

    patch.setattr(resumable_file.ResumableFile, "write", write)
    return written


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["video", "category"])
def test_a_broken_input_changes_no_byte_with_shards_and_workers(tree, tiny, tmp_path, monkeypatch, kind):
    """It is named the same way, and left out, by the whole, by its parts, and by a build that was killed."""
    folder = SETTINGS[kind]["input_dir"]
    shutil.copytree(tree / folder, tmp_path / folder)
    broken = tmp_path / folder / {"video": "one.mp4", "category": "bee/1.jpg"}[kind]
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 3])
    files = {}
    for workers in (1, 2):
        settings = {"workers": workers, "max_errors": 1}
        whole = tmp_path / f"whole{workers}.jsonl"
        make(tmp_path, tiny, whole, kind, **settings)
        assert skipped(whole).keys() == {broken.name}
        parts = [tmp_path / f"{workers}_{i}.jsonl" for i in range(3)]
        for i, part in enumerate(parts):
            make(tmp_path, tiny, part, kind, **settings, shard=f"{i}/3")
        files[workers] = whole.read_bytes()
        assert files[workers] and b"".join(part.read_bytes() for part in parts) == files[workers]
        with monkeypatch.context() as patch:
            patch.setattr(resumable_file, "MARK_SECONDS", 0)
            kill_at(patch, 1)
            again = tmp_path / f"again{workers}.jsonl"
            with pytest.raises(Killed):
                make(tmp_path, tiny, again, kind, **settings)
        make(tmp_path, tiny, again, kind, **settings)
        assert again.read_bytes() == files[workers] and skipped(again) == skipped(whole)
    assert files[1] == files[2]


def test_a_file_depends_on_the_seed_and_on_nothing_that_is_about_speed(tree, tiny, tmp_path):
    settings = {"kind": "inpainting", "n_epochs": 2}
    make(tree, tiny, tmp_path / "a.jsonl", **settings)
    first = (tmp_path / "a.jsonl").read_bytes()
    for name, changes in {"b": {"batch_size": 16, "workers": 2}, "c": {"batch_size": 1, "cache_pictures": 1}}.items():
        make(tree, tiny, tmp_path / f"{name}.jsonl", **settings, **changes)
        assert (tmp_path / f"{name}.jsonl").read_bytes() == first
    make(tree, tiny, tmp_path / "d.jsonl", **settings, seed=6)
    assert (tmp_path / "d.jsonl").read_bytes() != first


@pytest.mark.parametrize("kind", ["paired", "multi_sequence", "video"])
def test_a_killed_build_goes_on_to_the_same_bytes(tree, tiny, tmp_path, monkeypatch, kind):
    make(tree, tiny, tmp_path / "whole.jsonl", kind)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = whole.count(b"\n")
    monkeypatch.setattr(resumable_file, "MARK_SECONDS", 0)
    real = resumable_file.ResumableFile.write
    for last in range(lines):
        written = kill_at(monkeypatch, last)
        output = tmp_path / f"{last}.jsonl"
        with pytest.raises(Killed):
            make(tree, tiny, output, kind)
        assert not output.exists()
        assert pathlib.Path(f"{output}.partial").stat().st_size > len(b"".join(written))
        again = []
        monkeypatch.setattr(
            resumable_file.ResumableFile, "write", lambda f, data, again=again: (again.append(data), real(f, data))
        )
        make(tree, tiny, output, kind)
        assert output.read_bytes() == whole
        assert len([data for data in again if data]) == lines - last  # none was made twice
        for name in ("sentences", "pictures"):
            assert report_of(output)[name] == report_of(tmp_path / "whole.jsonl")[name]
        assert {path.name for path in tmp_path.glob(f"{last}.*")} == {output.name, f"{output.name}.report.json"}


def test_a_stopped_build_is_not_continued_with_other_settings_or_inputs(tree, tiny, tmp_path, monkeypatch):
    for i in range(5):
        write_image(tmp_path / "in" / f"{i}.png", i)
    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(resumable_file, "MARK_SECONDS", 0)
    (tmp_path / "in" / "3.png").write_bytes(b"broken")
    settings = {"kind": "images", "input_dir": str(tmp_path / "in")}
    with pytest.raises(UserError, match=r"3\.png: not a readable image.*max_errors=0"):
        make(tree, tiny, output, **settings)
    with pytest.raises(UserError, match=r"out\.jsonl\.partial was begun .* seed=6 \(then: 5\)"):
        make(tree, tiny, output, **settings, seed=6)
    assert len(make(tree, tiny, output, **settings, max_errors=1)) == 4  # goes on: it decides no sentence
    write_image(tmp_path / "in" / "3.png", 3)
    (tmp_path / "in" / "4.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"4\.png: not"):
        make(tree, tiny, output, **settings)
    write_image(tmp_path / "in" / "4.png", 4)
    with pytest.raises(UserError, match=r"other settings or inputs: inputs=\w+ \(then: \w+\)"):
        make(tree, tiny, output, **settings)
    assert len(make(tree, tiny, output, **settings, fresh=True)) == 5


def test_the_time_left_after_a_resume_is_of_what_is_done_since(monkeypatch):
    with tqdm(file=io.StringIO(), mininterval=0) as bar:
        now = [bar.start_t]
        monkeypatch.setattr(bar, "_time", lambda: now[0])
        build._begin(bar, 900, 1000)
        now[0] += 10
        bar.update(5)
        assert "905/1000" in str(bar) and "00:10<03:10" in str(bar)


def test_a_whole_file_is_not_made_again_unless_something_changed(tree, tiny, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.jsonl"
    first = make(tree, tiny, output, "images")
    with monkeypatch.context() as patch:
        patch.setattr(build, "_build", lambda *_: pytest.fail("made again"))
        make(tree, tiny, output, "images", batch_size=4)
        assert "is whole already: 5 sentences" in capsys.readouterr().out
    output.write_bytes(output.read_bytes()[:-40])
    assert len(make(tree, tiny, output, "images")) == len(first)
    assert report_of(output)["files_passed_over"] == {}
    assert len(make(tree, tiny, output, "colorization")) == 4


# A build that marks each sentence. After as many as its first argument says it waits to be killed; 0: it ends.
BUILD = """
import sys, time
from EasyLM import flags
from tokenizer import build, resumable
left, mark = int(sys.argv.pop(1)), resumable.ResumableFile.mark
def mark_and_wait(*given):
    global left
    mark(*given)
    left -= 1
    if left == 0:
        time.sleep(3600)
resumable.MARK_SECONDS, resumable.ResumableFile.mark = 0, mark_and_wait
flags.run(build.main, build.FLAGS)
"""


@pytest.mark.slow
def test_sigkill_at_any_time(tree, tiny, tmp_path):
    """Real processes, killed after random times."""
    for i in range(150):
        write_image(tmp_path / "in" / f"{i}.png", i)

    def command(sentences, name):
        flags = ["--kind=colorization", f"--input_dir={tmp_path / 'in'}", "--n_shots=2", "--n_epochs=2", "--workers=2",
                 "--batch_size=4", f"--vqgan={tiny}", f"--output_file={tmp_path / name}"]  # fmt: skip
        return [sys.executable, "-c", BUILD, f"{sentences}", *flags]

    def done():
        progress = tmp_path / "out.jsonl.progress.json"
        return json.loads(progress.read_text())["state"]["sentences"] if progress.exists() else 0

    ended = subprocess.run(command(0, "whole.jsonl"), check=True, capture_output=True)
    assert b"150 sentences" in ended.stdout
    workers, rng = [], np.random.default_rng(0)
    for _ in range(3):
        goal = done() + rng.integers(1, 9)
        process = subprocess.Popen(command(40, "out.jsonl"), stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 240
            while done() < goal:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.001)
            workers += pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
    assert len(workers) >= 3 * 2
    subprocess.run(command(0, "out.jsonl"), check=True, capture_output=True)
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{worker}") for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [worker for worker in workers if os.path.exists(f"/proc/{worker}")], "they end with whom they work for"
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.fixture
def pairs(tmp_path):
    """Five images with labels, to be spoilt."""
    for i in range(5):
        write_image(tmp_path / "image" / f"{i}.png", i)
        write_image(tmp_path / "label" / f"{i}.png", 100 + i)
    return tmp_path


def skipped(output):
    return {pathlib.Path(entry["input"]).name: entry["reason"] for entry in report_of(output)["skipped"]}


def test_stems_without_partner_are_named_or_counted(pairs, tiny, capsys):
    write_image(pairs / "image" / "lone.png", 9)
    output = pairs / "out.jsonl"
    with pytest.raises(UserError, match=r"lone\.png has no partner in --target_dir"):
        make(pairs, tiny, output, "paired")
    assert not output.exists()
    assert len(make(pairs, tiny, output, "paired", max_errors=1)) == 4
    said = capsys.readouterr()
    assert "skipped:" in said.err and "1 inputs skipped" in said.out
    assert skipped(output).keys() == {"lone.png"}


def test_a_sentence_with_a_broken_picture_is_left_out_and_nothing_takes_its_place(pairs, tiny):
    before = make(pairs, tiny, pairs / "before.jsonl", "paired", n_epochs=4)
    broken = pairs / "label" / "2.png"
    broken.write_bytes(broken.read_bytes()[:90])
    output = pairs / "out.jsonl"
    with pytest.raises(UserError, match=r"2\.png: not a readable image"):
        make(pairs, tiny, output, "paired", n_epochs=4)
    assert not output.exists()
    found = make(pairs, tiny, output, "paired", n_epochs=4, max_errors=1)
    expected = [record["sources"] for _, record in before if str(broken) not in record["sources"]]
    assert [record["sources"] for _, record in found] == expected and len(expected) < len(before)
    report = report_of(output)
    assert report["sentences"] == len(expected) and report["sentences_left_out"] == len(before) - len(expected)
    assert "not a readable image" in skipped(output)["2.png"] and len(report["skipped"]) == 1


def test_short_and_broken_clips_are_named(tree, tiny, tmp_path, capsys):
    with pytest.raises(UserError, match=r"clips1/b: too short: 3 frames, 4 needed"):
        make(tree, tiny, tmp_path / "out.jsonl", "frames", n_frames=4)
    found = make(tree, tiny, tmp_path / "out.jsonl", "frames", n_frames=4, max_errors=1)
    assert {windows_of(record, 4)[0] for _, record in found} == {"a"}
    assert skipped(tmp_path / "out.jsonl").keys() == {"b"}
    with pytest.raises(UserError, match="not one sentence, 2 inputs skipped"):
        make(tree, tiny, tmp_path / "none.jsonl", "frames", n_frames=40, max_errors=2)
    (tmp_path / "videos").mkdir()
    whole = (tree / "videos" / "one.mp4").read_bytes()
    (tmp_path / "videos" / "a.mp4").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "videos" / "b.mp4").write_bytes((tree / "videos" / "two.MP4").read_bytes())
    (tmp_path / "videos" / "c.mp4").write_bytes(whole)
    make(tmp_path, tiny, tmp_path / "video.jsonl", "video", n_frames=6, strides="1", max_errors=2)
    assert skipped(tmp_path / "video.jsonl").keys() == {"a.mp4", "b.mp4"}
    assert "too short: 5 frames, 6 needed" in skipped(tmp_path / "video.jsonl")["b.mp4"]


def test_two_pictures_of_one_stem_are_named(pairs, tiny):
    write_image(pairs / "label" / "3.bmp", 9)
    with pytest.raises(UserError, match=r"3\.bmp and 3\.png share the stem '3'"):
        make(pairs, tiny, pairs / "out.jsonl", "paired")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("paired", {"input_dir": ""}, "--input_dir is missing"),
        ("paired", {"input_dir": "nowhere"}, "--input_dir=.*nowhere: no such folder"),
        ("paired", {"n_shots": 0}, "--n_shots=0: must be at least 1"),
        ("paired", {"n_shots": 6}, "--n_shots=6: only 5 are there"),
        ("paired", {"target_dir": ""}, "--target_dir is missing"),
        ("paired", {"target_dir": "label,other"}, "takes one folder"),
        ("category", {"n_shots": 5}, "--n_shots=5: only 4 classes have --images_per_shot=2 pictures"),
        ("category", {"input_dir": "image"}, r"\d\.png lies in no folder of a class"),
        ("video", {"strides": "1,two"}, "--strides=1,two: must be whole numbers with ',' between"),
        ("video", {"strides": "0"}, "--strides=0: each must be at least 1"),
        ("video", {"input_dir": "image"}, "--input_dir=.*image: contains no file with extension .mp4, "),
        ("images", {"shard": "2/2"}, "--shard=2/2: must be i/n"),
        ("inpainting", {"hole_mask_ratio": 1.5}, "--hole_mask_ratio=1.5: must be 0..1"),
        ("co3d", {"input_dir": "image"}, "not one sentence"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(tree, tiny, tmp_path, kind, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        make(tree, tiny, tmp_path / "out.jsonl", kind, **settings)
    assert "\n" not in str(caught.value) and not os.listdir(tmp_path)


def test_an_older_file_is_not_taken_for_one_that_lacks_only_its_name(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"

    def write(seed):
        file = resumable_file.ResumableFile(str(path), {"seed": seed}, fresh=False)
        if file.whole is None:
            file.write(b"seed %d\n" % seed)
            file.finish({})

    write(0)
    with monkeypatch.context() as patch:
        replace = os.replace

        def killed(source, target):
            if target == str(path):
                raise KeyboardInterrupt
            replace(source, target)

        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(1)
    assert path.read_bytes() == b"seed 0\n"
    write(1)
    assert path.read_bytes() == b"seed 1\n" and set(os.listdir(tmp_path)) == {"out.jsonl", "out.jsonl.report.json"}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_enough(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(resumable_file.fcntl, "flock", flock)
    file = resumable_file.ResumableFile(str(tmp_path / "out.jsonl"), {}, fresh=False)
    for line in (b"one\n", b"two\n"):
        file.write(line)
    file.finish({})
    assert (tmp_path / "out.jsonl").read_bytes() == b"one\ntwo\n"
    assert capsys.readouterr().err.count("out.jsonl: not locked against another build") == 1


def test_a_file_gets_its_name_before_another_build_can_lock_it(tmp_path, monkeypatch):
    path, real, refused = str(tmp_path / "out.jsonl"), os.replace, []
    first = resumable_file.ResumableFile(path, {}, fresh=False)
    first.write(b"a line\n")
    first.mark({})

    def replace(source, target):
        if target == path:
            with pytest.raises(UserError, match="another build is writing it"):
                resumable_file.ResumableFile(path, {}, fresh=False)
            refused.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    first.finish({})
    assert refused == [path]
    assert (tmp_path / "out.jsonl").read_bytes() == b"a line\n"


def test_two_builds_of_one_file_do_not_mix(tmp_path):
    path = str(tmp_path / "out.jsonl")
    first = resumable_file.ResumableFile(path, {"seed": 0}, fresh=False)
    first.write(b"one\n")
    first.mark({})
    with pytest.raises(UserError, match="another build is writing it"):
        resumable_file.ResumableFile(path, {"seed": 0}, fresh=False)
    second = resumable_file.ResumableFile(path, {"seed": 1}, fresh=True)
    with pytest.raises(UserError, match="another build is writing it"):
        second.write(b"two\n")
    first.write(b"three\n")
    first.finish({})
    assert (tmp_path / "out.jsonl").read_bytes() == b"one\nthree\n"
