"""Draws the first sentence of each JSONL file from its source images: one row per sentence, with its kind on the left.

    python scripts/draw_sentences.py --input_dir=DIR --names=depth,frames --output_file=sentences.png

`python -m tokenizer.detokenize` draws the decoded codes; this script draws the images that were encoded.
"""

import os

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from EasyLM.data import records
from EasyLM.flags import Flag, run
from EasyLM.vocab import CODEBOOK_SIZE
from tokenizer.builders import image_ref
from tokenizer.media import grids, images

SIDE, GAP, LABEL_WIDTH = 64, 4, 128  # pixels
MOST_IMAGES = 12  # in a row

FLAGS = {
    "input_dir": Flag("", "Directory of the JSONL files.", required=True),
    "names": Flag("", "Comma list of the files to draw, without .jsonl.", required=True),
    "output_file": Flag("", "Image file to write.", required=True),
}


def main(config: ConfigDict) -> None:
    """Draws the sentences."""
    sentences = []
    for name in config.names.split(","):
        path = os.path.join(config.input_dir, f"{name}.jsonl")
        _, record = next(iter(records.read_records(path, CODEBOOK_SIZE)))
        sentences.append((record["kind"], image_ref.from_record(record)[:MOST_IMAGES]))
    longest = max(len(sentence) for _, sentence in sentences)
    rows = []
    for kind, sentence in sentences:
        row = np.full((longest, SIDE, SIDE, 3), 255, np.uint8)
        for i, image in enumerate(sentence):
            row[i] = image_ref.read([image], SIDE)[0]
        rows.append(np.concatenate([_label(kind), grids.grid(row, longest, GAP)], axis=1))
    gap = np.full((GAP, rows[0].shape[1], 3), 255, np.uint8)
    images.save(config.output_file, np.concatenate([part for row in rows for part in (row, gap)][:-1]))


def _label(text: str) -> np.ndarray:
    canvas = Image.new("RGB", (LABEL_WIDTH, SIDE), "white")
    ImageDraw.Draw(canvas).text((2, SIDE // 2), text, fill="black", font=ImageFont.load_default(14), anchor="lm")
    return np.asarray(canvas)


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
