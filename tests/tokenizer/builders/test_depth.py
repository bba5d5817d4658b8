"""Depth maps keep their 16 bits until `--depth_range` scales them, and label ids are those of the file."""

import numpy as np
import pytest
from build_kit import SIDE, assert_codes_of, build_records, read_rgb
from PIL import Image
from tokenizer_kit import write_image

from EasyLM.errors import UserError
from evaluation.tasks.tasks import folder_pairs
from tokenizer.builders import views

NEAR, FAR = 500.0, 900.0
DEPTH = np.linspace(500, 900, SIDE * SIDE).round().reshape(SIDE, SIDE)  # 400 levels of 16 bits: 256 brightnesses
DEPTH[0, :3] = 0, 499, 5000  # no measurement, nearer than white, farther than black


def expected_brightness() -> np.ndarray:
    brightness = np.round(255 * np.clip((FAR - DEPTH) / (FAR - NEAR), 0, 1)).astype(np.uint8)
    brightness[0, :3] = 0, 255, 0
    return brightness[..., None].repeat(3, -1)


@pytest.mark.parametrize(("name", "kind"), [("a.png", np.uint16), ("a.tif", np.uint16), ("a.tif", np.float32)])
def test_depth_is_scaled_from_all_its_bits(tmp_path, name, kind):
    Image.fromarray(DEPTH.astype(kind)).save(tmp_path / name)
    shown = views.depth(tmp_path / name, SIDE, NEAR, FAR)
    np.testing.assert_array_equal(shown, expected_brightness())
    assert len(np.unique(shown)) > 200  # 8 bits of 0..65535 would have two levels
    inverted = views.depth(tmp_path / name, SIDE, FAR, NEAR)
    assert inverted[5, 5, 0] == 255 - shown[5, 5, 0] and inverted[0, 0, 0] == 0


def test_a_range_in_another_unit_is_refused_by_name(tmp_path):
    Image.fromarray(DEPTH.astype(np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: .*depths are 499 to 5000, all outside the range 0.5 to 10"):
        views.depth(tmp_path / "a.png", SIDE, 0.5, 10)
    Image.fromarray(np.full((SIDE, SIDE), np.nan, np.float32)).save(tmp_path / "b.tif")
    assert not views.depth(tmp_path / "b.tif", SIDE, 0.5, 10).any()  # no measurement at all


def test_a_build_and_a_task_scale_depth_annotations(tmp_path, tiny, codec):
    for name in "abc":
        write_image(tmp_path / "image" / f"{name}.png", ord(name), SIDE)
        (tmp_path / "label").mkdir(exist_ok=True)
    Image.fromarray(DEPTH.astype(np.uint16)).save(tmp_path / "label" / "a.png")
    Image.fromarray(DEPTH.astype(np.float32)).save(tmp_path / "label" / "b.tif")
    Image.fromarray(expected_brightness()).save(tmp_path / "label" / "c.png")  # is an image already
    (record,) = build_records(
        tmp_path, tiny, tmp_path / "out.jsonl", "paired", n_shots=3, depth_range="500,900", n_epochs=1
    )
    assert record[1]["views"] == ["plain", "depth:500,900"] * 3
    expected = [pixels for path in record[1]["sources"][::2] for pixels in (read_rgb(path), expected_brightness())]
    assert_codes_of(codec, record[0], expected)
    task = folder_pairs(str(tmp_path / "image"), str(tmp_path / "label"), "depth_abs_rel", "500,900")
    for pair in task.pairs:
        np.testing.assert_array_equal(pair.target(SIDE), expected_brightness())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "paired", "depth_range": "5"}, "--depth_range=5: must be near,far"),
        ({"kind": "images", "depth_range": "1,2"}, "--depth_range=1,2: --kind=images has no annotations"),
        ({"kind": "map_color", "depth_range": "1,2"}, "--depth_range=1,2: --kind=map_color has no annotations"),
    ],
)
def test_invalid_ranges_are_refused(tree, tiny, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        build_records(tree, tiny, tmp_path / "out.jsonl", **settings)
