"""Examples of Pascal VOC 2012, in the folds of Pascal-5i (Shaban et al. 2017), read from VOCdevkit/VOC2012."""

import pathlib
import xml.etree.ElementTree
from functools import partial

import numpy as np

from EasyLM.errors import UserError
from evaluation.tasks.tasks import Pair
from tokenizer.builders import views
from tokenizer.media import images

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_CLASSES_PER_FOLD = 5
NUM_FOLDS = len(CLASSES) // _CLASSES_PER_FOLD

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom exclusive


def segmentation(data_dir: str, fold: int) -> list[Pair]:
    """Returns a pair for each validation image and each class of the fold in it; its group is the class.

    The annotation shows the class in white.

    Raises:
      UserError: naming the file that is missing or invalid.
    """
    root, names = _validation_images(data_dir)
    pairs = []
    for name in names:
        label_file = _label_file(root, name)
        with images.open_image(label_file) as image:
            present = np.unique(np.asarray(image))
        loader = partial(images.read, _require(root / "JPEGImages" / f"{name}.jpg"))
        pairs += [
            Pair(loader, partial(_class_mask, label_file, label), CLASSES[label - 1])
            for label in _labels(fold)
            if label in present
        ]
    return pairs


def detection(data_dir: str, fold: int) -> list[Pair]:
    """Returns a pair for each class of the fold that has exactly one object in an image, below half its area.

    Raises:
      UserError: naming the file that is missing or invalid.
    """
    root, names = _validation_images(data_dir)
    fold_classes = {CLASSES[label - 1] for label in _labels(fold)}
    pairs = []
    for name in names:
        extent, boxes = _read_boxes(_require(root / "Annotations" / f"{name}.xml"))
        for class_name in sorted(fold_classes & boxes.keys()):
            left, top, right, bottom = boxes[class_name][0]
            if len(boxes[class_name]) == 1 and (right - left) * (bottom - top) < extent[0] * extent[1] / 2:
                loader = partial(images.read, _require(root / "JPEGImages" / f"{name}.jpg"))
                pairs.append(Pair(loader, partial(_box_mask, extent, boxes[class_name][0]), class_name))
    return pairs


def _labels(fold: int) -> range:
    """Returns the label ids of a fold's classes."""
    return range(_CLASSES_PER_FOLD * fold + 1, _CLASSES_PER_FOLD * (fold + 1) + 1)


def _validation_images(data_dir: str) -> tuple[pathlib.Path, list[str]]:
    root = pathlib.Path(data_dir)
    list_file = _require(root / "ImageSets" / "Segmentation" / "val.txt")
    return root, list_file.read_text(encoding="utf-8").split()


def _require(path: pathlib.Path) -> pathlib.Path:
    if not path.is_file():
        raise UserError(f"{path}: no such file (--data_dir is the folder VOCdevkit/VOC2012)")
    return path


def _label_file(root: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the label file of an image, from the larger set of SBD if it exists."""
    larger = root / "SegmentationClassAug" / f"{name}.png"
    return larger if larger.is_file() else _require(root / "SegmentationClass" / f"{name}.png")


def _read_boxes(path: pathlib.Path) -> tuple[tuple[int, int], dict[str, list[Box]]]:
    """Returns (width, height) of an image and the boxes of its objects by class. Coordinates in the file start at 1."""
    try:
        tree = xml.etree.ElementTree.parse(path)
        extent = int(tree.findtext("size/width", "")), int(tree.findtext("size/height", ""))
        boxes: dict[str, list[Box]] = {}
        for element in tree.iter("object"):
            left, top, right, bottom = (
                round(float(element.findtext(f"bndbox/{name}", ""))) for name in ("xmin", "ymin", "xmax", "ymax")
            )
            boxes.setdefault(element.findtext("name", ""), []).append((left - 1, top - 1, right, bottom))
    except (xml.etree.ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path}: not an annotation of Pascal VOC ({error})") from error
    return extent, boxes


def _class_mask(path: pathlib.Path, label: int, size: int) -> np.ndarray:
    return _to_white(views.label_ids(path, size) == label)


def _box_mask(extent: tuple[int, int], box: Box, size: int) -> np.ndarray:
    left, top, right, bottom = (round(edge * size / extent[i % 2]) for i, edge in enumerate(box))
    mask = np.zeros((size, size), bool)
    mask[top : max(bottom, top + 1), left : max(right, left + 1)] = True
    return _to_white(mask)


def _to_white(mask: np.ndarray) -> np.ndarray:
    """Converts a mask to an image, white on black: uint8 [S,S,3]."""
    return np.repeat(np.where(mask, np.uint8(255), np.uint8(0))[..., None], 3, axis=-1)
