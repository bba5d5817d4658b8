"""Sentences to pictures to look at: `python -m tokenizer.detokenize --input_file=F.jsonl --output_dir=D`.

Writes one PNG a sentence, `000000.png` for the first, its pictures in rows.
"""

import itertools
import os

import numpy as np
from tqdm import tqdm

from EasyLM import records
from EasyLM.errors import UserError
from EasyLM.flags import Flag, run
from tokenizer import images
from tokenizer.codec import CODEC_FLAGS, Codec

FLAGS = {
    "input_file": Flag("", "JSONL file of sentences."),
    "output_dir": Flag("", "Folder for the PNG files."),
    "limit": Flag(0, "Draw only the first so many sentences; 0: all."),
    "columns": Flag(8, "Pictures in a row."),
    **CODEC_FLAGS,
}


def main(config) -> None:
    """Draws the sentences."""
    for name in ("input_file", "output_dir"):
        if not config[name]:
            raise UserError(f"--{name} is missing")
    for name, least in {"limit": 0, "columns": 1}.items():
        if config[name] < least:
            raise UserError(f"--{name}={config[name]}: must be at least {least}")
    codec = Codec(config.vqgan, config.dtype, config.batch_size)
    lines = records.read_records(config.input_file, codec.config.num_embeddings)
    count = 0
    for tokens, _ in tqdm(itertools.islice(lines, config.limit or None), unit="sentence"):
        picture = draw(codec, tokens, config.columns, f"{config.input_file}: sentence {count + 1}")
        images.save(os.path.join(config.output_dir, f"{count:06d}.png"), picture)
        count += 1
    print(f"{config.output_dir}: {count} pictures")


def draw(codec: Codec, tokens: np.ndarray, columns: int, source: str) -> np.ndarray:
    """The pictures of a sentence's tokens [n*N] in rows, as bytes [height,width,3].

    Raises:
      UserError: naming `source`, if the tokens are not whole pictures of this tokenizer.
    """
    each = codec.config.tokens_per_image
    if len(tokens) == 0 or len(tokens) % each:
        raise UserError(f"{source}: {len(tokens)} tokens are no whole number of pictures, {each} tokens each")
    pictures = images.to_uint8(codec.decode(tokens.reshape(-1, each)))
    return images.grid(pictures, min(columns, len(pictures)))


if __name__ == "__main__":
    run(main, FLAGS)
