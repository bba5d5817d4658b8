"""Prompts and figures of the few-shot evaluation, against definitions written out here."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from EasyLM import flags
from EasyLM.errors import UserError
from evaluation import fewshot, metrics, pictures, prompts

RNG = np.random.default_rng(0)


def test_an_analogy_is_pair_after_pair_then_the_query():
    inputs, targets = np.array([[1, 2], [5, 6]]), np.array([[3, 4], [7, 8]])
    assert prompts.analogy(inputs, targets, np.array([9, 0])).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert prompts.sequence(inputs).tolist() == [1, 2, 5, 6]


def test_shots_are_others_and_fewer_shots_are_the_last_of_more():
    for query in range(6):
        many, few = prompts.supports(6, 5, query, seed=1), prompts.supports(6, 2, query, seed=1)
        assert sorted([*many, query]) == list(range(6))
        assert many[-2:].tolist() == few.tolist()
    assert prompts.supports(100, 5, 0, seed=1).tolist() != prompts.supports(100, 5, 0, seed=2).tolist()


def test_unigram_leaves_the_example_itself_out():
    tokens, codes = RNG.integers(0, 5, (4, 9)), 5
    found = metrics.unigram_log_likelihoods(tokens, codes)
    for i, row in enumerate(tokens):
        others = np.delete(tokens, i, axis=0).ravel().tolist()
        for j, token in enumerate(row):
            assert math.isclose(found[i, j], math.log((others.count(token) + 1) / (len(others) + codes)))


def test_perplexity_and_error():
    assert metrics.perplexity(np.log([[0.5, 0.125]])) == pytest.approx([4.0])
    black, white = np.zeros((1, 2, 2, 3)), np.ones((1, 2, 2, 3))
    assert metrics.mse(black, white) == pytest.approx([1.0])
    assert metrics.with_standard_error(np.array([1.0, 3.0])) == {"mean": 2.0, "standard_error": pytest.approx(1.0)}


def test_a_sheet_shows_every_picture_where_its_column_is():
    colours = np.eye(3)
    row = [np.broadcast_to(colour, (4, 4, 3)) for colour in colours]
    sheet = np.asarray(pictures.sheet([row], ["a", "b", "c"], ["task"], size=20))
    for i, colour in enumerate(colours):
        x = pictures.GAP + i * (20 + pictures.GAP) + 10
        y = 2 * pictures.CAPTION + 10
        assert sheet[y, x].tolist() == (255 * colour).tolist()


def settings(tmp_path, **values):
    config = flags.defaults(fewshot.FLAGS)
    config.update({"checkpoint": "evaluation/demo_model", "batch_size": 8, **values})
    return config


@pytest.mark.parametrize(
    "values, said",
    [
        ({}, "no task"),
        ({"input_dirs": "a,b", "target_dirs": "c"}, "--target_dirs has 1 folders, --input_dirs 2"),
        ({"clip_dirs": "a", "n_shots": 0}, "--n_shots=0: must be at least 1"),
    ],
)
def test_wrong_settings_are_named(tmp_path, values, said):
    with pytest.raises(UserError, match=said):
        fewshot.main(settings(tmp_path, **values))


@pytest.mark.slow
def test_the_shipped_model_answers_from_folders(tmp_path):
    for folder in ("image", "half"):
        (tmp_path / folder).mkdir()
    for i in range(4):
        pixels = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "image" / f"{i}.png")
        Image.fromarray(pixels // 2).save(tmp_path / "half" / f"{i}.png")
    fewshot.main(
        settings(
            tmp_path,
            n_shots=2,
            n_queries=3,
            input_dirs=str(tmp_path / "image"),
            target_dirs=str(tmp_path / "half"),
            output_json=str(tmp_path / "out" / "figures.json"),
            output_picture=str(tmp_path / "out" / "sheet.png"),
        )
    )
    result = json.loads((tmp_path / "out" / "figures.json").read_text())["tasks"]["half"]
    assert result["queries"] == 3
    assert result["perplexity"]["mean"] > 1 and 0 < result["mse"]["mean"] < 1
    assert Image.open(tmp_path / "out" / "sheet.png").width > 7 * 96
