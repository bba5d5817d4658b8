"""Decodes sentences to viewable files: `python -m tokenizer.detokenize --input_file=F.jsonl --output_dir=D`.

`--format=png` writes one file per sentence, from `000000.png` on, with its images in rows. `mp4` and `gif` show the
images of a sentence as frames. `html` writes one self-contained page, `sentences.html`, with the kind and the sources
of each sentence. Sentences are numbered from 0 in the order of the file.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import einops
from ml_collections import ConfigDict

from EasyLM.data.tokenizer_names import TOKENIZER_KEY, tokenizer_of
from EasyLM.errors import UserError, prefix_errors
from EasyLM.flags import Flag, run
from EasyLM.progress import progress
from EasyLM.storage import file_version, lock_output_folder
from tokenizer.formats import ImageTokenizer
from tokenizer.media import images
from tokenizer.sentence_files import read_sentences, rendering
from tokenizer.sentence_files.rendering import DecodedSentence
from tokenizer.sentence_files.selection import Selection, SelectionError, parse_ranges, select
from tokenizer.vqgan import CODEC_FLAGS, Codec

FLAGS = {
    "input_file": Flag("", "File of sentences: JSONL, also .gz and .zst, or packed.", required=True),
    "output_dir": Flag("", "Folder for the images.", required=True),
    "format": Flag(
        "png", "A PNG file, video or animation per sentence, or one HTML page.", choices=("png", "html", "mp4", "gif")
    ),
    "sentences": Flag("", "Numbers and ranges of the sentences to decode, such as 0,5,10-20; empty: all."),
    "kinds": Flag("", "Comma list of the kinds of sentences to decode; empty: all."),
    "limit": Flag(0, "Maximum number of sentences to decode; 0: all.", least=0),
    "columns": Flag(8, "png: images in a row.", least=1),
    "fps": Flag(4.0, "mp4, gif: images per second.", above=0, most=100),
    **CODEC_FLAGS,
    "vqgan": Flag(
        "",
        "Folder of the tokenizer that made the sentences; empty: the one that ships with the project, if it did.",
        reads_local_disk=True,
    ),
}


def main(config: ConfigDict) -> None:
    """Decodes the selected sentences and writes their images."""
    with prefix_errors(f"--sentences={config.sentences}"):
        ranges = parse_ranges(config.sentences)  # before the model is loaded
    kinds = frozenset(kind.strip() for kind in config.kinds.split(",") if kind.strip())
    file_version(config.input_file)
    codec = Codec.from_flags(config)
    _check_first(codec, config.input_file, bool(config.vqgan))
    decoded = decode_sentences(codec, config.input_file, Selection(ranges, kinds, config.limit))
    with lock_output_folder(config.output_dir, "output_dir"):
        if config.format == "png":
            count = rendering.write_images(decoded, config.output_dir, config.columns)
        elif config.format == "html":
            count = rendering.write_html(decoded, config.output_dir, os.path.basename(config.input_file))
        else:
            count = rendering.write_videos(decoded, config.output_dir, config.format, config.fps)
    print(f"{config.output_dir}: {count} sentences")


def _check_first(codec: ImageTokenizer, path: str, is_chosen: bool) -> None:
    """Checks the tokenizer of the first sentence before its ids, which may be outside another tokenizer's codebook."""
    sentences = read_sentences(path, vocab_size=1 << 31, on_bad_line=lambda *bad_line: None)
    _, record = next(sentences, (None, {TOKENIZER_KEY: codec.digest}))
    _check_tokenizer(codec, path, 0, record)
    if tokenizer_of(record) is None and not is_chosen:
        print(
            f"warning: {path} does not name its tokenizer; decoding with the one that ships with the project (--vqgan)",
            file=sys.stderr,
        )


def _check_tokenizer(codec: ImageTokenizer, path: str, number: int, record: Mapping[str, Any]) -> None:
    name = tokenizer_of(record)
    if name not in (None, codec.digest):
        raise UserError(
            f"{path}: sentence {number} has tokens of the tokenizer {name}; --vqgan must name its folder, not that of "
            f"{codec.digest}"
        )


def decode_sentences(codec: ImageTokenizer, path: str, selection: Selection) -> Iterator[DecodedSentence]:
    """Yields the images of the selected sentences of a file.

    Raises:
      UserError: naming the file, for a bad line, a selection without sentences, a sentence of another tokenizer, or
        tokens that are not whole images.
    """
    tokens_per_image = codec.tokens_per_image
    sentences = read_sentences(path, codec.num_codes)
    try:
        for number, ids, record in progress(select(sentences, selection), unit=" sentences", desc="decoding"):
            _check_tokenizer(codec, path, number, record)
            if len(ids) == 0 or len(ids) % tokens_per_image:
                raise UserError(
                    f"{path}: sentence {number}: {len(ids)} tokens are not a whole number of images, "
                    f"{tokens_per_image} tokens each"
                )
            pixels_nSS3 = images.to_uint8(codec.decode(einops.rearrange(ids, "(n N) -> n N", N=tokens_per_image)))
            yield DecodedSentence(number, pixels_nSS3, record)
    except SelectionError as error:
        raise UserError(f"{path}: {error}") from None


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
