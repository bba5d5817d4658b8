"""Tasks of public data sets, read where they lie, and of rendered scenes, which need no download.

    rendered                 scenes of tokenizer/scenes.py with exact annotations: RENDERED
    pascal_segmentation      Pascal-5i (Shaban et al. 2017): an object of one of a fold's five classes, white on black
    pascal_detection         the same pictures where such a class has one object, below half the picture: its box
    imagenet_colorization    ImageNet's validation pictures, gray to colour

All but the first want `data_dir`: VOCdevkit/VOC2012, or the folder of ImageNet's pictures.
"""

import functools
import pathlib
import xml.etree.ElementTree
from collections.abc import Callable
from functools import partial

import numpy as np

from EasyLM.errors import UserError, choose
from evaluation.tasks.tasks import Pair, Source
from tokenizer.builders import views
from tokenizer.media import folders, images
from tokenizer.synthetic import SPLITS, scenes
from tokenizer.synthetic.seed_ranges import benchmark_seeds

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_FOLD = 5  # classes


def rendered(config, frames: int) -> list[Source]:
    """`tasks` of the rendered scenes of a `split`, as many examples as `n_examples`; others for each `seed`.

    Args:
      frames: of a clip, the one asked for included.

    Raises:
      UserError: naming the flag.
    """
    split = choose("--split", config.split, SPLITS)
    names = [name for name in config.tasks.split(",") if name] or list(RENDERED)
    seeds = benchmark_seeds(config.seed, config.n_examples)
    sources = []
    for name in names:
        figure, sides = RENDERED[choose("--tasks", name, RENDERED)]
        if sides is None:
            clips = [[partial(_frame, seed, split, frames, i) for i in range(frames)] for seed in seeds]
            sources.append(Source(name, figure, clips=clips))
        else:
            pairs = [Pair(*(partial(_view, view, seed, split) for view in sides)) for seed in seeds]
            sources.append(Source(name, figure, pairs=pairs))
    return sources


@functools.lru_cache(maxsize=4096)
def _scene(seed: int, size: int, split: str) -> dict[str, np.ndarray]:
    return scenes.scene(seed, size, split)


@functools.lru_cache(maxsize=512)
def _clip(seed: int, size: int, frames: int, split: str) -> list[np.ndarray]:
    return [moment["image"] for moment in scenes.clip(seed, size, frames, split)]


def _frame(seed: int, split: str, frames: int, number: int, size: int) -> np.ndarray:
    return _clip(seed, size, frames, split)[number]


def _view(view: Callable, seed: int, split: str, size: int) -> np.ndarray:
    return view(_scene(seed, size, split), np.random.default_rng([seed, 5]))


def _part(name: str) -> Callable:
    return lambda scene, rng: scene[name]


def _hole(scene: dict, rng: np.random.Generator) -> np.ndarray:
    return views.with_hole(scene["image"], rng)


# name: (figure, views of a scene that are the prompt's image and its annotation); without views: the next frame.
RENDERED: dict[str, tuple[str, tuple[Callable, Callable] | None]] = {
    "segmentation": ("scene_iou", (_part("image"), _part("segmentation"))),
    "depth": ("depth_abs_rel", (_part("image"), _part("depth"))),
    "normals": ("normal_degrees", (_part("image"), _part("normals"))),
    "edges": ("edge_f_score", (_part("image"), _part("edges"))),
    "colorization": ("", (lambda scene, rng: views.gray(scene["image"]), _part("image"))),
    "inpainting": ("", (_hole, _part("image"))),
    "rotation": ("", (_part("image"), lambda scene, rng: np.rot90(scene["image"]))),  # a quarter, counterclockwise
    "frames": ("", None),
}


def pascal_segmentation(config, frames: int) -> list[Source]:
    """Each (validation picture, class of the fold that it shows) is an example; its shots are of the same class.

    Raises:
      UserError: naming the file that is missing or broken.
    """
    root, names, ids = _voc(config)
    pairs = []
    for name in names:
        mask = _voc_mask(root, name)
        with images.open_image(mask) as image:
            present = np.unique(np.asarray(image))
        picture = partial(images.read, _existing(root / "JPEGImages" / f"{name}.jpg"))
        pairs += [Pair(picture, partial(_class_mask, mask, i), VOC_CLASSES[i - 1]) for i in ids if i in present]
    return [Source("pascal_segmentation", "mask_iou", pairs=pairs)]


def pascal_detection(config, frames: int) -> list[Source]:
    """The same for boxes: pictures in which a class of the fold has one object, whose box is below half the picture.

    Raises:
      UserError: naming the file that is missing or broken.
    """
    root, names, ids = _voc(config)
    wanted = {VOC_CLASSES[i - 1] for i in ids}
    pairs = []
    for name in names:
        size, boxes = _voc_boxes(_existing(root / "Annotations" / f"{name}.xml"))
        for kind in sorted(wanted & boxes.keys()):
            left, top, right, bottom = boxes[kind][0]
            if len(boxes[kind]) == 1 and (right - left) * (bottom - top) < size[0] * size[1] / 2:
                picture = partial(images.read, _existing(root / "JPEGImages" / f"{name}.jpg"))
                pairs.append(Pair(picture, partial(_box, size, boxes[kind][0]), kind))
    return [Source("pascal_detection", "mask_iou", pairs=pairs)]


def imagenet_colorization(config, frames: int) -> list[Source]:
    """Pictures of a folder and the folders below it, gray as the image, colour as the annotation.

    Raises:
      UserError: if there is no picture.
    """
    paths = folders.list_images(config.data_dir, "data_dir")
    pairs = [Pair(partial(_gray, path), partial(images.read, path)) for path in paths]
    return [Source("imagenet_colorization", "", pairs=pairs)]


BENCHMARKS: dict[str, Callable[..., list[Source]]] = {
    "rendered": rendered,
    "pascal_segmentation": pascal_segmentation,
    "pascal_detection": pascal_detection,
    "imagenet_colorization": imagenet_colorization,
}


def _voc(config) -> tuple[pathlib.Path, list[str], range]:
    """The data set's folder, the names of its validation pictures and the label ids of the fold's classes."""
    folds = len(VOC_CLASSES) // _FOLD
    if not 0 <= config.fold < folds:
        raise UserError(f"--fold={config.fold}: must be 0..{folds - 1}")
    root = pathlib.Path(config.data_dir)
    listed = _existing(root / "ImageSets" / "Segmentation" / "val.txt")
    names = listed.read_text(encoding="utf-8").split()
    return root, names, range(_FOLD * config.fold + 1, _FOLD * config.fold + _FOLD + 1)


def _existing(path: pathlib.Path) -> pathlib.Path:
    if not path.is_file():
        raise UserError(f"{path}: no such file (--data_dir is the folder VOCdevkit/VOC2012)")
    return path


def _voc_mask(root: pathlib.Path, name: str) -> pathlib.Path:
    """The picture's labels: of SBD's larger set, where it is there."""
    larger = root / "SegmentationClassAug" / f"{name}.png"
    return larger if larger.is_file() else _existing(root / "SegmentationClass" / f"{name}.png")


def _class_mask(path: pathlib.Path, label: int, size: int) -> np.ndarray:
    return _white(views.label_ids(path, size) == label)


def _gray(path: pathlib.Path, size: int) -> np.ndarray:
    return views.gray(images.read(path, size))


def _voc_boxes(path: pathlib.Path) -> tuple[tuple[int, int], dict[str, list[tuple[int, ...]]]]:
    """(width, height) of a picture and (left, top, right, bottom) of its objects, by class. The file counts from 1."""
    try:
        tree = xml.etree.ElementTree.parse(path)
        size = int(tree.findtext("size/width", "")), int(tree.findtext("size/height", ""))
        boxes: dict[str, list[tuple[int, ...]]] = {}
        for thing in tree.iter("object"):
            low, high = (
                [round(float(thing.findtext(f"bndbox/{name}", ""))) for name in names]
                for names in (("xmin", "ymin"), ("xmax", "ymax"))
            )
            boxes.setdefault(thing.findtext("name", ""), []).append((low[0] - 1, low[1] - 1, *high))
    except (xml.etree.ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path}: not an annotation of Pascal VOC ({error})") from error
    return size, boxes


def _box(extent: tuple[int, int], box: tuple[int, ...], size: int) -> np.ndarray:
    left, top, right, bottom = (round(edge * size / extent[i % 2]) for i, edge in enumerate(box))
    mask = np.zeros((size, size), bool)
    mask[top : max(bottom, top + 1), left : max(right, left + 1)] = True
    return _white(mask)


def _white(mask: np.ndarray) -> np.ndarray:
    return np.repeat(np.where(mask, np.uint8(255), np.uint8(0))[..., None], 3, axis=-1)
