"""Benchmarks: tiny data sets in the layouts of Pascal VOC and ImageNet, and rendered scenes."""

import numpy as np
import pytest
from PIL import Image
from tokenizer_kit import write_image

from EasyLM.errors import UserError
from evaluation.tasks import benchmarks, metrics, pascal, rendered
from evaluation.tasks.benchmarks import BenchmarkSettings
from tokenizer.synthetic import SPLITS, scenes

SIDE = 24


def write_voc(root, name: str, labels: np.ndarray, objects=()) -> None:
    """Writes an image of Pascal VOC with labels and boxes, and appends it to the list."""
    write_image(root / "JPEGImages" / f"{name}.jpg", seed=len(name), size=40)
    path = root / "SegmentationClass" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    label_image = Image.fromarray(labels.astype(np.uint8), "P")
    label_image.putpalette([value for i in range(256) for value in (i, 255 - i, i // 2)])
    label_image.save(path)
    elements = "".join(
        f"<object><name>{kind}</name><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax>"
        f"<ymax>{box[3]}</ymax></bndbox><part><name>head</name></part></object>"
        for kind, box in objects
    )
    height, width = labels.shape
    text = f"<annotation><size><width>{width}</width><height>{height}</height></size>{elements}</annotation>"
    (root / "Annotations").mkdir(exist_ok=True)
    (root / "Annotations" / f"{name}.xml").write_text(text)
    list_file = root / "ImageSets" / "Segmentation" / "val.txt"
    list_file.parent.mkdir(parents=True, exist_ok=True)
    with open(list_file, "a") as file:
        file.write(name + "\n")


def test_pascal_segmentation_has_a_pair_for_each_class_of_the_fold(tmp_path):
    labels = np.zeros((48, 48), int)
    labels[:24, :24], labels[24:, :24] = 6, 10  # bus and cow: the first and the last of fold 1
    labels[:24, 24:], labels[24:, 24:] = 5, 255  # a bottle, of fold 0, and undecided pixels
    write_voc(tmp_path, "one", labels)
    write_voc(tmp_path, "none", np.where(labels > 0, 1, 0))  # an aeroplane: fold 0
    pairs = pascal.segmentation(str(tmp_path), fold=1)
    assert [pair.group for pair in pairs] == ["bus", "cow"]
    for pair, label in zip(pairs, (6, 10), strict=True):
        mask = pair.target(SIDE)
        assert np.array_equal(mask[..., 0] == 255, labels[::2, ::2] == label) and set(np.unique(mask)) == {0, 255}
        assert pair.input(SIDE).shape == (SIDE, SIDE, 3)
    (source,) = benchmarks.sources("pascal_segmentation", BenchmarkSettings(data_dir=str(tmp_path), fold=1), 2)
    assert source.metric in metrics.TASK_METRICS and len(source.pairs) == 2


def test_pascal_prefers_the_larger_set_of_labels(tmp_path):
    write_voc(tmp_path, "one", np.full((48, 48), 6))
    larger = tmp_path / "SegmentationClassAug" / "one.png"
    larger.parent.mkdir()
    Image.fromarray(np.full((48, 48), 7, np.uint8)).save(larger)
    assert [pair.group for pair in pascal.segmentation(str(tmp_path), fold=1)] == ["car"]


def test_pascal_detection_takes_single_objects_below_half_the_image(tmp_path):
    empty = np.zeros((60, 48), int)
    write_voc(tmp_path, "good", empty, [("dog", (1, 1, 24, 30)), ("person", (1, 1, 4, 4)), ("person", (9, 9, 12, 12))])
    write_voc(tmp_path, "large", empty, [("dog", (1, 1, 48, 40))])
    write_voc(tmp_path, "other", empty, [("bird", (1, 1, 9, 9))])
    (pair,) = pascal.detection(str(tmp_path), fold=2)  # two persons in one image; the dog of `large` is too large
    assert pair.group == "dog"
    mask = pair.target(SIDE)[..., 0] == 255
    assert mask[:12, :12].all() and mask.sum() == 144  # the top left quarter, whatever the aspect ratio


def test_missing_and_invalid_files_of_pascal_are_named(tmp_path):
    with pytest.raises(UserError, match=r"val\.txt: no such file"):
        pascal.segmentation(str(tmp_path), fold=0)
    write_voc(tmp_path, "one", np.zeros((48, 48), int))
    (tmp_path / "Annotations" / "one.xml").write_text("<annotation>")
    with pytest.raises(UserError, match=r"one\.xml: not an annotation"):
        pascal.detection(str(tmp_path), fold=0)


def test_imagenet_colorization_pairs_gray_and_colour_of_an_image(tmp_path):
    write_image(tmp_path / "n01440764" / "ILSVRC2012_val_00000293.JPEG", seed=1)
    write_image(tmp_path / "ILSVRC2012_val_00000002.JPEG", seed=2)
    (source,) = benchmarks.sources("imagenet_colorization", BenchmarkSettings(data_dir=str(tmp_path)), 2)
    assert len(source.pairs) == 2
    for pair in source.pairs:
        gray, colour = pair.input(SIDE), pair.target(SIDE)
        assert np.all(gray == gray[..., :1]) and np.any(colour != colour[..., :1])
        assert np.abs(gray[..., 0] - colour @ np.array([0.2989, 0.587, 0.114])).max() <= 0.5


@pytest.fixture(scope="module")
def rendered_tasks():
    settings = BenchmarkSettings(n_examples=3)
    return {source.name: source for source in benchmarks.sources("rendered", settings, 3)}


def test_rendered_tasks_share_their_scenes(rendered_tasks):
    pairs = {name: source.pairs for name, source in rendered_tasks.items() if source.pairs}
    assert set(pairs) | {"frames"} == set(rendered_tasks) == set(rendered.VIEWS)
    for i in range(3):
        image = pairs["depth"][i].input(SIDE)
        assert all(np.array_equal(pairs[name][i].input(SIDE), image) for name in ("segmentation", "normals", "edges"))
        assert np.array_equal(np.rot90(pairs["rotation"][i].target(SIDE), -1), image)
        assert np.array_equal(pairs["colorization"][i].target(SIDE), image)
        hidden, whole = pairs["inpainting"][i].input(SIDE), pairs["inpainting"][i].target(SIDE)
        assert np.array_equal(whole, image) and np.any(hidden != image)
        assert not hidden[np.any(hidden != image, axis=-1)].any()
    clip = [frame(SIDE) for frame in rendered_tasks["frames"].clips[0]]
    assert len(clip) == 3 and np.array_equal(clip[0], pairs["depth"][0].input(SIDE)) and np.any(clip[0] != clip[2])


def test_rendered_scenes_of_every_split_differ_from_training_scenes():
    for split in SPLITS:
        (source,) = rendered.sources(["depth"], split, seed=0, num_examples=1, frames=2)
        trained = [scenes.scene(seed * 10**6, SIDE)["image"] for seed in range(4)]
        assert not any(np.array_equal(source.pairs[0].input(SIDE), image) for image in trained)
