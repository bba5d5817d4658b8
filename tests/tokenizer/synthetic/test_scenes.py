"""Rendered scenes: the annotations say exactly what the picture shows, and all of it follows from the seed."""

import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tokenizer_kit import run_main

from tokenizer import render
from tokenizer.builders import views
from tokenizer.synthetic import photos, scenes

SIZE = 48
SEEDS = range(20, 28)
SECONDS = 60  # far more than anything here takes


@pytest.fixture(scope="module")
def drawn():
    return {seed: scenes.scene(seed, SIZE) for seed in SEEDS}


def test_a_scene_has_a_picture_and_every_annotation(drawn):
    for scene in drawn.values():
        assert set(scene) == {"image", *scenes.ANNOTATIONS}
        assert all(part.shape == (SIZE, SIZE, 3) and part.dtype == np.uint8 for part in scene.values())


def test_a_seed_says_all_and_another_seed_something_else(drawn):
    again = scenes.scene(20, SIZE)
    assert all(np.array_equal(again[name], drawn[20][name]) for name in again)
    assert not np.array_equal(drawn[20]["image"], drawn[21]["image"])


def test_segmentation_has_only_the_colours_of_its_palette(drawn):
    palette = {scenes.BACKGROUND, *scenes.PALETTE.values()}
    seen = {tuple(colour) for scene in drawn.values() for colour in scene["segmentation"].reshape(-1, 3).tolist()}
    assert seen <= palette
    assert len(seen) >= 4  # several shapes among these seeds


def test_a_solid_is_where_the_scene_without_it_is_farther(drawn):
    """Segmentation and depth against a second rendering: of the empty room."""
    for seed in SEEDS:
        layout = scenes.arrange(np.random.default_rng([seed, 7]))
        empty = scenes.draw(scenes.Scene((), layout.floor, layout.wall, layout.checks, layout.light), 0, SIZE)
        solid = np.any(drawn[seed]["segmentation"] != np.array(scenes.BACKGROUND, np.uint8), axis=-1)
        nearer = drawn[seed]["depth"][..., 0].astype(int) - empty["depth"][..., 0]
        assert solid.any()
        assert np.all(nearer[~solid] == 0)
        assert np.all(nearer[solid] >= 0)
        assert np.mean(nearer[solid] > 0) > 0.9  # where a solid meets the floor, the difference rounds to none
        assert np.array_equal(drawn[seed]["normals"][~solid], empty["normals"][~solid])


def test_edges_lie_on_boundaries_and_all_boundaries_have_them(drawn):
    for scene in drawn.values():
        edge = scene["edges"][..., 0] > 0
        for axis in (0, 1):
            names = np.any(np.diff(scene["segmentation"].astype(int), axis=axis) != 0, axis=-1)
            one, other = (np.take(edge, range(start, SIZE - 1 + start), axis=axis) for start in (0, 1))
            assert np.all(one[names] & other[names])
        flat = np.ones_like(edge)  # a pixel whose four neighbours have its class and its normal is no edge
        for axis in (0, 1):
            for name in ("segmentation", "normals"):
                same = np.all(np.diff(scene[name].astype(int), axis=axis) == 0, axis=-1)
                pad = [(0, 0), (0, 0)]
                pad[axis] = (1, 0)
                flat &= np.pad(same, pad, constant_values=True)
                pad[axis] = (0, 1)
                flat &= np.pad(same, pad, constant_values=True)
        assert not np.any(edge & flat)


def test_normals_are_unit_vectors_towards_the_camera(drawn):
    for scene in drawn.values():
        vectors = scene["normals"] / 127.5 - 1
        assert np.allclose(np.linalg.norm(vectors, axis=-1), 1, atol=0.02)
        assert vectors[..., 2].min() > -0.35  # perspective: near the rim a little beyond the right angle


def test_clips_begin_with_the_scene_and_move_and_solids_never_meet():
    frames = scenes.clip(20, SIZE, 4)
    assert np.array_equal(frames[0]["image"], scenes.scene(20, SIZE)["image"])
    assert not np.array_equal(frames[0]["image"], frames[3]["image"])
    for seed in range(30):
        layout = scenes.arrange(np.random.default_rng([seed, 7]))
        for frame in range(8):
            solids = [solid.at(frame) for solid in layout.solids]
            for i, one in enumerate(solids):
                for other in solids[:i]:
                    assert np.hypot(*(one.place - other.place)) > one.radius + other.radius


def test_splits_hold_what_no_training_scene_has():
    def solids(split):
        layouts = (scenes.arrange(np.random.default_rng([seed, 7]), style=scenes.SPLITS[split]) for seed in range(40))
        return [solid for layout in layouts for solid in layout.solids], [*layouts]

    assert {solid.shape for solid in solids("scenes")[0]} == set(scenes.SHAPES)
    assert {solid.shape for solid in solids("shapes")[0]} == set(scenes.NEW_SHAPES)
    for one in scenes.NEW_COLOURS:  # a training colour varies by 0.85 to 1.1 in brightness: none meets a new one
        unit = one / np.linalg.norm(one)
        factors = scenes.COLOURS @ unit
        assert np.linalg.norm(scenes.COLOURS - factors[:, None] * unit, axis=-1).min() > 10
    brightest = scenes.SPLITS["backgrounds"].brightness[1] * (1 - scenes.SPLITS["backgrounds"].tint[0])
    assert brightest < scenes.SPLITS["scenes"].brightness[0] * (1 - scenes.SPLITS["scenes"].tint[1])


@pytest.mark.parametrize("shape", [*scenes.SHAPES, *scenes.NEW_SHAPES])
def test_every_solid_is_met_on_its_surface_by_a_ray_at_right_side(shape):
    """A fan of rays: each hit lies within the solid's box, its normal is a unit vector that faces the ray."""
    solid = scenes.Solid(shape, np.zeros(2), 0.8, 1.6, 0.3, np.ones(3), np.zeros(2), 0.0)
    rays = np.random.default_rng(0).normal(0, 0.12, (400, 3)) + np.array([0, -0.35, -1.0])
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    hits = scenes.trace([solid], np.broadcast_to(np.array([0.0, 2.2, 4.0]), rays.shape), rays)
    met = hits.solid == 0
    points = np.array([0.0, 2.2, 4.0]) + hits.distance[met, None] * rays[met]
    assert 100 < met.sum() < 400
    assert np.all(np.hypot(points[:, 0], points[:, 2]) < 0.8 * np.sqrt(2)) and np.all(points[:, 1] > -1e-6)
    assert np.all(points[:, 1] < 1.6 + 1e-6)
    assert np.allclose(np.linalg.norm(hits.normal[met], axis=-1), 1)
    assert np.all(np.sum(hits.normal[met] * rays[met], axis=-1) < 1e-6)


def test_photographs_crop_to_any_size_and_held_out_ones_are_apart():
    assert not set(photos.TRAINING) & set(photos.HELD_OUT)
    crop = photos.crop(3, 40)
    assert crop.shape == (40, 40, 3) and crop.std() > 5
    assert np.array_equal(crop, photos.crop(3, 40))
    gray = views.gray(crop)
    assert np.all(gray == gray[..., :1])
    assert np.all(np.abs(gray[..., 0] - (0.2989 * crop[..., 0] + 0.587 * crop[..., 1] + 0.114 * crop[..., 2])) <= 0.5)


def test_recoloured_photographs_change_their_hues(tmp_path):
    crops = [photos.crop(seed, 40) for seed in range(40)]
    others = [photos.recoloured(crop, seed) for seed, crop in enumerate(crops)]
    assert np.array_equal(others[0], photos.recoloured(crops[0], 0))
    colourful = [np.ptp(crop.astype(int), axis=-1).mean() > 20 for crop in crops]
    assert 10 < sum(colourful) < 40
    for crop, other, has_colour in zip(crops, others, colourful, strict=True):
        assert other.shape == crop.shape and other.dtype == np.uint8
        changed = np.abs(other.astype(int) - crop).mean()
        assert changed > 1 if has_colour else changed < 40
    settings = {"num": 0, "num_photos": 2, "size": 24, "workers": 1, "recolour_photos": True}
    run_main(render, output_dir=str(tmp_path), **settings)
    drawn = np.asarray(Image.open(tmp_path / "photo_color" / "000001.png"))
    assert np.array_equal(drawn, photos.recoloured(photos.crop(1, 24), 1))


def test_render_writes_matching_stems(tmp_path):
    run_main(render, output_dir=str(tmp_path), num=2, num_photos=1, num_clips=1, clip_frames=3, size=24, workers=1)
    for name in ("image", *scenes.ANNOTATIONS):
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["000000.png", "000001.png"]
    for name in ("photo_gray", "photo_color"):
        assert [path.name for path in (tmp_path / name).iterdir()] == ["000000.png"]
    assert len(list((tmp_path / "frames" / "000000").iterdir())) == 3


def test_render_writes_a_tree_for_every_kind_of_sentence(tmp_path):
    settings = {"num": 4, "num_clips": 1, "clip_frames": 2, "size": 24, "workers": 1, "layouts": True}
    run_main(render, output_dir=str(tmp_path), **settings)
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    sequence = "co3d/scene/000000"
    assert {name for name in found if name.split("/")[0] not in ("image", *scenes.ANNOTATIONS)} == {
        *(f"labels/{i:06d}.png" for i in range(4)),
        *(f"classes/{shape}/{i:06d}.png" for i, shape in enumerate(scenes.SHAPES)),
        *(f"{name}/000000/{i:03d}.png" for name in ("frames", "frames_depth") for i in range(2)),
        *(f"{sequence}/images/frame{i:06d}.jpg" for i in (1, 2)),
        *(f"{sequence}/{name}/frame{i:06d}.png" for name in ("masks", "depth_masks") for i in (1, 2)),
        *(f"{sequence}/depths/frame{i:06d}.jpg.geometric.png" for i in (1, 2)),
        "videos/000000.mp4",
    }
    for i in range(4):
        drawn = scenes.scene(i, 24)["segmentation"]
        ids = views.label_ids(tmp_path / "labels" / f"{i:06d}.png", 24)
        table = np.array([scenes.BACKGROUND, *(scenes.PALETTE[shape] for shape in scenes.SHAPES)])
        assert np.array_equal(table[ids], drawn) and ids.max() > 0
    # Brighter where nearer, as the scene's own depth; both go from the nearest to the farthest point.
    own = scenes.clip(0, 24, 1)[0]["depth"][..., 0].astype(float)
    stored = views.co3d_depth(tmp_path / sequence / "depths" / "frame000001.jpg.geometric.png", 24)[..., 0]
    expected = 255 * (0.2 + 0.8 * (own - own.min()) / np.ptp(own))
    assert np.abs(stored - expected).max() < 1.5


@pytest.mark.slow
def test_renderings_processes_end_with_it_when_it_is_killed(tmp_path):
    """They hold the error stream open, so it ends when the last of them does."""
    command = [sys.executable, "-m", "tokenizer.render", f"--output_dir={tmp_path}", "--num=100000", "--workers=2"]
    renderer = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + SECONDS
    while not list(tmp_path.glob("image/*.png")):
        assert time.monotonic() < deadline and renderer.poll() is None
        time.sleep(0.05)
    renderer.kill()
    renderer.communicate(timeout=SECONDS)
