"""A pool of rendered scenes, clips and photographs, from which many sentences are composed.

The pool is a folder of arrays that worker processes map into memory. It is a function of the first seed and of the
counts.
"""

import dataclasses
import os

import numpy as np

from EasyLM.process_pool import Workers
from EasyLM.progress import progress
from tokenizer.builders import views
from tokenizer.mappings import held_out, steps
from tokenizer.synthetic import layouts, photos, scenes

NUM_FRAMES = 16  # of a clip: a sentence
_PART = {"scenes": 64, "clips": 4, "photos": 64}  # items that a worker renders at a time
_VIEWS = {"scenes": steps.VIEWS, "photos": ("image", "gray"), "clips": ("image",)}  # views with codes, by group


@dataclasses.dataclass(frozen=True)
class PoolSettings:
    """What a pool contains: its counts, the first seed of its block, and the side of the images."""

    first_seed: int
    scenes: int
    clips: int
    photos: int
    size: int


class Pool:
    """The images of a pool. All views of all items are numbered from 0 on.

    Attributes:
      counts: number of items by group: "scenes", "clips", "photos".
      num_images: the number of images: views of scenes and photographs, and frames of clips.
      size: side of an image in pixels.
      shows: which scenes show a class, bool [scenes, labels].
    """

    def __init__(self, directory: str):
        names = {group: (*_VIEWS[group], "labels") if group == "scenes" else _VIEWS[group] for group in _VIEWS}
        self._arrays = {
            (group, name): np.asarray(np.load(_path(directory, group, name), mmap_mode="r"))
            for group in _VIEWS
            for name in names[group]
        }
        self.counts = {group: len(self._arrays[group, "image"]) for group in _VIEWS}
        labels = self._arrays["scenes", "labels"]
        self.size = labels.shape[1]
        self.shows = np.stack([(labels == label).any((1, 2)) for label in range(held_out.NUM_LABELS)], axis=1)
        self._images = [
            self._arrays[group, name].reshape(-1, self.size, self.size, 3) for group in _VIEWS for name in _VIEWS[group]
        ]
        ends = np.cumsum([len(array) for array in self._images])
        self._starts = np.concatenate([[0], ends[:-1]])
        self._start = dict(zip([(group, name) for group in _VIEWS for name in _VIEWS[group]], self._starts.tolist()))
        self.num_images = int(ends[-1])

    def scene(self, group: str, index: int) -> dict[str, np.ndarray]:
        """Returns the views of a scene or a photograph, and the labels of a scene."""
        return {name: array[index] for (name_of_group, name), array in self._arrays.items() if name_of_group == group}

    def number(self, group: str, view: str, index: int) -> int:
        """Returns the number of a view of a scene or a photograph."""
        return self._start[group, view] + index

    def frame_numbers(self, clip: int) -> range:
        """Returns the numbers of the frames of a clip."""
        first = self._start["clips", "image"] + clip * NUM_FRAMES
        return range(first, first + NUM_FRAMES)

    def pixels(self, numbers_n: np.ndarray) -> np.ndarray:
        """Returns the images with these numbers, uint8 [n,S,S,3]."""
        pixels_nSS3 = np.empty((len(numbers_n), self.size, self.size, 3), np.uint8)
        array_n = np.searchsorted(self._starts, numbers_n, side="right") - 1
        for array in np.unique(array_n):
            chosen = array_n == array
            pixels_nSS3[chosen] = self._images[array][numbers_n[chosen] - self._starts[array]]
        return pixels_nSS3


def render(settings: PoolSettings, directory: str, workers: Workers) -> None:
    """Renders a pool into a folder, with a progress bar.

    Raises:
      UserError: if there are photographs, and scikit-image or scikit-learn is not installed.
    """
    counts = {"scenes": settings.scenes, "clips": settings.clips, "photos": settings.photos}
    shape = (settings.size, settings.size)
    files = {}
    for group, count in counts.items():
        for name in _VIEWS[group]:
            frames = (NUM_FRAMES,) if group == "clips" else ()
            files[group, name] = _create(_path(directory, group, name), (count, *frames, *shape, 3))
    files["scenes", "labels"] = _create(_path(directory, "scenes", "labels"), (settings.scenes, *shape))
    parts = [
        (group, start, min(start + _PART[group], count))
        for group, count in counts.items()
        for start in range(0, count, _PART[group])
    ]
    groups, starts, stops = zip(*parts) if parts else ((), (), ())
    results = workers.map(_render_part, [settings] * len(parts), groups, starts, stops)
    with progress(total=sum(counts.values()), unit="scene", desc="rendering") as bar:
        for (group, start, stop), arrays in zip(parts, results):
            for name, array in arrays.items():
                files[group, name][start:stop] = array
            bar.update(stop - start)


def _path(directory: str, group: str, name: str) -> str:
    return os.path.join(directory, f"{group}_{name}.npy")


def _create(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Creates an array in a file: uint8 of this shape. Empty files cannot be mapped into memory."""
    if 0 in shape:
        array = np.zeros(shape, np.uint8)
        np.save(path, array)
        return array
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)


def _render_part(settings: PoolSettings, group: str, start: int, stop: int) -> dict[str, np.ndarray]:
    """Renders items of a group: the views of each, stacked by name."""
    function = {"scenes": _scene, "clips": _clip, "photos": _photo}[group]
    items = [function(settings.first_seed + index, settings.size) for index in range(start, stop)]
    return {name: np.stack([item[name] for item in items]) for name in items[0]}


def _scene(seed: int, size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([seed, 23])
    layout = layouts.random_layout(rng, held_out.training_style(rng))
    return steps.with_views(scenes.render(layout, 0, size))


def _clip(seed: int, size: int) -> dict[str, np.ndarray]:
    """Renders a clip. In half of them no solids collide; the others have as many solids as those of the benchmark."""
    rng = np.random.default_rng([seed, 31])
    style = held_out.training_style(rng)
    if rng.random() < 0.5:
        style = dataclasses.replace(style, horizon=NUM_FRAMES)
    layout = layouts.random_layout(rng, style)
    return {"image": np.stack([scenes.render(layout, frame, size)["image"] for frame in range(NUM_FRAMES)])}


def _photo(seed: int, size: int) -> dict[str, np.ndarray]:
    image = photos.crop(seed, size)
    return {"image": image, "gray": views.gray(image)}
