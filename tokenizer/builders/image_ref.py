"""References to images: a file or a member of a container, a time in a video, a view.

Worker processes import this module to read images, so it must not import JAX.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from tokenizer.builders import views
from tokenizer.media import videos
from tokenizer.sources import reading


class ImageRef(NamedTuple):
    """An image of a sentence. Equal references have equal pixels.

    Attributes:
      path: the address of an image, or of a video if `seconds` is given.
      seconds: the time in the video.
      view: see `views.read`.
      argument: of the view: the seed of a random mask, or the range of a depth map; empty: none.
      location: where the image is in its container; empty: the image is a file, or the container is searched for it.
    """

    path: str
    seconds: float | None = None
    view: str = "plain"
    argument: str = ""
    location: str = ""


def to_record(refs: Iterable[ImageRef]) -> dict[str, Any]:
    """Returns the record fields that describe the images of a sentence.

    `seconds` and `views` are omitted if no image has them. A view with an argument is written as `hole:1234`.
    """
    refs = list(refs)
    fields: dict[str, Any] = {"sources": [ref.path for ref in refs]}
    if any(ref.seconds is not None for ref in refs):
        fields["seconds"] = [ref.seconds for ref in refs]
    if any(ref.view != "plain" for ref in refs):
        fields["views"] = [f"{ref.view}:{ref.argument}" if ref.argument else ref.view for ref in refs]
    return fields


def from_record(record: Mapping[str, Any]) -> list[ImageRef]:
    """Returns the images of a record: the inverse of `to_record`, without the locations, which only save time."""
    count = len(record["sources"])
    seconds = record.get("seconds", [None] * count)
    named = [view.partition(":") for view in record.get("views", ["plain"] * count)]
    return [
        ImageRef(path, second, view, argument)
        for path, second, (view, _, argument) in zip(record["sources"], seconds, named)
    ]


def group_by_file(refs: Iterable[ImageRef]) -> Iterator[list[ImageRef]]:
    """Yields groups for `read`: the frames of one video together, other images one by one."""
    frames: dict[str, list[ImageRef]] = {}
    for ref in refs:
        if ref.seconds is None:
            yield [ref]
        else:
            frames.setdefault(ref.path, []).append(ref)
    yield from frames.values()


def are_near(one: ImageRef, other: ImageRef) -> bool:
    """Whether one process should read two images: frames of a video, or near rows of a table.

    Another process would decode the same frames, or the same row group, again.
    """
    if one.seconds is not None:
        return one.path == other.path
    return reading.are_near_rows(one.path, one.location, other.path, other.location)


def read(group: list[ImageRef], size: int, fast_decode: bool = False) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (position in the group, pixels uint8 [size,size,3]) of frames of one video, or of other images.

    Args:
      group: the images.
      size: the side.
      fast_decode: see `images.read`. It does not apply to videos.

    Raises:
      UserError: naming the path, if it cannot be read.
    """
    first = group[0]
    if first.seconds is not None:
        video = reading.video_file(first.path, first.location)
        yield from videos.frames(video, [ref.seconds for ref in group if ref.seconds is not None], size)
        return
    for position, ref in enumerate(group):
        file = reading.open_item(ref.path, ref.location)
        yield position, views.read(ref.view, file, size, ref.argument, fast_decode)


def scenes(ref: ImageRef, split_at_cuts: bool) -> list[np.ndarray]:
    """Returns the times in seconds of the frames of each scene of a video, float64 [n], ascending.

    Without `split_at_cuts`, the whole video is a scene.

    Raises:
      UserError: naming the path, if it cannot be read.
    """
    video = reading.video_file(ref.path, ref.location)
    return videos.scenes(video) if split_at_cuts else [videos.timestamps(video)]
