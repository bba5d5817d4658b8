"""Model cards: the README.md beside exported weights, with the metadata that the Hugging Face Hub reads.

A card states what its model's files and settings say. What they do not say is `NOT_STATED`.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.storage.json_files import parse_json

CARD_FILE = "README.md"
NOT_STATED = "not stated"
CARD_FLAGS = {
    "license": Flag("", "Licence of the weights, as the Hub names it, such as apache-2.0; empty: not stated."),
    "data": Flag("", "What the training data is, in words; empty: not stated."),
    "limits": Flag("", "What the model cannot do, in words; empty: not stated."),
}
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclasses.dataclass(frozen=True)
class CardTexts:
    """What only the author of a model knows, the values of CARD_FLAGS; empty: not stated.

    Raises:
      UserError: if the licence is not a name that the Hub could know.
    """

    license: str = ""
    data: str = ""
    limits: str = ""

    def __post_init__(self) -> None:
        if self.license and not _LICENSE.fullmatch(self.license):
            raise UserError(f"license={self.license}: must be a name of the Hub, such as apache-2.0, mit or other")


def card_text(
    title: str, summary: str, texts: CardTexts, metadata: Mapping[str, Any], sections: Mapping[str, str]
) -> str:
    """Returns the content of a card.

    Args:
      metadata: what the Hub reads, besides the licence.
      sections: heading -> Markdown, between the licence and the limits; an empty text is not stated.
    """
    license = {"license": texts.license} if texts.license else {}
    front = [f"{name}: {json.dumps(value)}" for name, value in {**license, **metadata}.items()]
    lines = ["---", *front, "---", f"# {title}", "", summary]
    for heading, text in {"Licence": texts.license, **sections, "Limits": texts.limits}.items():
        lines += ["", f"## {heading}", text.strip() or f"{NOT_STATED.capitalize()}."]
    text = "\n".join(lines) + "\n"
    return text.encode(errors="backslashreplace").decode()  # names of files that are not UTF-8


def card_table(rows: Mapping[str, Any]) -> str:
    """Returns a table of names and values in Markdown. Those that are None or empty are not stated."""
    shown = {name: NOT_STATED if value in (None, "") else _cell(value) for name, value in rows.items()}
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in shown.items())])


def _cell(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def last_metrics(run_directory: str, steps: int) -> Mapping[str, Any]:
    """Returns the last row of `metrics.jsonl` before a number of steps; an empty mapping if there is none."""
    path = os.path.join(run_directory, "metrics.jsonl")
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.readlines()
    for line in reversed(lines):
        try:
            row = parse_json(line)
        except UserError:
            continue  # the run was killed while it wrote
        if isinstance(row.get("step"), int) and row["step"] < steps:
            return row
    return {}


def public_name(path: str) -> str:
    """Returns the last part of a local path or PREFIX::PATH, as folders can be private, and other names as they are."""
    path = (path.partition("::")[2] or path).strip()
    is_local = os.path.isabs(path) or path.startswith((".", "~")) or os.path.exists(path)
    return os.path.basename(path.rstrip("/")) if is_local else path
