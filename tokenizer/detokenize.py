"""Sentences to pictures to look at: `python -m tokenizer.detokenize --input_file=F.jsonl --output_dir=D`.

`--format=png` draws a sentence a file, `000000.png` for the first, its pictures in rows; `mp4` and `gif` play them one
after the other; `html` makes one sheet, `sentences.html`, with the kind and the sources of each, that needs no other
file. Sentences are numbered from 0 in the order of the file.
"""

import base64
import html
import io
import os
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image
from tqdm import tqdm

from EasyLM.errors import UserError
from EasyLM.flags import Flag, run
from EasyLM.storage import atomic_path, file_version
from tokenizer.media import grids, images, video_writer
from tokenizer.sentence_files import reader
from tokenizer.vqgan import CODEC_FLAGS, Codec

SHEET = "sentences.html"
THUMBNAIL = 128  # pixels, of a picture on the sheet
Sentence = tuple[int, np.ndarray, dict]  # its number, its pictures as bytes [n,S,S,3], what rode along with its ids


def main(config) -> None:
    """Draws the sentences."""
    parse_ranges(config.sentences)  # before the model is loaded
    file_version(config.input_file)
    codec = Codec(config.vqgan, config.dtype, config.batch_size)
    lines = reader.read(config.input_file, codec.config.num_embeddings)
    chosen = choose(lines, config)
    drawn = (
        (number, pictures_of(codec, ids, f"{config.input_file}: sentence {number}"), record)
        for number, ids, record in tqdm(chosen, unit=" sentences", desc="drawing")
    )
    count = WRITERS[config.format](drawn, config)
    print(f"{config.output_dir}: {count} sentences")


def parse_ranges(text: str) -> list[tuple[int, int]]:
    """`0,5,10-20` as first and last numbers; empty: none, which means all.

    Raises:
      UserError: naming the flag and the part that is no number or range.
    """
    ranges = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)) or (dash and int(last) < int(first)):
            raise UserError(f"--sentences={text}: cannot read {part!r}: give numbers from 0 and ranges, as 0,5,10-20")
        ranges.append((int(first), int(last) if dash else int(first)))
    return ranges


def choose(lines: Iterable, config) -> Iterator[tuple]:
    """Yields (number, ids, record) of the sentences that the flags ask for, and reads no further than the last.

    Raises:
      UserError: if the file ends before the last one of --sentences, or none is of --kinds.
    """
    ranges, kinds = parse_ranges(config.sentences), {kind.strip() for kind in config.kinds.split(",") if kind.strip()}
    last = max((high for _, high in ranges), default=None)
    number, count, seen = -1, 0, set()
    for number, (ids, record) in enumerate(lines):
        kind = str(record.get("kind", ""))
        seen.add(kind)
        in_range = not ranges or any(low <= number <= high for low, high in ranges)
        if in_range and (not kinds or kind in kinds):
            yield number, ids, record
            count += 1
        if number == last or (config.limit and count == config.limit):
            break
    else:
        if last is not None:
            raise UserError(f"--sentences={config.sentences}: {config.input_file} ends with sentence {number}")
    if not count:
        asked = f"--kinds={config.kinds}" if kinds else f"--input_file={config.input_file}"
        there = f"there are {', '.join(sorted(map(repr, seen)))}" if seen else "it is empty"
        raise UserError(f"{asked}: no such sentence in {config.input_file}; {there}")


def pictures_of(codec: Codec, tokens: np.ndarray, source: str) -> np.ndarray:
    """The pictures of a sentence's tokens [n*N], as bytes [n,S,S,3].

    Raises:
      UserError: naming `source`, if the tokens are not whole pictures of this tokenizer.
    """
    each = codec.config.tokens_per_image
    if len(tokens) == 0 or len(tokens) % each:
        raise UserError(f"{source}: {len(tokens)} tokens are no whole number of pictures, {each} tokens each")
    return images.to_uint8(codec.decode(tokens.reshape(-1, each)))


def draw(codec: Codec, tokens: np.ndarray, columns: int, source: str) -> np.ndarray:
    """`pictures_of` in rows, as bytes [height,width,3]."""
    return in_rows(pictures_of(codec, tokens, source), columns)


def in_rows(pictures: np.ndarray, columns: int) -> np.ndarray:
    """Pictures [n,S,S,3] in rows of at most so many."""
    return grids.grid(pictures, min(columns, len(pictures)))


def write_pictures(sentences: Iterable[Sentence], config) -> int:
    """A PNG file a sentence; returns how many."""
    count = 0
    for number, pictures, _ in sentences:
        images.save(os.path.join(config.output_dir, f"{number:06d}.png"), in_rows(pictures, config.columns))
        count += 1
    return count


def write_videos(sentences: Iterable[Sentence], config) -> int:
    """A video or an animation a sentence; returns how many."""
    count = 0
    for number, pictures, _ in sentences:
        video_writer.write(os.path.join(config.output_dir, f"{number:06d}.{config.format}"), pictures, config.fps)
        count += 1
    return count


HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px sans-serif; margin: 2em; }}
section {{ display: flex; flex-wrap: wrap; gap: 6px; margin: 0 0 2em; }}
h2 {{ font-size: 1.1em; width: 100%; margin: 0; }}
figure {{ margin: 0; width: {width}px; }}
img {{ width: {width}px; image-rendering: pixelated; }}
figcaption {{ font-size: 11px; overflow-wrap: anywhere; color: #555; }}
</style></head><body><h1>{title}</h1>
"""


def write_sheet(sentences: Iterable[Sentence], config) -> int:
    """One HTML file with the pictures in it, written as they come; returns the number of sentences."""
    os.makedirs(config.output_dir, exist_ok=True)
    path = os.path.join(config.output_dir, SHEET)
    count = 0
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(HEAD.format(title=html.escape(os.path.basename(config.input_file)), width=THUMBNAIL))
        for number, pictures, record in sentences:
            file.write(section(number, pictures, record))
            count += 1
        file.write("</body></html>\n")
    return count


def section(number: int, pictures: np.ndarray, record: dict) -> str:
    """A sentence's part of the sheet: its kind, and each picture with its source."""
    kind, sources = record.get("kind", ""), record.get("sources", [])
    sources = [str(source) for source in sources] if isinstance(sources, list) else [str(sources)]
    seconds = record.get("seconds", [])
    if isinstance(seconds, list) and len(seconds) == len(sources):
        sources = [f"{source}, {second} s" for source, second in zip(sources, seconds)]  # frames of videos
    # A source a picture is its caption; any other number of them stands above.
    one_each = len(sources) == len(pictures)
    title = " &middot; ".join(html.escape(str(part)) for part in (f"sentence {number}", kind) if part != "")
    parts = [f"<section><h2>{title}</h2>\n"]
    if not one_each and sources:
        parts.append(f"<p>{html.escape(', '.join(sources))}</p>\n")
    for i, picture in enumerate(pictures):
        file, image = io.BytesIO(), Image.fromarray(picture)
        image.thumbnail((THUMBNAIL, THUMBNAIL))  # never larger than it was
        image.save(file, "PNG")
        caption = f"<figcaption>{html.escape(sources[i])}</figcaption>" if one_each else ""
        data = base64.b64encode(file.getvalue()).decode()
        parts.append(f'<figure><img alt="" src="data:image/png;base64,{data}">{caption}</figure>\n')
    return "".join([*parts, "</section>\n"])


WRITERS = {"png": write_pictures, "html": write_sheet, "mp4": write_videos, "gif": write_videos}

FLAGS = {
    "input_file": Flag("", "File of sentences: JSONL, also .gz and .zst, or packed.", required=True),
    "output_dir": Flag("", "Folder for what is drawn.", required=True),
    "format": Flag("png", "A PNG file, a video or an animation a sentence, or one sheet.", choices=tuple(WRITERS)),
    "sentences": Flag("", "Numbers and ranges of the sentences to draw, as 0,5,10-20; empty: all."),
    "kinds": Flag("", "Comma list: draw only sentences of these kinds; empty: of all."),
    "limit": Flag(0, "Draw only the first so many of them; 0: all.", least=0),
    "columns": Flag(8, "png: pictures in a row.", least=1),
    "fps": Flag(4.0, "mp4, gif: pictures a second.", above=0, most=100),
    **CODEC_FLAGS,
}


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
