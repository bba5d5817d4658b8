"""The pairs of a mapping agree with each other: a lookup in some of them reproduces the others."""

import numpy as np
import pytest

from tokenizer.builders import views
from tokenizer.mappings import mappings, steps
from tokenizer.mappings.mappings import Mapping
from tokenizer.synthetic import palette, scenes

SIZE = 32


@pytest.fixture(scope="module")
def rendered():
    return [steps.with_views(scenes.scene(seed, SIZE)) for seed in range(8)]


def make_pairs(mapping: Mapping, rendered, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [mapping.pair(scene, rng, SIZE) for scene in rendered]


def draws(family: str, count: int, split: str = mappings.TRAIN) -> list[Mapping]:
    rng = np.random.default_rng(3)
    return [mappings.draw(rng, family, split) for _ in range(count)]


def lookup(keys: np.ndarray, values: np.ndarray) -> dict[tuple, tuple]:
    """A table from each key [p,...] to its value [p,...]; fails if a key has two values."""
    table: dict[tuple, tuple] = {}
    for key, value in zip(keys.reshape(len(keys), -1).tolist(), values.reshape(len(values), -1).tolist()):
        assert table.setdefault(tuple(key), tuple(value)) == tuple(value)
    return table


@pytest.mark.parametrize("family", mappings.FAMILIES)
@pytest.mark.parametrize("split", mappings.SPLITS)
def test_pairs_are_images_and_functions_of_the_generator(family, split, rendered):
    for mapping in draws(family, 10, split):
        assert mapping.family == family
        pairs = make_pairs(mapping, rendered)
        assert all(image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8 for pair in pairs for image in pair)
        assert all(np.array_equal(a, b) for a, b in zip(pairs, make_pairs(mapping, rendered)))
        for view, images in zip(mapping.views(), zip(*pairs)):
            assert not view or all(np.array_equal(image, scene[view]) for image, scene in zip(images, rendered))
        assert orjson_round_trip(mapping.describe()) == mapping.describe()


def orjson_round_trip(value):
    import orjson

    return orjson.loads(orjson.dumps(value))


def test_mosaics_exchange_any_number_of_their_colours(rendered):
    changed = set()
    for mapping in draws("mosaic", 100):
        pairs = make_pairs(mapping, rendered)
        tiles = [[image[::4, ::4] for image in pair] for pair in pairs]
        assert all(
            np.array_equal(np.kron(tile, np.ones((4, 4, 1), int)), image)
            for pair, shrunk in zip(pairs, tiles)
            for image, tile in zip(pair, shrunk)
        )
        inputs, answers = (np.concatenate([pair[side].reshape(-1, 3) for pair in tiles]) for side in (0, 1))
        table = lookup(inputs, answers)
        assert sorted(table) == sorted(table.values())  # an exchange
        changed.add(round(np.mean([key != value for key, value in table.items()]), 1))
    assert {0, 1} < changed and len(changed) > 8
    for mapping in draws("mosaic", 20, mappings.HELD_OUT):
        (step,) = mapping.steps
        assert sorted(step.colours) == mapping.source.colours.tolist() and not np.any(step.colours == step.images)


def test_tiles_of_mosaics_are_independent():
    mosaic = steps.Mosaic(np.arange(64))
    rng = np.random.default_rng(0)
    images = np.stack([mosaic.draw({}, rng, SIZE)[::4, ::4] for _ in range(40)]).reshape(-1, 3)
    counts = np.unique(images, axis=0, return_counts=True)[1]
    assert len(counts) == 64 and counts.min() > 15 and counts.max() < 75  # the expectation is 40


@pytest.mark.slow
def test_recoloured_segmentations_change_any_number_of_classes(rendered):
    numbers = set()
    for mapping in draws("recolour", 60):
        answers = [answer for _, answer in make_pairs(mapping, rendered)]
        table = lookup(
            np.concatenate([scene["segmentation"].reshape(-1, 3) for scene in rendered]),
            np.concatenate([answer.reshape(-1, 3) for answer in answers]),
        )
        assert len(table) == 5 and len(set(table.values())) == 5
        numbers.add(sum(key != value for key, value in table.items()))
    assert numbers == set(range(6))


def test_marks_change_one_class(rendered):
    kinds = set()
    for mapping in draws("marks", 40):
        for (image, answer), scene in zip(make_pairs(mapping, rendered), rendered):
            marked = scene["labels"] == mapping.label
            rest = answer[~marked]
            kinds.add("image" if np.array_equal(rest, image[~marked]) else "mask")
            assert len(np.unique(answer[marked], axis=0)) <= 1
            assert np.array_equal(rest, image[~marked]) or len(np.unique(rest, axis=0)) == 1
    assert kinds == {"image", "mask"}


def test_geometries_move_every_pixel_to_the_same_place_in_all_pairs(rendered):
    """A marker with a different value in each pixel tells where the pixels go."""
    marker = np.stack(np.unravel_index(np.arange(SIZE * SIZE), (SIZE, SIZE)), -1).reshape(SIZE, SIZE, 2)
    symmetries = set()
    for mapping in draws("geometry", 60):
        (step,) = mapping.steps
        origin = step.apply(marker, {})
        assert len(np.unique(origin.reshape(-1, 2), axis=0)) == SIZE * SIZE
        for image, answer in make_pairs(mapping, rendered):
            assert np.array_equal(answer, image[origin[..., 0], origin[..., 1]])
        assert np.all((np.diff(origin, axis=1) != 0).any(-1))
        symmetries.add(step.symmetry)
    assert symmetries == {0, 2, 3, 4, 5, 6, 7}
    image = rendered[0]["image"]
    assert np.array_equal(steps.Geometry(1, 0, 0).apply(image, {}), np.rot90(image))
    assert np.array_equal(steps.Geometry(4, 0, 0).apply(image, {}), image.swapaxes(0, 1))
    assert np.array_equal(steps.Geometry(0, 2, 7).apply(image, {})[8:, :28], image[:-8, 4:])


def test_channels_keep_the_palette_and_hue_turns_the_luminance(rendered):
    colours = palette.COLOURS[None]
    for order in range(6):
        for signs in range(8):
            changed = steps.Channels(order, signs).apply(colours, {})[0]
            assert np.array_equal(np.unique(changed, axis=0), np.unique(palette.COLOURS, axis=0))
    assert np.array_equal(steps.Channels(0, 0).apply(colours, {}), colours)
    assert np.array_equal(steps.Channels(0, 7).apply(colours, {}), 255 - colours)
    assert np.abs(steps.HueTurn(360.0).apply(colours, {}).astype(int) - colours).max() <= 1
    image = np.clip(rendered[0]["image"], 100, 140)  # no channel reaches its limits
    turned = steps.HueTurn(120.0).apply(image, {})
    assert np.abs(turned.astype(int) - image).max() > 5
    assert np.abs(views.gray(turned).astype(int) - views.gray(image)).max() <= 2


def test_ramps_run_between_two_colours(rendered):
    seen = set()
    for mapping in draws("ramps", 60):
        (step,) = mapping.steps
        seen.add(step.view)
        for (_, answer), scene in zip(make_pairs(mapping, rendered), rendered):
            gray = (scene["labels"] > 0) * 255 if step.view == "mask" else scene[step.view][..., 0]
            expected = step.ends[0] + gray[..., None] / 255 * (step.ends[1].astype(float) - step.ends[0])
            assert np.abs(answer - expected).max() <= 0.5
    assert seen == {"depth", "edges", "mask", "gray"}


def test_tasks_are_those_of_the_rendered_benchmark(rendered):
    scene = rendered[0]
    for name in ("segmentation", "depth", "normals", "edges"):
        (image, answer), *_ = make_pairs(draws(name, 1)[0], rendered)
        assert np.array_equal(image, scene["image"]) and np.array_equal(answer, scene[name])
    (image, answer), *_ = make_pairs(draws("colorization", 1)[0], rendered)
    assert np.array_equal(image, views.gray(scene["image"])) and np.array_equal(answer, scene["image"])
    (image, answer), *_ = make_pairs(draws("inpainting", 1)[0], rendered)
    assert np.array_equal(image, views.with_hole(scene["image"], np.random.default_rng(0)))
    assert np.array_equal(answer, scene["image"])
    photos = [make_pairs(mapping, rendered)[0] for mapping in draws("photo_color", 40)]
    true_colours = [np.array_equal(answer, scene["image"]) for _, answer in photos]
    assert 10 < sum(true_colours) < 30 and all(np.array_equal(image, scene["gray"]) for image, _ in photos)
