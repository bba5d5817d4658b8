"""Selects sentences of a file by number and kind."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from EasyLM.errors import UserError


class SelectionError(UserError):
    """A selection does not fit the file. The caller adds the file's name to the message."""


class NumberedSentence(NamedTuple):
    """A sentence: its number in the file (from 0), its ids [n], and the JSON object of its record."""

    number: int
    ids: np.ndarray
    record: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Selection:
    """Conditions for selecting a sentence.

    Attributes:
      ranges: (first number, last number) of each range; empty: all sentences.
      kinds: selected kinds; empty: all.
      limit: maximum number of selected sentences; 0: all.
    """

    ranges: tuple[tuple[int, int], ...] = ()
    kinds: frozenset[str] = frozenset()
    limit: int = 0


def parse_ranges(text: str) -> tuple[tuple[int, int], ...]:
    """Parses a comma list such as `0,5,10-20` to (first number, last number) pairs.

    Raises:
      UserError: naming the element that is neither a number nor a range.
    """
    ranges = []
    for element in filter(None, (element.strip() for element in text.split(","))):
        first, dash, last = element.partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)) or (dash and int(last) < int(first)):
            raise UserError(f"cannot read {element!r}: give numbers from 0 and ranges, such as 0,5,10-20")
        ranges.append((int(first), int(last) if dash else int(first)))
    return tuple(ranges)


def select(sentences: Iterable[tuple[np.ndarray, dict[str, Any]]], selection: Selection) -> Iterator[NumberedSentence]:
    """Yields the selected sentences of (ids, record). Stops reading after the last one.

    Raises:
      SelectionError: if the file ends before the last number of the ranges, or no sentence is selected.
    """
    last = max((high for _, high in selection.ranges), default=None)
    number, count, kinds = -1, 0, set()
    for number, (ids, record) in enumerate(sentences):
        kind = str(record.get("kind", ""))
        kinds.add(kind)
        in_range = not selection.ranges or any(low <= number <= high for low, high in selection.ranges)
        if in_range and (not selection.kinds or kind in selection.kinds):
            yield NumberedSentence(number, ids, record)
            count += 1
        if number == last or (selection.limit and count == selection.limit):
            break
    else:
        if last is not None and number >= 0:
            raise SelectionError(f"ends with sentence {number}, but sentence {last} is selected")
    if not count:
        if not kinds:
            raise SelectionError("contains no sentence")
        selected, present = (", ".join(sorted(map(repr, names))) for names in (selection.kinds, kinds))
        raise SelectionError(f"has no sentence of kind {selected} up to sentence {number}, only of kind {present}")
