"""Metrics equal their definitions and those of scikit-learn."""

import math

import numpy as np
import pytest

from EasyLM.errors import UserError
from evaluation.tasks import metrics
from tokenizer.synthetic import scenes

RNG = np.random.default_rng(0)
PALETTE = [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_unigram_baseline_excludes_the_example_itself():
    tokens, codes = RNG.integers(0, 5, (4, 9)), 5
    likelihoods = metrics.unigram_log_likelihoods(tokens, codes)
    for i, row in enumerate(tokens):
        others = np.delete(tokens, i, axis=0).ravel().tolist()
        for j, token in enumerate(row):
            assert math.isclose(likelihoods[i, j], math.log((others.count(token) + 1) / (len(others) + codes)))


def test_perplexity_and_squared_error_equal_their_definitions():
    assert metrics.perplexity(np.log([[0.5, 0.125]])) == pytest.approx([4.0])
    black, white = np.zeros((1, 2, 2, 3)), np.ones((1, 2, 2, 3))
    assert metrics.mse(black, white) == pytest.approx([1.0])
    assert metrics.with_standard_error(np.array([1.0, 3.0])) == {"mean": 2.0, "standard_error": pytest.approx(1.0)}


def test_iou_equals_scikit_learn_for_noisy_colours():
    from sklearn.metrics import jaccard_score

    predicted, true = RNG.integers(0, 4, (2, 6, 8, 8))
    colours = np.array(PALETTE) / 255
    noise = RNG.uniform(-0.2, 0.2, (6, 8, 8, 3))
    iou = metrics.mean_iou(np.clip(colours[predicted] + noise, 0, 1), colours[true], PALETTE)
    for value, true_labels, labels in zip(iou, true.reshape(6, -1), predicted.reshape(6, -1), strict=True):
        assert value == pytest.approx(jaccard_score(true_labels, labels, average="macro", labels=[1, 2, 3]))


def test_iou_averages_over_the_classes_of_the_truth_without_the_background():
    half = np.zeros((1, 2, 2), int)
    half[0, 0] = 1
    full, empty, other = np.ones_like(half), np.zeros_like(half), 2 * half
    colours = np.array(PALETTE) / 255

    def iou(predicted, true):
        return metrics.mean_iou(colours[predicted], colours[true], PALETTE).tolist()

    assert iou(half, half) == [1] and iou(full, half) == [0.5] and iou(other, half) == [0]
    assert iou(empty, empty) == [1] and iou(half, empty) == [0] and iou(empty, half) == [0]


def test_palette_file_defines_the_classes(tmp_path):
    file = tmp_path / "palette.txt"
    file.write_text("10 10 10\n\n200 0 0\n0 0 250\n")
    palette = metrics.read_palette(str(file))
    iou = metrics.task_metrics(palette)["palette_iou"]
    background, red, blue = (np.full((1, 4, 4, 3), colour) / 255 for colour in palette)
    half = np.concatenate([red[:, :2], background[:, 2:]], axis=1)
    values = [iou(predicted, half)[0] for predicted in (half + 0.1, red, blue, background)]
    assert values == pytest.approx([1, 0.5, 0, 0])
    assert "palette_iou" not in metrics.task_metrics() and "palette_iou" in metrics.HIGHER_IS_BETTER


@pytest.mark.parametrize(
    "text, message",
    [
        ("0 0 0\n\n1 2\n", r"palette\.txt:3: '1 2': must be R G B"),
        ("0 0 0\n1 2 256\n", r"palette\.txt:2: '1 2 256': must be R G B"),
        ("0 0 0\n1 2 -3\n", r"palette\.txt:2: '1 2 -3': must be R G B"),
        ("0 0 0\n1 2 red\n", r"palette\.txt:2: '1 2 red': must be R G B"),
        ("0 0 0\n1 2 3\n0 0 0\n", r"palette\.txt:3: 0 0 0: the same colour as line 1"),
        ("0 0 0\n", r"palette\.txt: 1 colours: give the background and at least one class"),
    ],
)
def test_invalid_palettes_are_named_by_line(tmp_path, text, message):
    (tmp_path / "palette.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        metrics.read_palette(str(tmp_path / "palette.txt"))


def test_edges_match_at_the_same_pixel_below_64_pixels_and_within_3_pixels_at_256():
    from sklearn.metrics import f1_score

    predicted, true = RNG.random((2, 3, 32, 32)) > 0.7
    scores = metrics.edge_f_score(*(np.repeat(x[..., None], 3, -1).astype(float) for x in (predicted, true)))
    for value, true_edges, edges in zip(scores, true, predicted, strict=True):
        assert value == pytest.approx(f1_score(true_edges.ravel(), edges.ravel()))
    line = np.zeros((256, 256, 3))
    line[100] = 1
    shifted = [metrics.edge_f_score(np.roll(line, by, 0)[None], line[None])[0] for by in (0, 3, 4)]
    assert shifted == pytest.approx([1, 1, 0], abs=1e-9)


def test_depth_error_is_relative_to_the_depth_of_brightness():
    near, far = 2.0, 10.0
    true, predicted = np.full((1, 4, 4, 3), 0.5), np.full((1, 4, 4, 3), 0.25)  # depths 6 and 8
    assert metrics.depth_abs_rel(predicted, true, near, far) == pytest.approx([2 / 6])
    assert metrics.task_metrics(depth_range=(2.0, 10.0))["depth_abs_rel"](predicted, true) == pytest.approx([2 / 6])
    expected = metrics.depth_abs_rel(predicted, true, scenes.NEAR, scenes.FAR)
    assert metrics.task_metrics()["depth_abs_rel"](predicted, true) == pytest.approx(expected)


def test_normals_are_compared_by_angle_not_by_length():
    angle = np.radians(37)
    true = np.broadcast_to(np.array([0.0, 0, 1]), (1, 4, 4, 3))
    predicted = 0.8 * np.broadcast_to(np.array([np.sin(angle), 0, np.cos(angle)]), (1, 4, 4, 3))
    assert metrics.normal_degrees((predicted + 1) / 2, (true + 1) / 2) == pytest.approx([37])


def test_annotations_of_a_scene_have_perfect_metrics():
    scene = {name: part[None] / 255 for name, part in scenes.scene(3, 48).items()}
    names = {"segmentation": "scene_iou", "depth": "depth_abs_rel", "normals": "normal_degrees"}
    values = {name: metrics.TASK_METRICS[name](scene[part], scene[part])[0] for part, name in names.items()}
    assert values == pytest.approx({"scene_iou": 1, "depth_abs_rel": 0, "normal_degrees": 0}, abs=1e-4)
