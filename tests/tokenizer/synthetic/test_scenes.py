"""Annotations of rendered scenes agree with the image and the geometry. A scene is a function of its seed."""

import dataclasses

import numpy as np
import pytest

from tokenizer.synthetic import SPLITS, layouts, scenes
from tokenizer.synthetic.geometry import Solid, trace
from tokenizer.synthetic.layouts import NEW_SHAPES, SHAPES

SIZE = 48
SEEDS = range(20, 28)


@pytest.fixture(scope="module")
def rendered():
    return {seed: scenes.scene(seed, SIZE) for seed in SEEDS}


def test_scene_has_an_image_and_every_annotation(rendered):
    for scene in rendered.values():
        assert set(scene) == {"image", *scenes.ANNOTATIONS}
        assert all(view.shape == (SIZE, SIZE, 3) and view.dtype == np.uint8 for view in scene.values())


def test_scene_is_a_function_of_its_seed(rendered):
    again = scenes.scene(20, SIZE)
    assert all(np.array_equal(again[name], rendered[20][name]) for name in again)
    assert not np.array_equal(rendered[20]["image"], rendered[21]["image"])


def test_segmentation_has_the_colours_of_its_palette_only(rendered):
    palette = {scenes.BACKGROUND, *scenes.PALETTE.values()}
    seen = {tuple(colour) for scene in rendered.values() for colour in scene["segmentation"].reshape(-1, 3).tolist()}
    assert seen <= palette
    assert len(seen) >= 4  # several shapes among these seeds


def test_segmentation_and_depth_agree_with_the_empty_room(rendered):
    """A pixel belongs to a solid where the room without solids is farther away."""
    for seed in SEEDS:
        layout = layouts.seeded_layout(seed)
        empty = scenes.render(dataclasses.replace(layout, solids=()), 0, SIZE)
        solid = np.any(rendered[seed]["segmentation"] != np.array(scenes.BACKGROUND, np.uint8), axis=-1)
        nearer = rendered[seed]["depth"][..., 0].astype(int) - empty["depth"][..., 0]
        assert solid.any()
        assert np.all(nearer[~solid] == 0)
        assert np.all(nearer[solid] >= 0)
        assert np.mean(nearer[solid] > 0) > 0.9  # where a solid meets the floor, the difference rounds to zero
        assert np.array_equal(rendered[seed]["normals"][~solid], empty["normals"][~solid])


def test_edges_are_exactly_the_boundaries(rendered):
    for scene in rendered.values():
        edge = scene["edges"][..., 0] > 0
        for axis in (0, 1):
            differs = np.any(np.diff(scene["segmentation"].astype(int), axis=axis) != 0, axis=-1)
            a, b = (np.take(edge, range(start, SIZE - 1 + start), axis=axis) for start in (0, 1))
            assert np.all(a[differs] & b[differs])
        flat = np.ones_like(edge)  # no edge where all four neighbours have the pixel's class and normal
        for axis in (0, 1):
            for name in ("segmentation", "normals"):
                same = np.all(np.diff(scene[name].astype(int), axis=axis) == 0, axis=-1)
                pad = [(0, 0), (0, 0)]
                pad[axis] = (1, 0)
                flat &= np.pad(same, pad, constant_values=True)
                pad[axis] = (0, 1)
                flat &= np.pad(same, pad, constant_values=True)
        assert not np.any(edge & flat)


def test_normals_are_unit_vectors_towards_the_camera(rendered):
    for scene in rendered.values():
        vectors = scene["normals"] / 127.5 - 1
        assert np.allclose(np.linalg.norm(vectors, axis=-1), 1, atol=0.02)
        assert vectors[..., 2].min() > -0.35  # perspective: the angle can slightly exceed 90 degrees near the border


def test_clip_begins_with_the_scene_and_moves():
    frames = scenes.clip(20, SIZE, 4)
    assert np.array_equal(frames[0]["image"], scenes.scene(20, SIZE)["image"])
    assert not np.array_equal(frames[0]["image"], frames[3]["image"])


@pytest.mark.parametrize("horizon", [8, 16])
def test_solids_do_not_collide(horizon):
    for seed in range(30):
        layout = layouts.random_layout(np.random.default_rng(seed), layouts.Style(horizon=horizon))
        for frame in range(horizon):
            solids = [solid.at(frame) for solid in layout.solids]
            for i, a in enumerate(solids):
                for b in solids[:i]:
                    assert np.hypot(*(a.position - b.position)) > a.radius + b.radius


def test_splits_differ_from_training_scenes():
    def shapes(split):
        return {solid.shape for seed in range(40) for solid in layouts.seeded_layout(seed, split).solids}

    assert shapes("scenes") == set(layouts.SHAPES)
    assert shapes("shapes") == set(layouts.NEW_SHAPES)
    for new in layouts.NEW_COLOURS:  # the brightness of a training colour varies by 0.85 to 1.1
        unit = new / np.linalg.norm(new)
        factors = layouts.COLOURS @ unit
        assert np.linalg.norm(layouts.COLOURS - factors[:, None] * unit, axis=-1).min() > 10
    training, backgrounds = SPLITS["scenes"], SPLITS["backgrounds"]
    brightest = backgrounds.brightness[1] * (1 - backgrounds.tint[0])
    assert brightest < training.brightness[0] * (1 - training.tint[1])


@pytest.mark.parametrize("shape", [*SHAPES, *NEW_SHAPES])
def test_rays_hit_solids_on_their_surface(shape):
    """Each hit lies within the solid's bounding box, and its normal is a unit vector that faces the ray."""
    solid = Solid(shape, np.zeros(2), 0.8, 1.6, 0.3, np.ones(3), np.zeros(2), 0.0)
    rays = np.random.default_rng(0).normal(0, 0.12, (400, 3)) + np.array([0, -0.35, -1.0])
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    hits = trace([solid], np.broadcast_to(np.array([0.0, 2.2, 4.0]), rays.shape), rays)
    hit = hits.solid == 0
    points = np.array([0.0, 2.2, 4.0]) + hits.distance[hit, None] * rays[hit]
    assert 100 < hit.sum() < 400
    assert np.all(np.hypot(points[:, 0], points[:, 2]) < 0.8 * np.sqrt(2)) and np.all(points[:, 1] > -1e-6)
    assert np.all(points[:, 1] < 1.6 + 1e-6)
    assert np.allclose(np.linalg.norm(hits.normal[hit], axis=-1), 1)
    assert np.all(np.sum(hits.normal[hit] * rays[hit], axis=-1) < 1e-6)
