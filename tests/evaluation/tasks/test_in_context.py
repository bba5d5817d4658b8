"""What a model learns from examples: curves of a tiny model, paired differences, tables and charts."""

import json

import numpy as np
import pytest
from PIL import Image
from prompting_kit import tiny_prompter
from tokenizer_kit import TINY, run_main

from EasyLM.errors import UserError
from evaluation import fewshot
from evaluation.prompting import GenerationSettings, Prompter
from evaluation.tasks import in_context, mapping_tasks, metrics
from evaluation.tasks.in_context import InContextMeasurement
from evaluation.tasks.tasks import load_task

pytestmark = pytest.mark.slow
QUERIES, ANSWERS = 3, 2


@pytest.fixture(scope="module")
def prompter(tmp_path_factory):
    return tiny_prompter(tmp_path_factory.mktemp("vqgan"))


@pytest.fixture(scope="module")
def task():
    (source,) = mapping_tasks.sources(["recolour"], ["held_out"], "scenes", 0)
    return load_task(source, 2, QUERIES, 0, TINY.resolution)


@pytest.fixture(scope="module")
def measured(prompter, task):
    """Points at 0, 1 and 2 shots, and the tokens of the answers."""
    image_metrics = {"mse": metrics.mse, "colour_iou": metrics.colour_iou}
    measurement = InContextMeasurement(prompter, GenerationSettings(temperature=0.0), 2, image_metrics, ANSWERS)
    return measurement.curve(task, [0, 1, 2])


def test_values_are_those_of_the_prompts_of_each_query(prompter, task, measured):
    (none, one, two), answers_nN = measured
    tokens, truths = prompter.encode(task.pixels), prompter.encode(task.answers)
    for point, layout, source in (
        (none, task.prompts, "model"),
        (two, task.prompts, "model"),
        (two, task.wrong, "wrong_examples"),
    ):
        prompts = tokens[layout.images(point["shots"])]
        log_p, is_right = prompter.score(list(prompts), list(truths[:, None]))
        values = {name: by_source[source] for name, by_source in point["per_query"].items()}
        assert values["nats"] == pytest.approx(-log_p.mean(1), rel=1e-4)
        assert values["perplexity"] == pytest.approx(np.exp(-log_p.mean(1)), rel=1e-4)
        assert values["accuracy"] == pytest.approx(is_right.mean(1))
        assert values["first_accuracy"] == pytest.approx(is_right[:, :12].mean(1))
        generated = prompter.generate(list(prompts[:ANSWERS]), GenerationSettings(temperature=0.0))[:, 0, 0]
        assert values["mse"] == pytest.approx(metrics.mse(prompter.decode(generated), task.answers[:ANSWERS]), rel=1e-4)
        if source == "model" and point is two:
            assert np.array_equal(generated, answers_nN)
        for name, value in values.items():
            assert point[name][source]["mean"] == pytest.approx(np.mean(value))
            assert len(value) == (ANSWERS if name in ("mse", "colour_iou") else QUERIES)
    assert one["per_query"]["nats"]["model"] != one["per_query"]["nats"]["wrong_examples"]


def test_baselines_need_no_model(prompter, task, measured):
    (none, _, two), _ = measured
    assert set(none["accuracy"]) == {"model", "copy_query", "lookup"} and set(none["nats"]) == {"model"}
    assert set(two["mse"]) == {
        "model",
        "wrong_examples",
        "copy_query",
        "copy_last",
        "mean_annotation",
        "lookup",
        "tokenizer",
    }
    queries = task.pixels[task.prompts.query_Qq[:, 0]]
    assert two["per_query"]["mse"]["copy_query"] == pytest.approx(metrics.mse(queries, task.answers)[:ANSWERS])
    is_right = prompter.encode(queries) == prompter.encode(task.answers)
    assert two["per_query"]["accuracy"]["copy_query"] == pytest.approx(is_right.mean(1))


def test_answers_and_wrong_examples_are_limited_to_some_numbers_of_shots(prompter, task, monkeypatch):
    monkeypatch.setattr(in_context, "FULL_COUNTS", (0,))
    measurement = InContextMeasurement(prompter, GenerationSettings(temperature=0.0), 2, {"mse": metrics.mse}, 1)
    none, one, two = measurement.curve(task, [0, 1, 2])[0]
    assert "mse" in none and "mse" not in one and set(one["nats"]) == {"model"}
    assert set(two["nats"]) == {"model", "wrong_examples"} and len(two["per_query"]["mse"]["model"]) == 1


def test_accuracies_are_shares_of_the_most_likely_tokens(prompter, task, monkeypatch):
    """Of 64 tokens, the first 6 and the last 32 are not the most likely ones."""
    is_right_N = np.isin(np.arange(64), np.arange(6, 32))
    monkeypatch.setattr(
        prompter, "score", lambda prompts, _: [np.tile(x, (len(prompts), 1)) for x in (0 - is_right_N, is_right_N)]
    )
    measurement = InContextMeasurement(prompter, GenerationSettings(temperature=0.0), 2, {}, 1)
    ((point,), _) = measurement.curve(task, [1])
    assert point["accuracy"]["model"]["mean"] == pytest.approx(26 / 64)
    assert point["first_accuracy"]["model"]["mean"] == 6 / 12
    assert point["nats"]["model"]["mean"] == pytest.approx(26 / 64)


def test_differences_are_paired_by_query():
    def point(shots: int, nats: list[float], wrong: list[float], iou: list[float]) -> dict:
        values = {"nats": {"model": nats, "wrong_examples": wrong}, "colour_iou": {"model": iou, "copy_query": [0.5]}}
        return {"shots": shots, "per_query": values}

    curve = [point(1, [4, 8], [5, 9], [0.2]), point(3, [3, 7], [6, 8], [0.4]), point(7, [1, 7], [9, 7], [0.9])]
    result = in_context.differences(curve, "colour_iou")
    assert result["shots_1_to_3"]["nats"] == {"mean": 1, "standard_error": 0}  # although the queries differ by 4
    assert result["shots_3_to_7"]["nats"] == {"mean": 1, "standard_error": pytest.approx(1)}
    assert result["wrong_at_3"]["nats"]["mean"] == 2 and result["wrong_at_7"]["nats"]["mean"] == 4
    assert result["shots_3_to_7"]["colour_iou"]["mean"] == pytest.approx(0.5)  # positive: the examples help
    assert result["copy_at_7"]["colour_iou"]["mean"] == pytest.approx(0.4)
    assert set(in_context.differences(curve[:2], "colour_iou")) == {"shots_1_to_3", "wrong_at_3"}


def test_command_writes_tables_charts_and_values_and_resumes(tmp_path, prompter, monkeypatch, capsys):
    monkeypatch.setattr(Prompter, "load", lambda settings, largest: prompter)
    curve, measured_tasks = InContextMeasurement.curve, []

    def interrupted(self, task, counts):
        measured_tasks.append(task.name)
        if len(measured_tasks) == 3:
            raise KeyboardInterrupt
        return curve(self, task, counts)

    monkeypatch.setattr(InContextMeasurement, "curve", interrupted)
    outputs = {"output_json": "a.json", "output_plot": "a.png", "output_picture": "sheet.png"}
    flags = {name: str(tmp_path / file) for name, file in outputs.items()}
    flags |= {"checkpoint": "none", "benchmark": "mappings", "tasks": "mosaic,channels", "n_shots": "0,2"}
    flags |= {"n_queries": 2, "n_answers": 1, "rows_per_task": 1}
    with pytest.raises(KeyboardInterrupt):
        run_main(fewshot, **flags)
    run_main(fewshot, **flags)
    names = ["mosaic_seen", "mosaic_held_out", "channels_seen", "channels_held_out"]
    assert measured_tasks == [*names[:3], *names[2:]]
    tasks = json.loads((tmp_path / "a.json").read_text())["tasks"]
    assert list(tasks) == names and [point["shots"] for point in tasks["mosaic_seen"]["curve"]] == [0, 2]
    values = tasks["channels_seen"]["curve"][1]["per_query"]
    assert len(values["nats"]["model"]) == 2 and len(values["mse"]["model"]) == 1
    assert tasks["channels_seen"]["family"] == "channels" and tasks["mosaic_held_out"]["split"] == "held_out"
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*names, "first_accuracy", "colour_iou", "lookup"))
    assert Image.open(tmp_path / "a.png").width > 300 and Image.open(tmp_path / "sheet.png").width > 300


def test_invalid_settings_are_named(prompter, monkeypatch):
    monkeypatch.setattr(Prompter, "load", lambda settings, largest: prompter)
    mappings = {"checkpoint": "none", "benchmark": "mappings"}
    with pytest.raises(UserError, match=r"--n_shots=7: a prompt and its answer are 16 images; .* holds 6"):
        run_main(fewshot, **mappings)  # 7: by default
    for folders in ({"clip_dirs": "a"}, {"input_dirs": "a", "target_dirs": "b"}):
        with pytest.raises(UserError, match=r"--benchmark=mappings .* separate run"):
            run_main(fewshot, **mappings, **folders)
    with pytest.raises(UserError, match="--inception_weights: --benchmark=mappings has no FID"):
        run_main(fewshot, **mappings, inception_weights="x")
