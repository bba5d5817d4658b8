"""Views (gray, masked, label colours, CO3D depth) equal independent references."""

import itertools
import pathlib

import numpy as np
import pytest
from build_kit import SIDE, assert_codes_of, build_records, read_rgb, stem
from PIL import Image
from tokenizer_kit import write_image

from EasyLM.errors import UserError
from tokenizer.builders import image_ref, views


def test_label_ids_become_colours_of_the_voc_palette(tree, tiny, codec, tmp_path):
    def voc(label):
        colour = [0, 0, 0]
        for i in range(8):
            for channel in range(3):
                colour[channel] |= (label >> (3 * i + channel) & 1) << (7 - i)
        return colour

    assert [voc(i) for i in (0, 1, 2, 15, 255)] == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [224, 224, 192]
    ]  # fmt: skip  # the palette of VOC2012
    for tokens, record in build_records(tree, tiny, tmp_path / "out.jsonl", "map_color"):
        assert record["views"] == ["plain", "palette"] * 2
        expected = []
        for image, label in zip(record["sources"][0::2], record["sources"][1::2]):
            assert stem(image) == stem(label)
            with Image.open(label) as image_file:
                ids = np.asarray(image_file.resize((SIDE, SIDE), Image.Resampling.NEAREST)).astype(int)
            expected += [read_rgb(image), np.array([[voc(i) for i in row] for row in ids], np.uint8)]
        assert_codes_of(codec, tokens, expected)


def test_label_ids_are_gray_values_or_palette_indices_but_not_rgb(tmp_path):
    ids = np.array([[0, 1], [2, 7]], np.uint8)
    image = Image.fromarray(ids, "P")
    image.putpalette([200] * 768)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(views.label_ids(tmp_path / "a.png", 4), ids.repeat(2, 0).repeat(2, 1))
    write_image(tmp_path / "b.png", 0)
    with pytest.raises(UserError, match=r"b\.png: .*RGB, not label ids"):
        views.label_ids(tmp_path / "b.png", 4)
    assert len(np.unique(views.label_colours(np.arange(1 << 16)), axis=0)) == 1 << 16


def test_colorization_is_gray_then_colour(tree, tiny, codec, tmp_path):
    sentences = build_records(tree, tiny, tmp_path / "out.jsonl", "colorization")
    assert len(sentences) == 4
    for tokens, record in sentences:
        assert record["views"] == ["gray", "plain"] * 2 and record["sources"][0::2] == record["sources"][1::2]
        expected = []
        for path in record["sources"][1::2]:
            colour = read_rgb(path)
            light = 0.2989 * colour[..., 0] + 0.5870 * colour[..., 1] + 0.1140 * colour[..., 2]
            expected += [np.stack([np.round(light).astype(np.uint8)] * 3, axis=-1), colour]
        assert_codes_of(codec, tokens, expected)


def test_inpainting_is_masked_then_whole(tree, tiny, codec, tmp_path):
    masks = []
    for tokens, record in build_records(tree, tiny, tmp_path / "out.jsonl", "inpainting"):
        sentence = image_ref.from_record(record)
        expected = []
        for masked, whole in zip(sentence[0::2], sentence[1::2]):
            assert masked.path == whole.path and whole.view == "plain"
            masks.append(masked.view)
            pixels = read_rgb(whole.path).copy()
            pixels[_mask(masked.view, np.random.default_rng(int(masked.argument)))] = 0
            expected += [pixels, read_rgb(whole.path)]
        assert_codes_of(codec, tokens, expected)
    assert {*masks} == {"hole", "patches"}
    for ratio, view in {0.0: "patches", 1.0: "hole"}.items():
        sentences = build_records(tree, tiny, tmp_path / f"{view}.jsonl", "inpainting", hole_mask_ratio=ratio)
        assert {v.split(":")[0] for _, record in sentences for v in record["views"]} == {view, "plain"}


def _mask(view: str, rng) -> np.ndarray:
    """Returns the masked pixels as DATASET.md specifies them, from the same random numbers: bool [S,S]."""
    masked = np.zeros((SIDE, SIDE), bool)
    if view == "hole":
        side = round(rng.uniform(0.1, 0.5) * SIDE)  # 10 to 50% of the side
        top, left = rng.integers(0, SIDE - side + 1, 2)
        for row, column in itertools.product(range(side), repeat=2):
            masked[top + row, left + column] = True
        return masked
    order, dropped = rng.permutation(64), rng.integers(1, 64)
    for cell in np.flatnonzero(order < dropped):  # row by row, each 1/8 of the side
        top, left = cell // 8 * SIDE // 8, cell % 8 * SIDE // 8
        masked[top : top + SIDE // 8, left : left + SIDE // 8] = True
    return masked


def test_the_share_of_holes_is_the_mask_ratio(tree, tiny, tmp_path):
    sentences = build_records(tree, tiny, tmp_path / "out.jsonl", "inpainting", hole_mask_ratio=0.2, n_epochs=75)
    masks = [view.split(":")[0] for _, record in sentences for view in record["views"][0::2]]
    assert len(masks) == 300 and abs(masks.count("hole") / 300 - 0.2) < 4 * (0.2 * 0.8 / 300) ** 0.5


def test_masks_have_the_documented_sizes(tmp_path):
    size = 64
    Image.new("RGB", (size, size), "white").save(tmp_path / "white.png")
    sides, ratios, positions = set(), [], set()
    for key in range(200):
        masked = ~views.read("hole", tmp_path / "white.png", size, str(key), False).any(-1)
        rows, columns = np.flatnonzero(masked.any(1)), np.flatnonzero(masked.any(0))
        assert masked.sum() == len(rows) * len(columns) and len(rows) == len(columns) == np.ptp(rows) + 1
        sides.add(len(rows))
        positions.add((rows[0], columns[0]))
        dropped = ~views.read("patches", tmp_path / "white.png", size, str(key), False).any(-1)
        cells = dropped.reshape(8, 8, 8, 8).mean((1, 3))  # patches of 32 of 256 pixels: an eighth of the side
        assert np.isin(cells, (0, 1)).all() and 0 < cells.sum() < 64
        ratios.append(cells.mean())
    assert min(sides) in (6, 7) and max(sides) in (31, 32) and len(positions) > 150
    assert min(ratios) < 0.1 and max(ratios) > 0.9 and 0.4 < np.mean(ratios) < 0.6


def test_co3d_is_image_mask_and_depth_of_each_frame(tree, tiny, codec, tmp_path):
    sentences = build_records(tree, tiny, tmp_path / "out.jsonl", "co3d")
    assert len(sentences) == 2
    for tokens, record in sentences:
        assert [pathlib.Path(path).parent.name for path in record["sources"]] == ["images", "masks", "depths"] * 2
        assert record["views"] == ["plain", "plain", "co3d_depth"] * 2
        expected = []
        for image, mask, depth in zip(*(record["sources"][i::3] for i in range(3))):
            assert stem(image) == stem(mask) == stem(depth)
            expected += [read_rgb(image), read_rgb(mask), _reference_depth(depth)]
        assert_codes_of(codec, tokens, expected)


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
