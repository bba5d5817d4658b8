"""Writes decoded sentences atomically as image files, videos or one HTML page."""

import base64
import html
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from EasyLM.storage import atomic_path
from tokenizer.media import grids, images, video_writer

HTML_FILE = "sentences.html"
THUMBNAIL_SIDE = 128  # pixels of an image on the page
_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px sans-serif; margin: 2em; }}
section {{ display: flex; flex-wrap: wrap; gap: 6px; margin: 0 0 2em; }}
h2 {{ font-size: 1.1em; width: 100%; margin: 0; }}
figure {{ margin: 0; width: {width}px; }}
img {{ width: {width}px; image-rendering: pixelated; }}
figcaption {{ font-size: 11px; overflow-wrap: anywhere; color: #555; }}
</style></head><body><h1>{title}</h1>
"""


class DecodedSentence(NamedTuple):
    """A sentence: its number in the file, its images, uint8 [n,S,S,3], and the JSON object of its record."""

    number: int
    pixels: np.ndarray
    record: Mapping[str, Any]


def write_images(sentences: Iterable[DecodedSentence], directory: str, columns: int) -> int:
    """Writes one PNG file per sentence, in rows of at most `columns` images; returns the number of sentences."""
    count = 0
    for number, pixels_nSS3, _ in sentences:
        sheet = grids.grid(pixels_nSS3, min(columns, len(pixels_nSS3)))
        images.save(os.path.join(directory, f"{number:06d}.png"), sheet)
        count += 1
    return count


def write_videos(sentences: Iterable[DecodedSentence], directory: str, extension: str, fps: float) -> int:
    """Writes one video or animation per sentence; returns the number of sentences."""
    count = 0
    for number, pixels_nSS3, _ in sentences:
        video_writer.write(os.path.join(directory, f"{number:06d}.{extension}"), pixels_nSS3, fps)
        count += 1
    return count


def write_html(sentences: Iterable[DecodedSentence], directory: str, title: str) -> int:
    """Writes one HTML file that contains the images; returns the number of sentences."""
    os.makedirs(directory, exist_ok=True)
    count = 0
    with (
        atomic_path(os.path.join(directory, HTML_FILE)) as temporary,
        open(temporary, "w", encoding="utf-8") as file,
    ):
        file.write(_HEAD.format(title=html.escape(title), width=THUMBNAIL_SIDE))
        for sentence in sentences:
            file.write(_section(sentence))
            count += 1
        file.write("</body></html>\n")
    return count


def _section(sentence: DecodedSentence) -> str:
    """Returns the HTML of a sentence: its kind, and each image with its source."""
    kind, sources = sentence.record.get("kind", ""), _sources(sentence.record)
    is_captioned = len(sources) == len(sentence.pixels)  # otherwise one line above the images lists the sources
    title = " &middot; ".join(html.escape(str(part)) for part in (f"sentence {sentence.number}", kind) if part != "")
    parts = [f"<section><h2>{title}</h2>\n"]
    if sources and not is_captioned:
        parts.append(f"<p>{html.escape(', '.join(sources))}</p>\n")
    for i, pixels_SS3 in enumerate(sentence.pixels):
        thumbnail = Image.fromarray(pixels_SS3)
        thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))  # never enlarges
        data = base64.b64encode(images.png_bytes(thumbnail)).decode()
        caption = f"<figcaption>{html.escape(sources[i])}</figcaption>" if is_captioned else ""
        parts.append(f'<figure><img alt="" src="data:image/png;base64,{data}">{caption}</figure>\n')
    return "".join([*parts, "</section>\n"])


def _sources(record: Mapping[str, Any]) -> list[str]:
    """Returns the sources of a record, with the seconds of video frames. The fields can have any JSON type."""
    sources, seconds = record.get("sources", []), record.get("seconds", [])
    sources = [str(source) for source in sources] if isinstance(sources, list) else [str(sources)]
    if isinstance(seconds, list) and len(seconds) == len(sources):
        return [f"{source}, {second} s" for source, second in zip(sources, seconds)]
    return sources
