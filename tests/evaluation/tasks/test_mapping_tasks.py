"""The prompts of the benchmark of mappings, and the answers that their examples determine."""

import numpy as np
import pytest
from mapping_kit import entries

from EasyLM.errors import UserError
from evaluation.tasks import mapping_tasks
from evaluation.tasks.benchmarks import BenchmarkSettings, sources
from evaluation.tasks.lookup import lookup_answers
from evaluation.tasks.mapping_tasks import FAMILIES, MappingTask
from evaluation.tasks.metrics import colour_iou, mse
from evaluation.tasks.tasks import load_task
from tokenizer.mappings import steps
from tokenizer.synthetic import palette, scenes, seed_ranges

SIDE = 16


def load(family: str, mapping_split: str = "held_out", shots: int = 7, queries: int = 4, **settings) -> MappingTask:
    (source,) = sources("mappings", BenchmarkSettings(tasks=family, mapping_splits=mapping_split, **settings), 2)
    assert source.name == f"{family}_{mapping_split}"
    return load_task(source, shots, queries, 0, SIDE)


@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_mappings_use_held_out_entries_and_seen_ones_do_not(family):
    for split in mapping_tasks.SPLITS:
        for seed in range(30):
            mapping, other = mapping_tasks.draw_mappings(family, split, seed)
            assert mapping.family == family and other.describe() != mapping.describe()
            used = [entry for step in mapping.steps for entry in entries(step)]
            if family != "composed":  # consists of trained mappings
                assert used and set(used) == {split == "held_out"}
            elif split == "held_out":
                kinds = tuple(type(step) for step in mapping.steps)
                assert kinds in {
                    (steps.Mark, steps.Geometry),
                    (steps.Recolour, steps.Channels),
                    (steps.Recolour, steps.HueTurn),
                }


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_examples_have_the_inputs_of_the_shots_and_other_answers(family):
    task = load(family)
    right, wrong = task.pixels[task.prompts.images(7)], task.pixels[task.wrong.images(7)]
    assert right.shape == (4, 15, SIDE, SIDE, 3)
    assert np.array_equal(right[:, ::2], wrong[:, ::2])
    differs_QK = np.abs(right[:, 1::2] - wrong[:, 1::2]).max((2, 3, 4)) > 0.05
    assert differs_QK.mean() > 0.8 and differs_QK.any(1).all()
    assert np.array_equal(task.prompts.answer_Q, task.wrong.answer_Q)


def test_another_exchange_of_a_mosaic_changes_each_colour():
    for seed in range(30):
        mapping, other = mapping_tasks.draw_mappings("mosaic", "held_out", seed)
        (given,), (changed,) = mapping.steps, other.steps
        assert other.source is mapping.source and sorted(changed.images) == sorted(given.images)
        assert np.array_equal(changed.colours, given.colours)
        assert not np.any(changed.images == given.images) and not np.any(changed.images == changed.colours)


def test_queries_are_the_same_for_all_numbers_of_shots_and_of_queries():
    many, few = load("recolour"), load("recolour", shots=2, queries=3)
    assert np.array_equal(many.pixels[many.prompts.images(2)][:3], few.pixels[few.prompts.images(2)])
    assert np.array_equal(many.answers[:3], few.answers)
    assert many.digest() == load("recolour").digest() != load("recolour", seed=1).digest()
    assert np.array_equal(many.prompts.images(3), many.prompts.images(7)[:, -7:])
    answers = [answer.tobytes() for answer in (*many.answers, *load("recolour", "seen").answers)]
    assert len(set(answers)) == 8


def test_scenes_are_from_the_reserved_seeds(monkeypatch):
    seeds, scene = [], mapping_tasks.scenes.scene
    monkeypatch.setattr(
        mapping_tasks.scenes, "scene", lambda seed, *rest: seeds.append((seed, rest)) or scene(seed, *rest)
    )
    mapping_tasks._scene.cache_clear()
    load("marks", queries=2, seed=3, split="backgrounds")
    block = (seed_ranges.FIRST_HELD_OUT + 3) * seed_ranges.SEEDS_PER_BLOCK
    assert all(block <= seed < block + seed_ranges.SEEDS_PER_BLOCK for seed, _ in seeds)
    assert {rest for _, rest in seeds} == {(SIDE, "backgrounds")}
    mapping_tasks._scene.cache_clear()


def test_marked_classes_are_shown_by_the_query_and_most_shots():
    task = load("marks", queries=8)
    pairs = task.pixels[np.concatenate([task.prompts.images(7), task.prompts.answer_Q[:, None]], axis=1)]
    colours = [
        (mapping := mapping_tasks.draw_mappings("marks", "held_out", seed)[0]).steps[0].colour
        for seed in seed_ranges.benchmark_seeds(0, 8 * 256)[::256]
    ]
    marks = np.array([palette.COLOURS[colour] / 255 for colour in colours])
    shown_QP = (np.abs(pairs[:, 1::2] - marks[:, None, None, None]).max(-1) < 1e-3).any((2, 3))
    assert shown_QP[:, -1].all() and shown_QP.mean() > 0.9 and mapping.label


@pytest.mark.parametrize("family, error", [("mosaic", 0), ("recolour", 0), ("ramps", 1e-5)])
@pytest.mark.parametrize("split", mapping_tasks.SPLITS)
def test_many_examples_determine_the_answer(family, error, split):
    task = load(family, split, shots=23, queries=6)
    queries = task.pixels[task.prompts.query_Qq[:, 0]]
    assert np.array_equal(lookup_answers(task, 0), queries)
    errors = np.array([mse(lookup_answers(task, shots), task.answers) for shots in (1, 3, 7, 23)])
    assert np.all(np.diff(errors.mean(1)) <= 1e-9) and errors[0].mean() > errors[-1].mean()
    if family != "recolour":  # a class can be missing in all shots
        assert errors[-1].max() <= error
    assert np.median(errors[-1]) <= error
    if family != "ramps":
        assert np.median(colour_iou(lookup_answers(task, 23), task.answers)) == 1


def test_unseen_pixels_of_a_lookup_are_copied():
    task = load("recolour", "held_out", shots=1, queries=8)
    answers, queries = lookup_answers(task, 1), task.pixels[task.prompts.query_Qq[:, 0]]
    for query, (answer, truth) in enumerate(zip(answers, task.answers)):
        shot, asked = (scenes.label_ids(task.keys_QPSS3[query, place]) for place in (0, 1))
        is_known = np.isin(asked, shot)
        assert np.array_equal(answer[is_known], truth[is_known])
        assert np.array_equal(answer[~is_known], queries[query][~is_known])


def test_lookups_exist_for_mappings_of_single_pixels_only():
    has_keys = {family for family in FAMILIES if load(family, shots=1, queries=1).keys_QPSS3 is not None}
    assert has_keys == {"mosaic", "recolour", "ramps"}


def test_errors_name_the_flag():
    with pytest.raises(UserError, match="--tasks='depth': choose one of 'mosaic', 'recolour'"):
        load("depth")
    with pytest.raises(UserError, match="--mapping_splits='train': choose one of 'seen', 'held_out'"):
        load("mosaic", "train")
    with pytest.raises(UserError, match="--n_queries=4000: the mappings of a seed have at most 3906 queries"):
        load("mosaic", queries=4000)
