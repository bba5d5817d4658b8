"""Training mappings never use held-out entries, mappings of the benchmark always do."""

import numpy as np
import pytest
from mapping_kit import entries

from tokenizer.mappings import held_out, mappings, steps
from tokenizer.synthetic import layouts

DRAWS = 10_000


def test_a_quarter_of_each_table_is_held_out():
    for table in (held_out.CLASS_COLOURS, held_out.COLOUR_PAIRS, held_out.GEOMETRIES, held_out.CHANNELS):
        assert table.mean() == 0.25
    assert np.all(held_out.CLASS_COLOURS.mean(1) == 0.25) and np.all(held_out.COLOUR_PAIRS.mean(1) == 0.25)
    # Copies are trained; the benchmark's rotation by 90 degrees is held out, and other symmetries only in part.
    assert not np.diag(held_out.COLOUR_PAIRS).any()
    assert not held_out.GEOMETRIES[held_out.IDENTITY, 0, 0] and not held_out.CHANNELS[0, 0]
    shares = held_out.GEOMETRIES.mean((1, 2))
    assert shares[held_out.ROTATION] == 1 and np.all(np.delete(shares, held_out.ROTATION) < 0.3)


@pytest.mark.parametrize("family", sorted(set(mappings.NEW_MAPPINGS) - {"composed"}))
def test_training_never_uses_held_out_entries_and_the_benchmark_always(family):
    rng = np.random.default_rng(0)
    for split, count in ((mappings.TRAIN, DRAWS), (mappings.SEEN, 300), (mappings.HELD_OUT, 300)):
        for _ in range(count):
            used = [entry for step in mappings.draw(rng, family, split).steps for entry in entries(step)]
            assert used or split == mappings.TRAIN
            assert used == [split == mappings.HELD_OUT] * len(used)


@pytest.mark.slow
def test_training_never_composes_held_out_pairs_of_families():
    """A held-out composition has trained parts only. The rotation occurs in compositions, but never after a copy."""
    rng = np.random.default_rng(0)
    pairs: dict[str, set[tuple[str, str]]] = {}
    rotations = 0
    for split, count in ((mappings.TRAIN, DRAWS), (mappings.SEEN, 1000), (mappings.HELD_OUT, 1000)):
        pairs[split] = set()
        for _ in range(count):
            first, second = mappings.draw(rng, "composed", split).steps
            pairs[split].add((type(first).__name__, type(second).__name__))
            is_rotation = isinstance(second, steps.Geometry) and second.symmetry == held_out.ROTATION
            assert not any(entries(first)) and not (any(entries(second)) and not is_rotation)
            rotations += is_rotation
            if is_rotation:
                assert len(entries(first)) > 0 and first not in (steps.Channels(0, 0), steps.HueTurn(0.0))
    assert rotations > 500
    assert pairs[mappings.HELD_OUT] == {("Mark", "Geometry"), ("Recolour", "Channels"), ("Recolour", "HueTurn")}
    assert not pairs[mappings.TRAIN] & pairs[mappings.HELD_OUT] and pairs[mappings.SEEN] <= pairs[mappings.TRAIN]
    assert ("Exchange", "Geometry") in pairs[mappings.TRAIN] and ("Recolour", "Geometry") in pairs[mappings.TRAIN]


def test_rooms_and_colours_of_training_scenes_avoid_those_of_the_splits():
    unseen = layouts.SPLITS["backgrounds"]
    for _, style in held_out.TRAINING_STYLES:
        assert any(
            not (of_training[0] < of_split[1] and of_split[0] < of_training[1])
            for of_training, of_split in ((style.brightness, unseen.brightness), (style.tint, unseen.tint))
        )
        assert set(style.shapes) == set(layouts.SHAPES)
        distance = np.abs(style.colours[:, None].astype(int) - layouts.NEW_COLOURS).max(-1)
        assert distance.min() >= 30
    assert sum(share for share, _ in held_out.TRAINING_STYLES) == pytest.approx(1)
    floors = [
        layouts.random_layout(rng, held_out.training_style(rng)).floor.max()
        for rng in map(np.random.default_rng, range(100))
    ]
    assert min(floors) < 0.2 and max(floors) > 0.9
