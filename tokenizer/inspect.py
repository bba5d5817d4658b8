"""What is in files of sentences: `python -m tokenizer.inspect --input_files='data/*.jsonl'`.

Sentences, tokens, lengths, kinds, how the codes are used, and bad lines by their address. The files are read once, in a
stream; what is held does not grow with them.
"""

import collections
import sys

import numpy as np
from tqdm import tqdm

from EasyLM.flags import Flag, run
from EasyLM.storage import check_output, expand_paths, write_json
from EasyLM.vocab import CODEBOOK_SIZE, TOKENS_PER_IMAGE, VOCAB_SIZE
from tokenizer.media import charts, images
from tokenizer.sentence_files import reader

FLAGS = {
    "input_files": Flag(
        "", "JSONL files, also .gz and .zst, and packed ones: a comma list of paths and globs.", required=True
    ),
    "vocab_size": Flag(VOCAB_SIZE, "A line with an id that is not below it is bad.", least=1),
    "codebook_size": Flag(CODEBOOK_SIZE, "Codes of the tokenizer; ids from there on are special.", least=1),
    "tokens_per_image": Flag(TOKENS_PER_IMAGE, "Codes of a picture, in which lengths are counted.", least=1),
    "max_listed": Flag(20, "Bad lines that are listed; all are counted.", least=0),
    "output_json": Flag("", "Write the figures to this file."),
    "output_picture": Flag("", "Write charts of lengths, codes and kinds to this picture file."),
}
MOST_KINDS = 1000  # told apart; a file with more has something else under that key
OTHER_KINDS = "(others)"
NO_KIND = "(none)"
_PENDING = 1 << 20  # ids counted at a time
_BAR = 40  # characters of the longest one in the table
_SHOWN = 20  # rows of a table


class BadLines:
    """All lines that are no records counted, the first ones kept; takes the place of `problems.Problems`."""

    def __init__(self, kept: int):
        self.count, self.first, self._kept = 0, [], kept

    def add(self, path: str, reason: str) -> None:
        self.count += 1
        if len(self.first) < self._kept:
            self.first.append(reason)


class Summary:
    """Counts over sentences, as they come."""

    def __init__(self, vocab_size: int, codebook_size: int, tokens_per_image: int):
        self._codebook, self._each = codebook_size, tokens_per_image
        self._ids = np.zeros(vocab_size, np.int64)
        self._pending, self._num_pending = [], 0
        self.sentences = self.tokens = self.not_whole = self.longest = 0
        self.shortest = None
        self.lengths: collections.Counter = collections.Counter()  # pictures -> sentences
        self.kinds: collections.Counter = collections.Counter()

    def add(self, ids: np.ndarray, record: dict) -> None:
        """Counts a sentence."""
        length = len(ids)
        self.sentences, self.tokens = self.sentences + 1, self.tokens + length
        self.longest = max(self.longest, length)
        self.shortest = length if self.shortest is None else min(self.shortest, length)
        self.not_whole += bool(length % self._each)
        self.lengths[length // self._each] += 1
        kind = str(record.get("kind", NO_KIND))
        known = kind in self.kinds or len(self.kinds) < MOST_KINDS
        self.kinds[kind if known else OTHER_KINDS] += 1
        self._pending.append(ids)
        self._num_pending += length
        if self._num_pending > _PENDING:
            self._count_pending()

    def counts(self) -> np.ndarray:
        """How often each id occurs, int64 [vocab_size]."""
        self._count_pending()
        return self._ids

    def figures(self) -> dict:
        """All that was counted, as JSON values."""
        codes = self.counts()[: self._codebook]
        used = int(np.count_nonzero(codes))
        shares = codes[codes > 0] / max(codes.sum(), 1)
        return {
            "sentences": self.sentences,
            "tokens": self.tokens,
            "shortest": self.shortest,
            "longest": self.longest,
            "mean_length": self.tokens / max(self.sentences, 1),
            "not_whole_images": self.not_whole,
            "lengths_in_images": {str(length): self.lengths[length] for length in sorted(self.lengths)},
            "codes_used": used,
            "codes_used_share": used / self._codebook,
            "codes_perplexity": float(np.exp(-(shares * np.log(shares)).sum())) if used else 0.0,
            "special_ids": {
                str(self._codebook + i): int(count) for i, count in enumerate(self._ids[self._codebook :]) if count
            },
            "kinds": dict(self.kinds.most_common()),
        }

    def _count_pending(self):
        if self._num_pending:
            self._ids += np.bincount(np.concatenate(self._pending), minlength=len(self._ids))
        self._pending, self._num_pending = [], 0


def main(config) -> None:
    """Reads the files and shows what is in them."""
    if config.output_json:
        check_output(config.output_json, "output_json")
    if config.output_picture:
        images.check_output(config.output_picture, "output_picture")
    paths = expand_paths("input_files", config.input_files)
    vocab_size = max(config.vocab_size, config.codebook_size)
    bad, summary = BadLines(config.max_listed), Summary(vocab_size, config.codebook_size, config.tokens_per_image)
    with tqdm(unit=" sentences", desc="reading", disable=not sys.stderr.isatty()) as bar:
        for path in paths:
            for ids, record in reader.read(path, config.vocab_size, bad):
                summary.add(ids, record)
                bar.update()
    figures = summary.figures() | {"files": len(paths), "bad_lines": bad.count, "first_bad_lines": bad.first}
    print(table(figures, config))
    if config.output_json:
        write_json(config.output_json, figures)
    if config.output_picture:
        images.save(config.output_picture, picture(figures, summary.counts()[: config.codebook_size]))


def table(figures: dict, config) -> str:
    """The figures to read in a terminal."""
    rows = {
        "files": f"{figures['files']:,}",
        "sentences": f"{figures['sentences']:,}",
        "tokens": f"{figures['tokens']:,}",
        "shortest": f"{figures['shortest'] or 0:,} tokens",
        "longest": f"{figures['longest']:,} tokens",
        "average": f"{figures['mean_length']:,.1f} tokens",
        "codes used": f"{figures['codes_used']:,} of {config.codebook_size:,} ({figures['codes_used_share']:.1%})",
        "perplexity of codes": f"{figures['codes_perplexity']:,.1f}",
        "special ids": f"{sum(figures['special_ids'].values()):,}",
        "bad lines": f"{figures['bad_lines']:,}",
    }
    lines = [f"{name:<20} {value}" for name, value in rows.items()]
    if figures["not_whole_images"]:
        lines.append(
            f"{figures['not_whole_images']:,} sentences are no whole number of pictures of {config.tokens_per_image} "
            "tokens (--tokens_per_image)"
        )
    lines += ["", "pictures  sentences", *_bars(figures["lengths_in_images"], 8)]
    width = max([len(kind) for kind in figures["kinds"]] + [4])
    lines += ["", f"{'kind':{width}}  sentences", *_bars(figures["kinds"], width)]
    lines += ["", *figures["first_bad_lines"]] if figures["bad_lines"] else []
    hidden = figures["bad_lines"] - len(figures["first_bad_lines"])
    return "\n".join([*lines, *([f"and {hidden:,} more bad lines"] if hidden else [])])


def _bars(counts: dict[str, int], width: int) -> list[str]:
    """A line an entry; of many, the last line says how many are not shown."""
    largest = max(counts.values(), default=1)
    shown = list(counts.items())[:_SHOWN]
    lines = [f"{name:>{width}}  {count:>9,} {'#' * round(_BAR * count / largest)}" for name, count in shown]
    return lines + ([f"and {len(counts) - _SHOWN:,} more"] if len(counts) > _SHOWN else [])


def picture(figures: dict, counts: np.ndarray) -> np.ndarray:
    """Charts of lengths, codes by rank, and kinds, as bytes [height,width,3]; `counts`: of each code."""
    by_rank = np.sort(counts)[::-1]
    lengths, kinds = figures["lengths_in_images"], dict(list(figures["kinds"].items())[:_SHOWN])
    used = f"{figures['codes_used']:,} of {len(counts):,} codes used, perplexity {figures['codes_perplexity']:,.0f}"
    return charts.draw(
        [
            charts.Panel("Sentences by length", "pictures", list(lengths), list(lengths.values())),
            charts.Panel(
                f"Uses of each code: {used}",
                "codes, the most used first",
                [str(rank + 1) for rank in range(len(by_rank))],
                by_rank[by_rank > 0].tolist(),
                curve=True,
                log=True,
            ),
            charts.Panel("Sentences by kind", "kind", list(kinds), list(kinds.values())),
        ]
    )


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
