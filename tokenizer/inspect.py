"""Prints statistics of sentence files: `python -m tokenizer.inspect --input_files='data/*.jsonl'`.

Counts sentences, tokens, lengths, kinds and uses of the codes, and lists bad lines as `file:line`. Files are streamed
once, so memory does not grow with their size.
"""

from ml_collections import ConfigDict

from EasyLM.flags import Flag, run
from EasyLM.progress import progress
from EasyLM.storage import check_output, expand_paths, write_json
from EasyLM.vocab import CODEBOOK_SIZE, NUM_SPECIAL_IDS, TOKENS_PER_IMAGE, VOCAB_SIZE, vocabulary
from tokenizer.media import charts
from tokenizer.sentence_files import read_sentences
from tokenizer.sentence_files.summary import BadLines, Summary, plot, table

FLAGS = {
    "input_files": Flag(
        "", "JSONL files, also .gz and .zst, and packed files: a comma list of paths and globs.", required=True
    ),
    "vocab_size": Flag(
        0,
        f"Ids must be below it; lines with other ids are bad. 0: {VOCAB_SIZE}, or codebook_size + {NUM_SPECIAL_IDS} if "
        "that is more.",
        least=0,
    ),
    "codebook_size": Flag(CODEBOOK_SIZE, "Codes of the tokenizer; higher ids are special.", least=1),
    "tokens_per_image": Flag(
        None,
        f"Codes of an image, the unit of the listed lengths; none: the number in most records, or {TOKENS_PER_IMAGE} "
        "if no record states it.",
        least=1,
        type=int,
    ),
    "max_listed": Flag(20, "Maximum number of bad lines to list; all are counted.", least=0),
    "output_json": Flag("", "Write the statistics to this file."),
    "output_picture": Flag("", "Write charts of lengths, codes and kinds to this image file (needs matplotlib)."),
}


def main(config: ConfigDict) -> None:
    """Reads the files and prints their statistics."""
    if config.output_picture:
        charts.check_output(config.output_picture, "output_picture")
    paths = expand_paths("input_files", config.input_files)
    if config.output_json:
        check_output(config.output_json, "output_json", paths)
    vocab_size = config.vocab_size or max(VOCAB_SIZE, vocabulary(config.codebook_size).vocab_size)
    summary = Summary(max(vocab_size, config.codebook_size), config.codebook_size, config.tokens_per_image)
    bad_lines = BadLines(config.max_listed)
    with progress(unit=" sentences", desc="reading") as bar:
        for path in paths:
            for ids, record in read_sentences(path, vocab_size, bad_lines.add):
                summary.add(ids, record)
                bar.update()
    statistics = summary.statistics() | {"files": len(paths), **bad_lines.statistics()}
    print(table(statistics, config.codebook_size))
    if config.output_json:
        write_json(config.output_json, statistics)
    if config.output_picture:
        charts.save(plot(statistics, summary.code_counts()), config.output_picture)


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
