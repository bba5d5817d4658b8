"""Benchmarks of the few-shot evaluation, on tiny trees of the data sets' layouts."""

import numpy as np
import pytest
from PIL import Image
from tokenizer_kit import write_image

from EasyLM import flags
from EasyLM.errors import UserError
from evaluation import fewshot
from evaluation.tasks import benchmarks, metrics
from tokenizer.synthetic import SPLITS, scenes

SIDE = 24


def settings(**values):
    config = flags.defaults(fewshot.FLAGS)
    config.update(values)
    return config


def voc(root, name: str, labels: np.ndarray, objects=()) -> None:
    """A picture of Pascal VOC with its label picture and boxes, and its line in the list."""
    write_image(root / "JPEGImages" / f"{name}.jpg", seed=len(name), size=40)
    path = root / "SegmentationClass" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(labels.astype(np.uint8), "P")
    picture.putpalette([value for i in range(256) for value in (i, 255 - i, i // 2)])
    picture.save(path)
    things = "".join(
        f"<object><name>{kind}</name><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax>"
        f"<ymax>{box[3]}</ymax></bndbox><part><name>head</name></part></object>"
        for kind, box in objects
    )
    height, width = labels.shape
    text = f"<annotation><size><width>{width}</width><height>{height}</height></size>{things}</annotation>"
    (root / "Annotations").mkdir(exist_ok=True)
    (root / "Annotations" / f"{name}.xml").write_text(text)
    listed = root / "ImageSets" / "Segmentation" / "val.txt"
    listed.parent.mkdir(parents=True, exist_ok=True)
    with open(listed, "a") as file:
        file.write(name + "\n")


def test_pascal_segmentation_asks_for_each_class_of_the_fold_in_white(tmp_path):
    labels = np.zeros((48, 48), int)
    labels[:24, :24], labels[24:, :24] = 6, 10  # bus and cow: the first and the last of fold 1
    labels[:24, 24:], labels[24:, 24:] = 5, 255  # a bottle, of fold 0, and undecided pixels
    voc(tmp_path, "one", labels)
    voc(tmp_path, "none", np.where(labels > 0, 1, 0))  # an aeroplane: fold 0
    (source,) = benchmarks.pascal_segmentation(settings(data_dir=str(tmp_path), fold=1), 2)
    assert [pair.group for pair in source.pairs] == ["bus", "cow"]
    for pair, label in zip(source.pairs, (6, 10), strict=True):
        mask = pair.target(SIDE)
        assert np.array_equal(mask[..., 0] == 255, labels[::2, ::2] == label) and set(np.unique(mask)) == {0, 255}
        assert pair.input(SIDE).shape == (SIDE, SIDE, 3)
    assert source.figure in metrics.FIGURES


def test_pascal_prefers_the_larger_set_of_labels(tmp_path):
    voc(tmp_path, "one", np.full((48, 48), 6))
    larger = tmp_path / "SegmentationClassAug" / "one.png"
    larger.parent.mkdir()
    Image.fromarray(np.full((48, 48), 7, np.uint8)).save(larger)
    (source,) = benchmarks.pascal_segmentation(settings(data_dir=str(tmp_path), fold=1), 2)
    assert [pair.group for pair in source.pairs] == ["car"]


def test_pascal_detection_takes_single_objects_below_half_the_picture(tmp_path):
    empty = np.zeros((60, 48), int)
    voc(tmp_path, "good", empty, [("dog", (1, 1, 24, 30)), ("person", (1, 1, 4, 4)), ("person", (9, 9, 12, 12))])
    voc(tmp_path, "large", empty, [("dog", (1, 1, 48, 40))])
    voc(tmp_path, "other", empty, [("bird", (1, 1, 9, 9))])
    (source,) = benchmarks.pascal_detection(settings(data_dir=str(tmp_path), fold=2), 2)
    assert [pair.group for pair in source.pairs] == ["dog"]  # person has two; the second dog fills the picture
    mask = source.pairs[0].target(SIDE)[..., 0] == 255
    assert mask[:12, :12].all() and mask.sum() == 144  # the quarter at the top left, whatever the aspect


def test_missing_and_broken_files_of_pascal_are_named(tmp_path):
    with pytest.raises(UserError, match=r"val\.txt: no such file"):
        benchmarks.pascal_segmentation(settings(data_dir=str(tmp_path)), 2)
    voc(tmp_path, "one", np.zeros((48, 48), int))
    (tmp_path / "Annotations" / "one.xml").write_text("<annotation>")
    with pytest.raises(UserError, match=r"one\.xml: not an annotation"):
        benchmarks.pascal_detection(settings(data_dir=str(tmp_path)), 2)


def test_imagenet_colorization_is_gray_then_colour_of_the_same_picture(tmp_path):
    write_image(tmp_path / "n01440764" / "ILSVRC2012_val_00000293.JPEG", seed=1)
    write_image(tmp_path / "ILSVRC2012_val_00000002.JPEG", seed=2)
    (source,) = benchmarks.imagenet_colorization(settings(data_dir=str(tmp_path)), 2)
    assert len(source.pairs) == 2
    for pair in source.pairs:
        gray, colour = pair.input(SIDE), pair.target(SIDE)
        assert np.all(gray == gray[..., :1]) and np.any(colour != colour[..., :1])
        assert np.abs(gray[..., 0] - colour @ np.array([0.2989, 0.587, 0.114])).max() <= 0.5


@pytest.fixture(scope="module")
def rendered():
    config = settings(benchmark="rendered", n_examples=3)
    return {source.name: source for source in benchmarks.rendered(config, 3)}


def test_rendered_tasks_show_the_same_scenes(rendered):
    pairs = {name: source.pairs for name, source in rendered.items() if source.pairs}
    assert set(pairs) | {"frames"} == set(rendered) == set(benchmarks.RENDERED)
    for i in range(3):
        image = pairs["depth"][i].input(SIDE)
        assert all(np.array_equal(pairs[name][i].input(SIDE), image) for name in ("segmentation", "normals", "edges"))
        assert np.array_equal(np.rot90(pairs["rotation"][i].target(SIDE), -1), image)
        assert np.array_equal(pairs["colorization"][i].target(SIDE), image)
        hidden, whole = pairs["inpainting"][i].input(SIDE), pairs["inpainting"][i].target(SIDE)
        assert np.array_equal(whole, image) and np.any(hidden != image)
        assert not hidden[np.any(hidden != image, axis=-1)].any()
    clip = [frame(SIDE) for frame in rendered["frames"].clips[0]]
    assert len(clip) == 3 and np.array_equal(clip[0], pairs["depth"][0].input(SIDE)) and np.any(clip[0] != clip[2])


def test_rendered_queries_differ_from_training_scenes_by_seed_and_by_split():
    for split in SPLITS:
        (source,) = benchmarks.rendered(settings(split=split, n_examples=1, tasks="depth"), 2)
        trained = [scenes.scene(seed * 10**6, SIDE)["image"] for seed in range(4)]
        assert not any(np.array_equal(source.pairs[0].input(SIDE), image) for image in trained)
