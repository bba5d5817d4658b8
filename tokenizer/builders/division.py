"""Divides a build into parts: ranges of its examples, or the files of its sources.

A part is a function of the inputs, the settings and its number, not of the processes that build the parts.
"""

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

from EasyLM.data import proportional
from EasyLM.errors import UnavailableError, UserError, prefix_errors
from EasyLM.skipped_inputs import SkippedInputs, TooManySkippedError
from EasyLM.storage import file_version, json_digest
from tokenizer.builders.file_index import FileIndex
from tokenizer.builders.kinds import KINDS, DataSet
from tokenizer.builders.mixture_file import Entry
from tokenizer.builders.schedule import Slot, in_order, interleaved
from tokenizer.builders.settings import SentenceSettings
from tokenizer.builders.writing import BuildPlan
from tokenizer.sources import container_files
from tokenizer.sources.items import Source
from tokenizer.sources.keep_list import KeepList, KeptItems, OtherSourceError


class Inputs(NamedTuple):
    """A data set: its entry, the settings of its sentences, its sources, and which of their images to keep."""

    entry: Entry
    settings: SentenceSettings
    sources: Sequence[Source]
    keep_list: KeepList | None


@dataclasses.dataclass(frozen=True)
class Work:
    """What a part consists of.

    Attributes:
      plan: its sentences.
      skipped: the inputs that the listing has skipped.
      ignored: the number of files with other extensions, by extension.
      not_kept: the number of inputs that the keep lists leave out.
      repeats_images: whether an image can occur in several of the sentences.
    """

    plan: BuildPlan
    skipped: SkippedInputs
    ignored: Mapping[str, int]
    not_kept: int
    repeats_images: bool


class Division(Protocol):
    """The parts of a build.

    Attributes:
      count: their number.
    """

    count: int

    def fingerprint(self, part: int) -> dict[str, Any]:
        """Returns what determines the sentences of a part besides the flags, as JSON values. Lists no inputs.

        Raises:
          UnavailableError: if the store of the inputs cannot be reached.
        """
        ...

    def work(self, part: int) -> Work:
        """Returns what to build."""
        ...


class ByExamples:
    """Parts are equal ranges of the examples. Their files, concatenated, equal the file of a build in one part."""

    def __init__(self, inputs: Sequence[Inputs], n_epochs: int, seed: int, count: int, skipped: SkippedInputs):
        """Lists all inputs.

        Args:
          inputs: the data sets.
          n_epochs: passes over them.
          seed: of the order of several data sets.
          count: the number of parts.
          skipped: takes the unusable inputs.
        """
        self.count, self._skipped = count, skipped
        indexed = [_listed(one, skipped, container_files.names_of(one.sources[0]), is_whole=True) for one in inputs]
        self._data_sets = [data_set for data_set, _ in indexed]
        self._not_kept = sum(index.not_kept for _, index in indexed)
        self._ignored = dict(sum((Counter(index.ignored) for _, index in indexed), Counter()))
        sizes = [data_set.sampler.num_examples for data_set in self._data_sets]
        entries = [one.entry for one in inputs]
        counts = _counts(entries, sizes, n_epochs)
        self._total = sum(counts)
        self._schedule: Callable[[range], Iterator[Slot]] = in_order
        if entries[0].source_line:
            self._schedule = functools.partial(interleaved, counts, sizes, seed)
            self._digest: Any = [
                [index.digest, dict(entry.own), entry.weight] for entry, (_, index) in zip(entries, indexed)
            ]
        else:
            self._digest = indexed[0][1].digest
        repeats = any(count > size for count, size in zip(counts, sizes))
        self._repeats_images = repeats or any(KINDS[data_set.kind].repeats_images for data_set in self._data_sets)

    def fingerprint(self, part: int) -> dict[str, Any]:
        """Returns the digest of all inputs and the number of the part."""
        return {"inputs": self._digest, "shard": f"{part}/{self.count}"}

    def work(self, part: int) -> Work:
        """Returns a range of the examples."""
        examples = range(self._total * part // self.count, self._total * (part + 1) // self.count)
        plan = BuildPlan(self._data_sets, self._schedule, examples)
        return Work(plan, self._skipped.copy(), self._ignored, self._not_kept, self._repeats_images)


class ByFiles:
    """Each tar or table is a part, whose sentences are made of its own images. A process lists only what it builds."""

    def __init__(self, inputs: Inputs, n_epochs: int, max_errors: int):
        """Raises UserError naming a flag, if the sources are not of files, or have different numbers of them.

        Args:
          inputs: the data set. Part i has file i of each source.
          n_epochs: passes over each file.
          max_errors: of a part.
        """
        self._inputs, self._n_epochs, self._max_errors = inputs, n_epochs, max_errors
        self._paths = [container_files.paths_of(source) for source in inputs.sources]
        for source, paths in zip(inputs.sources, self._paths):
            if len(paths) != len(self._paths[0]):
                raise UserError(f"{source.flag}: has {len(paths)} files, but the inputs have {len(self._paths[0])}")
        self.count = len(self._paths[0])
        self._digest = json_digest(self._paths)
        self._container_names = container_files.names_of(inputs.sources[0])

    def fingerprint(self, part: int) -> dict[str, Any]:
        """Returns the digest of all paths, the versions of the part's own files, and its number."""
        versions = []
        for paths in self._paths:
            try:
                versions.append(file_version(paths[part]))
            except UnavailableError:
                raise
            except UserError:
                pass  # the file is missing, and is reported when it is listed
        keep_list = self._inputs.keep_list
        kept = {"kept": keep_list.digest()} if keep_list else {}
        return {"inputs": self._digest, "part_inputs": versions, **kept, "shard": f"{part}/{self.count}"}

    def work(self, part: int) -> Work:
        """Lists the files of a part. Files that make no sentence are skipped."""
        skipped = SkippedInputs(self._max_errors)
        files = [paths[part] for paths in self._paths]
        sources = [container_files.only_file(*both) for both in zip(self._inputs.sources, files)]
        # Otherwise the shuffles of parts of one size are the same.
        settings = dataclasses.replace(self._inputs.settings, seed=self._inputs.settings.seed + part)
        try:
            inputs = self._inputs._replace(settings=settings, sources=sources)
            data_set, index = _listed(inputs, skipped, self._container_names, is_whole=False)
        except (TooManySkippedError, OtherSourceError, UnavailableError):
            raise
        except UserError as error:
            skipped.add(files[0], f"{files[0]}: {error}")
            return Work(BuildPlan([], in_order, range(0)), skipped, {}, 0, False)
        plan = BuildPlan([data_set], in_order, range(self._n_epochs * data_set.sampler.num_examples))
        repeats_images = self._n_epochs > 1 or KINDS[data_set.kind].repeats_images
        return Work(plan, skipped, index.ignored, index.not_kept, repeats_images)


def naming(entry: Entry) -> contextlib.AbstractContextManager[None]:
    """Puts FILE:LINE of a data set before the message of a UserError raised inside."""
    return prefix_errors(entry.source_line) if entry.source_line else contextlib.nullcontext()


def _listed(
    inputs: Inputs, skipped: SkippedInputs, container_names: Mapping[str, str], is_whole: bool
) -> tuple[DataSet, FileIndex]:
    """Lists the sources of a data set.

    Args:
      inputs: the data set.
      skipped: takes the unusable inputs.
      container_names: of the files of the whole source of the inputs, as keep lists have them.
      is_whole: whether the sources are all of their files.
    """
    kind = inputs.entry.config.kind
    with naming(inputs.entry):
        kept_items = KeptItems(inputs.keep_list, container_names, is_whole) if inputs.keep_list else None
        index = FileIndex(KINDS[kind].layout, inputs.sources, skipped, kept_items)
        if inputs.keep_list:
            print(f"--keep={inputs.keep_list.path}: leaves out {index.not_kept} inputs")
        with prefix_errors("--", separator=""):
            return DataSet(kind, KINDS[kind].sampler(index, inputs.settings), inputs.settings), index


def _counts(entries: Sequence[Entry], sizes: Sequence[int], n_epochs: int) -> list[int]:
    """Returns the examples of each data set in the build, and prints those of --inputs.

    Args:
      entries: the data sets.
      sizes: their examples in an epoch.
      n_epochs: passes over them.
    """
    weights = [entry.weight for entry in entries if entry.weight is not None]
    for entry, size in zip(entries, sizes):
        if entry.source_line and not size:
            raise UserError(f"{entry.source_line}: has no input that can be used")
    counts = [n_epochs * size for size in sizes]
    if weights:
        exact = [Fraction(str(weight)) for weight in weights]
        passes = min(size * sum(exact) / weight for size, weight in zip(sizes, exact))
        counts = proportional(int(n_epochs * passes), weights)
    for entry, count, size in zip(entries, counts, sizes):
        if entry.source_line:
            times = f"{count / size:.2f} times"
            print(f"{entry.source_line}: {entry.config.kind}, {count} examples out of {size} ({times})")
    return counts
