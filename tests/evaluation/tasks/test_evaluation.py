"""Figures and prompts of the few-shot evaluation, against definitions written out here and against scikit-learn."""

import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from prompting_kit import tiny_prompter
from tokenizer_kit import TINY, write_image

from EasyLM import flags
from EasyLM.errors import UserError
from evaluation import fewshot
from evaluation.tasks import contact_sheet, metrics, prompt_layout, tasks
from tokenizer.image_quality import FeatureStatistics, frechet_distance, inception
from tokenizer.media import images
from tokenizer.synthetic import scenes

RNG = np.random.default_rng(0)


def test_an_analogy_is_pair_after_pair_then_the_query_and_its_answer_is_the_querys():
    found = prompt_layout.analogies(["a"] * 4, [1, 3], shots=2, seed=0)
    for row, query, answer in zip(found.shown(2), (1, 3), found.answer_Q, strict=True):
        inputs, targets = row[:-1:2], row[1:-1:2]
        assert (targets == inputs + 1).all() and (inputs % 2 == 0).all()
        assert query not in inputs // 2 and len(set(inputs)) == 2
        assert row[-1] == 2 * query and answer == 2 * query + 1
    assert found.shown(0).tolist() == [[2], [6]]


def test_fewer_shots_are_the_last_of_more():
    found = prompt_layout.analogies(["a"] * 9, range(9), shots=4, seed=1)
    assert found.shown(2).tolist() == found.shown(4)[:, 4:].tolist()
    clips = prompt_layout.sequences(3, 5)
    assert clips.shown(4)[1].tolist() == [5, 6, 7, 8] and clips.answer_Q.tolist() == [4, 9, 14]
    assert clips.shown(2)[1].tolist() == [7, 8]


def test_shots_are_of_the_querys_group_and_a_seed_says_which():
    groups = ["cat", "dog"] * 5
    found = prompt_layout.analogies(groups, range(10), shots=3, seed=1)
    for query, row in enumerate(found.shown(3)):
        assert {groups[picture // 2] for picture in row} == {groups[query]}
    assert found.shown(3).tolist() != prompt_layout.analogies(groups, range(10), 3, seed=2).shown(3).tolist()


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


PALETTE = [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_iou_is_that_of_scikit_learn_even_where_colours_are_a_little_off():
    from sklearn.metrics import jaccard_score

    drawn, true = RNG.integers(0, 4, (2, 6, 8, 8))
    colours = np.array(PALETTE) / 255
    noise = RNG.uniform(-0.2, 0.2, (6, 8, 8, 3))
    found = metrics.mean_iou(np.clip(colours[drawn] + noise, 0, 1), colours[true], PALETTE)
    for value, one, other in zip(found, true.reshape(6, -1), drawn.reshape(6, -1), strict=True):
        assert value == pytest.approx(jaccard_score(one, other, average="macro", labels=[1, 2, 3]))


def test_iou_counts_the_truths_classes_and_not_the_background():
    half = np.zeros((1, 2, 2), int)
    half[0, 0] = 1
    full, empty, other = np.ones_like(half), np.zeros_like(half), 2 * half
    colours = np.array(PALETTE) / 255

    def iou(drawn, true):
        return metrics.mean_iou(colours[drawn], colours[true], PALETTE).tolist()

    assert iou(half, half) == [1] and iou(full, half) == [0.5] and iou(other, half) == [0]
    assert iou(empty, empty) == [1] and iou(half, empty) == [0] and iou(empty, half) == [0]


def test_a_users_palette_says_which_colours_are_classes(tmp_path):
    file = tmp_path / "palette.txt"
    file.write_text("10 10 10\n\n200 0 0\n0 0 250\n")
    iou = metrics.task_figures(str(file), "")["palette_iou"]
    background, red, blue = (np.full((1, 4, 4, 3), colour) / 255 for colour in metrics.read_palette(str(file)))
    half = np.concatenate([red[:, :2], background[:, 2:]], axis=1)
    found = [iou(drawn, half)[0] for drawn in (half + 0.1, red, blue, background)]
    assert found == pytest.approx([1, 0.5, 0, 0])
    assert "palette_iou" not in metrics.task_figures("", "") and "palette_iou" in metrics.HIGHER_IS_BETTER


@pytest.mark.parametrize(
    "text, said",
    [
        ("0 0 0\n\n1 2\n", r"palette\.txt:3: '1 2': must be R G B"),
        ("0 0 0\n1 2 256\n", r"palette\.txt:2: '1 2 256': must be R G B"),
        ("0 0 0\n1 2 -3\n", r"palette\.txt:2: '1 2 -3': must be R G B"),
        ("0 0 0\n1 2 red\n", r"palette\.txt:2: '1 2 red': must be R G B"),
        ("0 0 0\n1 2 3\n0 0 0\n", r"palette\.txt:3: 0 0 0: the colour of line 1 already"),
        ("0 0 0\n", r"--palette=.*palette\.txt: 1 colours: the background and at least one class are needed"),
    ],
)
def test_a_bad_palette_is_named_by_its_line(tmp_path, text, said):
    (tmp_path / "palette.txt").write_text(text)
    with pytest.raises(UserError, match=said):
        metrics.read_palette(str(tmp_path / "palette.txt"))


def test_edges_below_64_pixels_are_scored_pixel_by_pixel_and_larger_ones_within_reach():
    from sklearn.metrics import f1_score

    drawn, true = RNG.random((2, 3, 32, 32)) > 0.7
    found = metrics.edge_f_score(*(np.repeat(x[..., None], 3, -1).astype(float) for x in (drawn, true)))
    for value, one, other in zip(found, true, drawn, strict=True):
        assert value == pytest.approx(f1_score(one.ravel(), other.ravel()))
    line = np.zeros((256, 256, 3))
    line[100] = 1
    shifted = [metrics.edge_f_score(np.roll(line, by, 0)[None], line[None])[0] for by in (0, 3, 4)]
    assert shifted == pytest.approx([1, 1, 0], abs=1e-9)


def test_depth_is_read_back_from_brightness():
    near, far = 2.0, 10.0
    true, drawn = np.full((1, 4, 4, 3), 0.5), np.full((1, 4, 4, 3), 0.25)  # 6 and 8 units away
    assert metrics.depth_abs_rel(drawn, true, near, far) == pytest.approx([2 / 6])
    assert metrics.task_figures("", "2,10")["depth_abs_rel"](drawn, true) == pytest.approx([2 / 6])
    near, far = scenes.NEAR, scenes.FAR
    expected = metrics.depth_abs_rel(drawn, true, near, far)
    assert metrics.task_figures("", "")["depth_abs_rel"](drawn, true) == pytest.approx(expected)


def test_normals_are_compared_by_their_angle_whatever_their_length():
    angle = np.radians(37)
    true = np.broadcast_to(np.array([0.0, 0, 1]), (1, 4, 4, 3))
    drawn = 0.8 * np.broadcast_to(np.array([np.sin(angle), 0, np.cos(angle)]), (1, 4, 4, 3))
    assert metrics.normal_degrees((drawn + 1) / 2, (true + 1) / 2) == pytest.approx([37])


def test_a_scenes_own_annotations_have_perfect_figures():
    scene = {name: part[None] / 255 for name, part in scenes.scene(3, 48).items()}
    figures = {"segmentation": "scene_iou", "depth": "depth_abs_rel", "normals": "normal_degrees"}
    found = {name: metrics.FIGURES[name](scene[part], scene[part])[0] for part, name in figures.items()}
    assert found == pytest.approx({"scene_iou": 1, "depth_abs_rel": 0, "normal_degrees": 0}, abs=1e-4)


def test_a_sheet_shows_every_picture_where_it_belongs_and_shorter_rows_at_the_end():
    colours, size = np.eye(3), 20
    shown = [np.broadcast_to(colour, (4, 4, 3)) for colour in colours]
    rows = [contact_sheet.Row("one", ["a", "b", "c"], shown), contact_sheet.Row("two", ["b", "c"], shown[:2])]
    sheet = np.asarray(contact_sheet.sheet(rows, size, framed="c"))
    step = size + contact_sheet.GAP
    title = contact_sheet.CAPTION + contact_sheet.GAP
    for row, (first, count) in enumerate([(0, 3), (1, 2)]):
        for i in range(count):
            left, top = contact_sheet.MARGIN + (first + i) * step, contact_sheet.GAP + (row + 1) * title + row * step
            assert (sheet[top : top + size, left : left + size] == (255 * colours[i]).astype(int)).all()
            frame = tuple(sheet[top - 2, left + size // 2])
            assert (frame == contact_sheet.FRAME) == (i == count - 1)
    assert (
        sheet[contact_sheet.GAP + title + step + title :, contact_sheet.MARGIN : contact_sheet.MARGIN + step] == 255
    ).all()


def settings(**values):
    config = flags.defaults(fewshot.FLAGS)
    config.update({"batch_size": 8, **values})
    return config


@pytest.mark.parametrize(
    "values, said",
    [
        ({}, "no task"),
        ({"input_dirs": "a,b", "target_dirs": "c"}, "--target_dirs has 1 folders, --input_dirs 2"),
        ({"clip_dirs": "a", "n_context_frames": "0,2"}, "--n_context_frames=0,2: must be at least 1"),
        ({"clip_dirs": "a", "n_shots": "few"}, "--n_shots=few: must be a comma list of integers"),
        ({"input_dirs": "a", "target_dirs": "b", "figures": "iou"}, "--figures='iou': choose one of 'scene_iou'"),
        ({"benchmark": "rendered", "tasks": "depht"}, "--tasks='depht': choose one of 'segmentation', 'depth'"),
        ({"benchmark": "pascal_detection", "data_dir": "/none", "fold": 4}, "--fold=4: must be 0..3"),
        (
            {"input_dirs": "a", "target_dirs": "b", "figures": "palette_iou"},
            "--figures=palette_iou: --palette is missing",
        ),
        ({"depth_range": "2"}, "--depth_range=2: must be near,far"),
        ({"depth_range": "0,5"}, "--depth_range=0,5: must be near,far"),
        ({"depth_range": "3,3"}, "--depth_range=3,3: must be near,far"),
        ({"rows_per_task": 0}, "--rows_per_task=0: must be at least 1"),
        ({"seed": -1}, "seed=-1: must be 0..2147483647"),
        ({"seed": 2**63}, "seed=9223372036854775808: must be"),
    ],
)
def test_wrong_settings_are_named(values, said):
    with pytest.raises(UserError, match=said):
        fewshot.main(settings(**values))


@pytest.fixture(scope="module")
def prompter(tmp_path_factory):
    return tiny_prompter(tmp_path_factory.mktemp("vqgan"))


def folders(root, count: int = 5) -> tasks.Source:
    for i in range(count):
        write_image(root / "image" / f"{i}.png", seed=i)
        write_image(root / "other" / f"{i}.png", seed=100 + i)
    return tasks.folder_pairs(str(root / "image"), str(root / "other"), "")


def test_a_task_reads_each_picture_where_its_prompts_say_it_is(tmp_path):
    source, size = folders(tmp_path), TINY.resolution
    task = tasks.load(source, shots=2, queries=3, seed=0, side=size)
    by_pixels = {images.load(path, size).tobytes(): path for path in tmp_path.rglob("*.png")}
    for row, answer in zip(task.prompts.shown(2), task.prompts.answer_Q, strict=True):
        paths = [by_pixels[task.pixels[number].tobytes()] for number in (*row, answer)]
        assert [path.parent.name for path in paths] == ["image", "other"] * 3
        assert all(one.stem == other.stem for one, other in zip(paths[::2], paths[1::2], strict=True))
        assert len({path.stem for path in paths}) == 3


def test_frames_of_a_clip_are_in_the_order_of_their_numbers(tmp_path):
    for number in (1, 2, 10, 11):
        write_image(tmp_path / "clip" / f"{number}.png", seed=number)
    (clip,) = tasks.folder_clips(str(tmp_path)).clips
    expected = [images.read(tmp_path / "clip" / f"{number}.png", 8) for number in (1, 2, 10, 11)]
    assert np.array_equal([frame(8) for frame in clip], expected)


def test_images_without_an_annotation_are_counted(tmp_path, capsys):
    folders(tmp_path, 3)
    assert capsys.readouterr().out == ""
    (tmp_path / "other" / "1.png").unlink()
    source = tasks.folder_pairs(f"{tmp_path}/image", f"{tmp_path}/other", "")
    assert len(source.pairs) == 2
    said = f"1 of 3 pictures of {tmp_path}/image have no annotation in {tmp_path}/other and are left out\n"
    assert capsys.readouterr().out == said


def test_too_few_examples_are_an_error_with_the_tasks_name(tmp_path):
    with pytest.raises(UserError, match="other: 2 examples, too few for n_shots=2"):
        tasks.load(folders(tmp_path, 2), shots=2, queries=3, seed=0, side=8)


@pytest.mark.parametrize("name, end", [("json", "json"), ("plot", "png"), ("picture", "png")])
def test_outputs_that_cannot_be_written_are_named_before_the_model_is_loaded(tmp_path, name, end):
    (tmp_path / "file").write_text("in the way")
    given = {f"output_{name}": f"{tmp_path}/file/x.{end}", "checkpoint": "none", "benchmark": "rendered"}
    with pytest.raises(UserError, match=rf"--output_{name}=.*/file/x\.{end}: cannot be written"):
        fewshot.main(settings(**given))


def test_a_plot_wants_matplotlib_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="--output_plot needs the package matplotlib"):
        fewshot.main(settings(benchmark="rendered", output_plot=f"{tmp_path}/x.png", checkpoint="none"))


@pytest.mark.parametrize(
    "given, said",
    [
        ({"target_dirs": "{0}/other,{0}/b/other"}, "--target_dirs={0}/other and --target_dirs={0}/b/other: two tasks"),
        ({"clip_dirs": "{0}/b/other"}, "--target_dirs={0}/other and --clip_dirs={0}/b/other: two tasks named 'other'"),
    ],
)
def test_two_tasks_of_one_name_are_refused_before_the_model_is_loaded(tmp_path, given, said):
    folders(tmp_path, 1)
    shutil.copytree(tmp_path / "other", tmp_path / "b" / "other")
    where = {"target_dirs": "{0}/other"} | given
    where["input_dirs"] = ",".join(["{0}/image"] * len(where["target_dirs"].split(",")))
    with pytest.raises(UserError, match=re.escape(said.format(tmp_path))):
        fewshot.main(settings(**{name: value.format(tmp_path) for name, value in where.items()}, checkpoint="none"))


def leaves(tree, path="") -> dict[str, float]:
    """The numbers of nested dicts, by path."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: value for name, branch in tree.items() for key, value in leaves(branch, f"{path}/{name}").items()}


@pytest.mark.slow
def test_a_curve_is_what_each_number_of_shots_gives_by_itself(tmp_path, prompter, monkeypatch, capsys):
    """Figures, plot and sheet, of folders and of clips; and one number of shots alone gives the same."""
    monkeypatch.setattr(fewshot.Prompter, "load", lambda config: prompter)
    folders(tmp_path)
    for i in range(4):
        for frame in range(3):
            write_image(tmp_path / "clips" / str(i) / f"{frame}.png", seed=50 * i + frame)
    where = {"input_dirs": f"{tmp_path}/image", "target_dirs": f"{tmp_path}/other", "clip_dirs": f"{tmp_path}/clips"}
    outputs = {f"output_{name}": f"{tmp_path}/out/{name}.{end}" for name, end in
               (("json", "json"), ("plot", "png"), ("picture", "png"))}  # fmt: skip
    fewshot.main(settings(**where, **outputs, n_shots="0,2", n_queries=3, batch_size=4))
    curves = json.loads((tmp_path / "out" / "json.json").read_text())["tasks"]
    assert [point["shots"] for point in curves["other"]["curve"]] == [0, 2]
    assert [point["shots"] for point in curves["clips"]["curve"]] == [1, 2]
    assert "other" in capsys.readouterr().out
    for name in ("plot", "picture"):
        assert Image.open(tmp_path / "out" / f"{name}.png").width > 300

    fewshot.main(settings(**where, n_shots="2", n_queries=3, batch_size=4, output_json=f"{tmp_path}/one.json"))
    alone = json.loads((tmp_path / "one.json").read_text())["tasks"]
    for task in ("other", "clips"):
        for point in curves[task]["curve"]:
            queries = point.pop("per_query")
            of_model = {name: point[name].get("model", point[name]) for name in queries}
            assert {name: np.mean(values) for name, values in queries.items()} == pytest.approx(
                {name: value["mean"] for name, value in of_model.items()}
            )
            assert {len(values) for values in queries.values()} == {3} and {"perplexity", "mse"} <= queries.keys()
        del alone[task]["curve"][-1]["per_query"]
        one, many = (leaves({**x[task]["curve"][-1], "nats_gained": None}) for x in (alone, curves))
        assert one.pop("/nats_gained") is many.pop("/nats_gained") is None
        assert one == pytest.approx(many, rel=1e-4) and len(one) > 20


def test_figures_are_of_a_batch_of_pictures_at_a_time(tmp_path, prompter, monkeypatch):
    """So that what they need does not grow with the number of queries."""
    folders(tmp_path, 3)
    task = tasks.load(
        tasks.folder_pairs(f"{tmp_path}/image", f"{tmp_path}/other", ""), 0, 3, 0, prompter.codec.config.resolution
    )
    answers = np.zeros((3, prompter.tokens_per_image), np.int32)
    monkeypatch.setattr(fewshot, "_answers", lambda *_: (answers, np.zeros(answers.shape)))
    sizes = []

    def figure(pictures, truths):
        assert pictures.shape == truths.shape
        sizes.append(len(pictures))
        return metrics.mse(pictures, truths)

    (point,), _ = fewshot.measure(settings(batch_size=2), prompter, task, [0], {"mse": figure}, None)
    assert sizes == [2, 1] * 3  # the model, a copy of the query, through the tokenizer
    drawn, truths = prompter.decode(answers), task.pixels[task.prompts.answer_Q]
    assert point["per_query"]["mse"] == metrics.mse(drawn, truths).tolist()


@pytest.mark.slow
def test_nats_gained_are_paired_by_query(tmp_path, prompter, monkeypatch):
    monkeypatch.setattr(fewshot.Prompter, "load", lambda config: prompter)
    folders(tmp_path)
    where = {"input_dirs": f"{tmp_path}/image", "target_dirs": f"{tmp_path}/other", "n_shots": "0,2"}
    fewshot.main(settings(**where, n_queries=1, output_json=f"{tmp_path}/one.json"))
    none, two = json.loads((tmp_path / "one.json").read_text())["tasks"]["other"]["curve"]
    assert none["nats_gained"]["mean"] == 0
    gained = np.log(none["perplexity"]["mean"] / two["perplexity"]["mean"])
    assert two["nats_gained"]["mean"] == pytest.approx(gained, rel=1e-6) and gained != 0


@pytest.mark.slow
def test_fid_is_of_all_answers_against_all_truths(tmp_path, prompter, monkeypatch, caplog):
    weights = RNG.normal(size=(3 * TINY.resolution**2, 4))

    def features(pixels):  # tests/test_inception.py has the network
        return pixels.reshape(len(pixels), -1) @ weights

    monkeypatch.setattr(fewshot.Prompter, "load", lambda config: prompter)
    monkeypatch.setattr(inception, "Inception", lambda path, batch_size: {"weights.pth": features}[path])
    task = tasks.load(folders(tmp_path), shots=2, queries=3, seed=0, side=TINY.resolution)
    where = {"input_dirs": f"{tmp_path}/image", "target_dirs": f"{tmp_path}/other", "output_json": f"{tmp_path}/f.json"}
    fewshot.main(settings(**where, n_shots="2", n_queries=3, batch_size=4, inception_weights="weights.pth"))
    point = json.loads((tmp_path / "f.json").read_text())["tasks"]["other"]["curve"][0]
    assert point["fid"].keys() == point["mse"].keys()
    queries, truths = task.pixels[task.prompts.query_Qq[:, -1]], task.pixels[task.prompts.answer_Q]
    kept = prompter.decode(prompter.encode(truths))
    for who, drawn in {"copy_query": queries, "tokenizer": kept}.items():
        expected = frechet_distance(FeatureStatistics.of(features(drawn)), FeatureStatistics.of(features(truths)))
        assert expected > 0.1 and point["fid"][who] == pytest.approx(expected, rel=1e-4)
    assert "other: FID of 3 images, fewer than the 2048" in caplog.text


def test_baselines_are_the_pictures_that_they_are_named_after(tmp_path):
    task = tasks.load(folders(tmp_path), shots=2, queries=3, seed=0, side=TINY.resolution)
    found = fewshot.baselines(task, 2)
    first, last, query = task.pixels[task.prompts.shown(2)[:, [1, 3, 4]]].swapaxes(0, 1)
    assert np.array_equal(found["copy_query"], query) and np.array_equal(found["copy_last"], last)
    assert np.allclose(found["mean_annotation"], (first + last) / 2)
    assert set(fewshot.baselines(task, 0)) == {"copy_query"}


def test_a_prompt_longer_than_the_model_is_refused(tmp_path, prompter, monkeypatch):
    monkeypatch.setattr(fewshot.Prompter, "load", lambda config: prompter)
    folders(tmp_path)
    with pytest.raises(UserError, match=r"--n_shots=3: with the answer 8 pictures; the model's longest .* holds 6"):
        fewshot.main(settings(input_dirs=f"{tmp_path}/image", target_dirs=f"{tmp_path}/other", n_shots="3"))
