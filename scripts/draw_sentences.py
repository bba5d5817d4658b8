"""Draws the first sentence of each JSONL file from its source pictures, one row a sentence, its kind beside it.

    python scripts/draw_sentences.py OUTPUT.png FILE.jsonl ...

`python -m tokenizer.detokenize` draws what the codes keep of them; this, what was meant.
"""

import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from EasyLM.data import records
from EasyLM.vocab import CODEBOOK_SIZE
from tokenizer.builders import image_ref
from tokenizer.media import grids, images

SIDE, GAP, LABEL, MOST = 64, 4, 128, 12  # pixels; pixels; pixels; pictures of a row


def main(output: str, paths: list[str]) -> None:
    sentences = []
    for path in paths:
        _, record = next(iter(records.read_records(path, CODEBOOK_SIZE)))
        sentences.append((record["kind"], image_ref.from_record(record)[:MOST]))
    longest = max(len(sentence) for _, sentence in sentences)
    rows = []
    for kind, sentence in sentences:
        row = np.full((longest, SIDE, SIDE, 3), 255, np.uint8)
        for i, picture in enumerate(sentence):
            row[i] = image_ref.read([picture], SIDE)[0]
        rows.append(np.concatenate([_label(kind), grids.grid(row, longest, GAP)], axis=1))
    between = np.full((GAP, rows[0].shape[1], 3), 255, np.uint8)
    images.save(output, np.concatenate([part for row in rows for part in (row, between)][:-1]))


def _label(text: str) -> np.ndarray:
    canvas = Image.new("RGB", (LABEL, SIDE), "white")
    ImageDraw.Draw(canvas).text((2, SIDE // 2), text, fill="black", font=ImageFont.load_default(14), anchor="lm")
    return np.asarray(canvas)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
