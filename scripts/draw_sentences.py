"""Draws the first sentence of each JSONL file from its source images: one row per sentence, with its kind on the left.

    python scripts/draw_sentences.py --input_dir=DIR --names=depth,frames --output_file=sentences.png

`python -m tokenizer.detokenize` draws the decoded codes; this script draws the images that were encoded.
"""

import os

import numpy as np
from ml_collections import ConfigDict

from EasyLM.data import records
from EasyLM.flags import Flag, run
from EasyLM.vocab import CODEBOOK_SIZE
from tokenizer.builders import image_ref
from tokenizer.media import grids, images

SIDE = 64  # pixels
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
    rows = [
        (kind, np.stack([pixels for image in sentence for _, pixels in image_ref.read([image], SIDE)]))
        for kind, sentence in sentences
    ]
    images.save(config.output_file, grids.labelled_rows(rows, SIDE))


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
