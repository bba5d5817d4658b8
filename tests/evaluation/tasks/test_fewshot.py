"""Few-shot evaluation of a tiny model: curves, metrics, charts and sheet."""

import json

import numpy as np
import pytest
from fewshot_kit import pair_flags, write_clips, write_pairs
from PIL import Image
from prompting_kit import tiny_prompter
from tokenizer_kit import TINY, run_main

from EasyLM.errors import UserError
from evaluation import fewshot
from evaluation.prompting import GenerationSettings, Prompter
from evaluation.tasks import metrics
from evaluation.tasks.measure import Measurement
from evaluation.tasks.tasks import load_task
from tokenizer.image_quality import FeatureStatistics, frechet_distance, inception


@pytest.fixture(scope="module")
def prompter(tmp_path_factory):
    return tiny_prompter(tmp_path_factory.mktemp("vqgan"))


@pytest.fixture
def run_fewshot(prompter, monkeypatch):
    """Runs the command with the tiny model."""
    monkeypatch.setattr(Prompter, "load", lambda settings, largest: prompter)
    return lambda **settings: run_main(fewshot, **{"checkpoint": "none", "batch_size": 8, **settings})


def curves_of(path) -> dict[str, list[dict]]:
    """Returns the curve of each task of a JSON file."""
    return {name: task["curve"] for name, task in json.loads(path.read_text())["tasks"].items()}


def leaves(tree, path="") -> dict[str, float]:
    """Returns the numbers of nested dicts by path."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: value for name, branch in tree.items() for key, value in leaves(branch, f"{path}/{name}").items()}


@pytest.mark.slow
def test_a_point_of_a_curve_equals_a_run_at_that_number_of_shots(tmp_path, run_fewshot, capsys):
    write_pairs(tmp_path)
    write_clips(tmp_path)
    settings = {**pair_flags(tmp_path), "clip_dirs": f"{tmp_path}/clips", "n_queries": 3, "batch_size": 4}
    out = tmp_path / "out"
    outputs = {"output_json": out / "all.json", "output_plot": out / "plot.png", "output_picture": out / "sheet.png"}
    run_fewshot(**settings, n_shots="0,2", **{name: str(path) for name, path in outputs.items()})
    curves = curves_of(out / "all.json")
    assert [point["shots"] for point in curves["other"]] == [0, 2]
    assert [point["shots"] for point in curves["clips"]] == [1, 2]
    assert "other" in capsys.readouterr().out
    for name in ("plot", "sheet"):
        assert Image.open(out / f"{name}.png").width > 300

    run_fewshot(**settings, n_shots="2", output_json=f"{tmp_path}/one.json")
    alone = curves_of(tmp_path / "one.json")
    for task in ("other", "clips"):
        for point in curves[task]:
            check_per_query(point.pop("per_query"), point)
        del alone[task][-1]["per_query"]
        one, many = (leaves({**curve[task][-1], "nats_gained": None}) for curve in (alone, curves))
        assert one.pop("/nats_gained") is many.pop("/nats_gained") is None
        assert one == pytest.approx(many, rel=1e-4) and len(one) > 20


def check_per_query(per_query, point):
    """Each value of the point is the mean of its queries: of tokens, and of the answers of each source."""
    assert {"perplexity", "mse"} <= per_query.keys() < point.keys()
    assert {"model", "tokenizer"} <= per_query["mse"].keys() == point["mse"].keys()
    for name, values in per_query.items():
        of_sources = values.items() if isinstance(values, dict) else [(None, values)]
        for source, of_queries in of_sources:
            value = point[name][source] if source else point[name]
            assert len(of_queries) == 3 and np.mean(of_queries) == pytest.approx(value["mean"])


def test_metrics_are_computed_a_batch_at_a_time(tmp_path, prompter, monkeypatch):
    """Their memory does not grow with the number of queries."""
    source = write_pairs(tmp_path, 3)
    task = load_task(source, shots=0, queries=3, seed=0, side=prompter.codec.resolution)
    answers_QN = np.zeros((3, prompter.tokens_per_image), np.int32)
    monkeypatch.setattr(Measurement, "_answer", lambda *_: (answers_QN, np.zeros(answers_QN.shape)))
    sizes = []

    def metric(images, truths):
        assert images.shape == truths.shape
        sizes.append(len(images))
        return metrics.mse(images, truths)

    measurement = Measurement(prompter, GenerationSettings(), batch_size=2, image_metrics={"mse": metric})
    (point,), _ = measurement.curve(task, [0])
    assert sizes == [2, 1] * 3  # the model, a copy of the query, the tokenizer
    assert point["per_query"]["mse"]["model"] == metrics.mse(prompter.decode(answers_QN), task.answers).tolist()


@pytest.mark.slow
def test_nats_gained_are_paired_by_query(tmp_path, run_fewshot):
    write_pairs(tmp_path)
    run_fewshot(**pair_flags(tmp_path), n_shots="0,2", n_queries=1, output_json=f"{tmp_path}/one.json")
    none, two = curves_of(tmp_path / "one.json")["other"]
    assert none["nats_gained"]["mean"] == 0
    gained = np.log(none["perplexity"]["mean"] / two["perplexity"]["mean"])
    assert two["nats_gained"]["mean"] == pytest.approx(gained, rel=1e-6) and gained != 0


@pytest.mark.slow
def test_fid_compares_all_answers_with_all_true_ones(tmp_path, prompter, run_fewshot, monkeypatch, caplog):
    weights = np.random.default_rng(0).normal(size=(3 * TINY.resolution**2, 4))

    def features(pixels):  # test_inception.py tests the network
        return pixels.reshape(len(pixels), -1) @ weights

    monkeypatch.setattr(inception, "Inception", lambda path, batch_size: {"weights.pth": features}[path])
    task = load_task(write_pairs(tmp_path), shots=2, queries=3, seed=0, side=TINY.resolution)
    settings = {"n_shots": "2", "n_queries": 3, "batch_size": 4, "inception_weights": "weights.pth"}
    run_fewshot(**pair_flags(tmp_path), **settings, output_json=f"{tmp_path}/f.json")
    (point,) = curves_of(tmp_path / "f.json")["other"]
    assert point["fid"].keys() == point["mse"].keys()
    queries = task.pixels[task.prompts.query_Qq[:, -1]]
    reconstructions = prompter.decode(prompter.encode(task.answers))
    for source, pixels in {"copy_query": queries, "tokenizer": reconstructions}.items():
        a, b = FeatureStatistics.of(features(pixels)), FeatureStatistics.of(features(task.answers))
        assert frechet_distance(a, b) > 0.1
        assert point["fid"][source] == pytest.approx(frechet_distance(a, b), rel=1e-4)
    assert "other: FID of 3 images, fewer than the 2048" in caplog.text


def test_prompts_longer_than_the_models_context_are_rejected(tmp_path, run_fewshot):
    write_pairs(tmp_path)
    with pytest.raises(
        UserError, match=r"--n_shots=3: a prompt and its answer are 8 images; the model's longest .* holds 6"
    ):
        run_fewshot(**pair_flags(tmp_path), n_shots="3")
