"""Statistics of the sentences in files, as a table and as charts. Memory does not grow with the files."""

import collections
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from EasyLM.data.records import type_warning
from EasyLM.data.tokenizer_names import TOKENS_PER_IMAGE_KEY, tokenizer_of
from EasyLM.vocab import TOKENS_PER_IMAGE
from tokenizer.image_quality import code_usage
from tokenizer.media import charts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_KINDS = 1000  # counted by name; further kinds are counted together
OTHER_KINDS = "(others)"
NO_KIND = "(none)"
_BATCHED_IDS = 1 << 20  # ids counted at once
_BAR_CHARACTERS = 40  # of the longest bar in the table
_MAX_ROWS = 20  # of a table or a bar chart
_MAX_TOKENIZERS = 3  # in the table
_MAX_TICKS = 12  # labels along the x axis
_COLOUR = "#4272ae"


class BadLines:
    """Counts bad lines and lists the first ones."""

    def __init__(self, max_listed: int):
        self._max_listed = max_listed
        self._count = 0
        self._listed: list[str] = []

    def add(self, address: str, message: str) -> None:
        """Counts a line. See `read_sentences`."""
        self._count += 1
        if len(self._listed) < self._max_listed:
            self._listed.append(message)

    def statistics(self) -> dict[str, Any]:
        """Returns the count and the listed lines as JSON values."""
        return {"bad_lines": self._count, "first_bad_lines": self._listed}


class Summary:
    """Counts sentences as they are read.

    Args:
      tokens_per_image: codes of an image; None: what most records say, or TOKENS_PER_IMAGE if no record says it.
    """

    def __init__(self, vocab_size: int, codebook_size: int, tokens_per_image: int | None = None):
        self._codebook_size, self._tokens_per_image = codebook_size, tokens_per_image
        self._id_counts = np.zeros(vocab_size, np.int64)
        self._batch: list[np.ndarray] = []
        self._batch_ids = 0
        self._sentences = self._tokens = self._longest = self._alternate_zeros = 0
        self._shortest: int | None = None
        self._lengths: collections.Counter[int] = collections.Counter()  # tokens of a sentence -> sentences
        self._image_sizes: collections.Counter[int] = collections.Counter()  # tokens of an image -> sentences
        self._kinds: collections.Counter[str] = collections.Counter()
        self._tokenizers: collections.Counter[str] = collections.Counter()

    def add(self, ids: np.ndarray, record: Mapping[str, Any]) -> None:
        """Counts a sentence: its ids [n] and its record, which may contain a `kind`."""
        length = len(ids)
        self._sentences, self._tokens = self._sentences + 1, self._tokens + length
        self._longest = max(self._longest, length)
        self._shortest = length if self._shortest is None else min(self._shortest, length)
        self._alternate_zeros += bool(type_warning(ids))
        self._lengths[length] += 1
        if tokens_per_image := recorded_tokens_per_image(length, record):
            self._image_sizes[tokens_per_image] += 1
        _count(self._kinds, str(record.get("kind", NO_KIND)))
        _count(self._tokenizers, tokenizer_of(record) or NO_KIND)
        self._batch.append(ids)
        self._batch_ids += length
        if self._batch_ids > _BATCHED_IDS:
            self._count_batch()

    def code_counts(self) -> np.ndarray:
        """Returns the number of uses of each code, int64 [codebook_size]."""
        self._count_batch()
        return self._id_counts[: self._codebook_size]

    @property
    def tokens_per_image(self) -> int:
        """Codes of an image, from the constructor or the records so far."""
        recorded = self._image_sizes.most_common(1)
        return self._tokens_per_image or (recorded[0][0] if recorded else TOKENS_PER_IMAGE)

    def statistics(self) -> dict[str, Any]:
        """Returns all statistics as JSON values."""
        size = self.tokens_per_image
        in_images: collections.Counter[int] = collections.Counter()
        for length, count in self._lengths.items():
            in_images[length // size] += count
        codes = self.code_counts()
        codes_used = int(np.count_nonzero(codes))
        special = self._id_counts[self._codebook_size :]
        return {
            "sentences": self._sentences,
            "tokens": self._tokens,
            "shortest": self._shortest,
            "longest": self._longest,
            "mean_length": self._tokens / max(self._sentences, 1),
            "tokens_per_image": size,
            "not_whole_images": sum(count for length, count in self._lengths.items() if length % size),
            "alternate_zeros": self._alternate_zeros,
            "lengths_in_images": {str(length): in_images[length] for length in sorted(in_images)},
            "codes_used": codes_used,
            "codes_used_share": codes_used / self._codebook_size,
            "codes_perplexity": float(code_usage(codes)["code_perplexity"]) if codes_used else 0.0,
            "special_ids": {str(self._codebook_size + i): int(count) for i, count in enumerate(special) if count},
            "kinds": dict(self._kinds.most_common()),
            "tokenizers": dict(self._tokenizers.most_common()),
        }

    def _count_batch(self) -> None:
        if self._batch_ids:
            self._id_counts += np.bincount(np.concatenate(self._batch), minlength=len(self._id_counts))
        self._batch, self._batch_ids = [], 0


def recorded_tokens_per_image(length: int, record: Mapping[str, Any]) -> int:
    """Returns the codes of an image of a sentence of `length` tokens, as its record says; 0 if it does not say."""
    stated, sources = record.get(TOKENS_PER_IMAGE_KEY), record.get("sources")
    if type(stated) is int and stated > 0:
        return stated
    if isinstance(sources, list) and sources and length % len(sources) == 0:  # one source for each image
        return length // len(sources)
    return 0


def _count(counter: collections.Counter[str], name: str) -> None:
    counter[name if name in counter or len(counter) < MAX_KINDS else OTHER_KINDS] += 1


def table(statistics: Mapping[str, Any], codebook_size: int) -> str:
    """Formats the statistics of sentences and bad lines for a terminal."""
    values = {
        "files": f"{statistics['files']:,}",
        "sentences": f"{statistics['sentences']:,}",
        "tokens": f"{statistics['tokens']:,}",
        "shortest": f"{statistics['shortest'] or 0:,} tokens",
        "longest": f"{statistics['longest']:,} tokens",
        "average": f"{statistics['mean_length']:,.1f} tokens",
        "tokens per image": f"{statistics['tokens_per_image']:,}",
        "tokenizers": ", ".join(list(statistics["tokenizers"])[:_MAX_TOKENIZERS]),
        "codes used": f"{statistics['codes_used']:,} of {codebook_size:,} ({statistics['codes_used_share']:.1%})",
        "perplexity of codes": f"{statistics['codes_perplexity']:,.1f}",
        "special ids": f"{sum(statistics['special_ids'].values()):,}",
        "bad lines": f"{statistics['bad_lines']:,}",
    }
    lines = [f"{name:<20} {value}" for name, value in values.items()]
    if statistics["alternate_zeros"]:
        lines.append(
            f"every second id is 0 in {statistics['alternate_zeros']:,} sentences: are the ids 64-bit numbers?"
        )
    if statistics["not_whole_images"]:
        lines.append(
            f"{statistics['not_whole_images']:,} sentences are not a whole number of images, "
            f"{statistics['tokens_per_image']} tokens each (--tokens_per_image)"
        )
    lines += ["", "  images  sentences", *_text_bars(statistics["lengths_in_images"], 8)]
    width = max([len(kind) for kind in statistics["kinds"]] + [4])
    lines += ["", f"{'kind':{width}}  sentences", *_text_bars(statistics["kinds"], width)]
    lines += ["", *statistics["first_bad_lines"]] if statistics["bad_lines"] else []
    unlisted = statistics["bad_lines"] - len(statistics["first_bad_lines"])
    return "\n".join([*lines, *([f"and {unlisted:,} more bad lines"] if unlisted else [])])


def _text_bars(counts: Mapping[str, int], width: int) -> list[str]:
    """Returns a line for each of the first entries, and one with the number of further entries."""
    largest = max(counts.values(), default=1)
    lines = [
        f"{name:>{width}}  {count:>9,} {'#' * round(_BAR_CHARACTERS * count / largest)}"
        for name, count in list(counts.items())[:_MAX_ROWS]
    ]
    return lines + ([f"and {len(counts) - _MAX_ROWS:,} more"] if len(counts) > _MAX_ROWS else [])


def plot(statistics: Mapping[str, Any], code_counts: np.ndarray) -> "Figure":
    """Plots sentences by length, uses of each code (the most used first), and sentences by kind."""
    figure = charts.new_figure(8, 9)
    lengths, codes, kinds = figure.subplots(3)
    _plot_bars(lengths, "Sentences by length", "images", statistics["lengths_in_images"])
    uses = np.sort(code_counts[code_counts > 0])[::-1]
    codes.plot(np.arange(1, len(uses) + 1), uses, color=_COLOUR)
    codes.set_xlim(0, len(code_counts))
    if len(uses):
        codes.set_yscale("log")
    usage = f"{len(uses):,} of {len(code_counts):,} codes used, perplexity {statistics['codes_perplexity']:,.0f}"
    _label(codes, f"Uses of each code: {usage}", "codes, the most used first")
    _plot_bars(kinds, "Sentences by kind", "kind", dict(list(statistics["kinds"].items())[:_MAX_ROWS]))
    return figure


def _plot_bars(axes: "Axes", title: str, x_label: str, counts: Mapping[str, int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.bar(range(len(counts)), list(counts.values()), color=_COLOUR)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    ticks = range(0, len(counts), max(1, -(-len(counts) // _MAX_TICKS)))
    axes.set_xticks(ticks, [list(counts)[i] for i in ticks])
    _label(axes, title, x_label)


def _label(axes: "Axes", title: str, x_label: str) -> None:
    charts.style(axes)
    axes.set_title(title, fontsize=charts.TITLE_SIZE, loc="left")
    axes.set_xlabel(x_label, fontsize=charts.LABEL_SIZE)
