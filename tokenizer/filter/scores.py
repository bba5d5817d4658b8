"""Scores of an image: fields of the JSON file beside it, or columns of its row in a table.

A score is a number, a text that is one, or true and false as 1 and 0. `length(FIELD)` is the number of characters of a
text, such as a caption.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from EasyLM.errors import UserError, prefix_errors
from EasyLM.storage import parse_json
from tokenizer.filter.listing import Entry
from tokenizer.sources import table_files
from tokenizer.sources.reading import container_of, read_bytes

_LENGTH = re.compile(r"length\((.+)\)")


def parse_limits(flag: str, text: str) -> dict[str, float]:
    """Parses `aesthetic:5,length(caption):10` to the limit of each score.

    Raises:
      UserError: naming the flag, if an element is not NAME:NUMBER, or a name is repeated.
    """
    limits: dict[str, float] = {}
    for element in filter(None, (element.strip() for element in text.split(","))):
        name, _, number = element.rpartition(":")
        limit = _to_number(number)
        if not name or limit is None:
            raise UserError(f"--{flag}={text}: {element!r} must be FIELD:NUMBER, such as aesthetic:5.0")
        if name in limits:
            raise UserError(f"--{flag}={text}: {name} occurs twice")
        limits[name] = limit
    return limits


def field_of(score: str) -> str:
    """Returns the field, or column, of a score."""
    match = _LENGTH.fullmatch(score)
    return match[1] if match else score


def read_scores(entry: Entry, scores: Sequence[str]) -> dict[str, float | None]:
    """Returns the scores of an image; None: it has no such field, or the field is not a number.

    Raises:
      UserError: naming the file, if it cannot be read.
    """
    fields = _read_fields(entry, [field_of(score) for score in scores]) if scores else {}
    return {score: _score(score, fields.get(field_of(score))) for score in scores}


def _read_fields(entry: Entry, names: Sequence[str]) -> Mapping[str, Any]:
    if entry.sidecar:
        data = read_bytes(entry.sidecar, entry.sidecar_location)
        with prefix_errors(entry.sidecar):
            return parse_json(data)
    container = container_of(entry.address)
    is_row = container != entry.address and not container.lower().endswith(".tar")
    return table_files.read_values(container, int(entry.location), tuple(names)) if is_row else {}


def _score(score: str, value: Any) -> float | None:
    if _LENGTH.fullmatch(score):
        return float(len(value)) if isinstance(value, str) else None
    return _to_number(value)


def _to_number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
