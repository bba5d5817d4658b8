"""Model cards: the README.md beside exported weights, with the metadata that the Hugging Face Hub reads.

A card contains what follows from the files and settings of its model. Other entries are `NOT_STATED`. A line that the
Hub does not show marks a card that an export wrote and nobody has edited. Cards without it are the author's.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.storage import is_hub_name, json_digest, parse_json

CARD_FILE = "README.md"
NOT_STATED = "not stated"
CARD_FLAGS = {
    "license": Flag("", "Licence of the weights, as the Hub names it, such as apache-2.0; empty: not stated."),
    "data": Flag("", "What the training data is, in words; empty: not stated."),
    "limits": Flag("", "What the model cannot do, in words; empty: not stated."),
}
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_MARK = re.compile(r"<!-- Written by EasyLM-LVM [^\n]*-->\n")


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
    settings = [f"{name}: {json.dumps(value)}" for name, value in {**license, **metadata}.items()]
    front = "\n".join(["---", *settings, "---", ""])
    lines = [f"# {title}", "", summary]
    for heading, text in {"Licence": texts.license, **sections, "Limits": texts.limits}.items():
        lines += ["", f"## {heading}", text.strip() or f"{NOT_STATED.capitalize()}."]
    body = "\n".join(lines) + "\n"
    body = body.encode(errors="backslashreplace").decode()  # names of files that are not UTF-8
    return f"{front}{_mark(front + body)}{body}"


def _mark(text: str) -> str:
    """Returns the line that marks a card as written by an export. The digest is that of the other lines."""
    return f"<!-- Written by EasyLM-LVM ({json_digest(text)}). The next export replaces it, unless it is edited. -->\n"


def keeps_card(directory: str, texts: CardTexts) -> bool:
    """Returns whether a directory has a card that its author wrote or edited. Such a card is kept, and a line says so.

    Any other card was written by an export, perhaps of other weights. It is to be replaced.

    Raises:
      UserError: if the author's card is there and `texts` states anything, which it would not show.
    """
    path = os.path.join(directory, CARD_FILE)
    if not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    mark = _MARK.search(text)
    if mark and mark[0] == _mark(text.replace(mark[0], "", 1)):
        return False
    for name, value in dataclasses.asdict(texts).items():
        if value:
            raise UserError(
                f"{name}={value}: {path} is a card of your own, which is kept: state it there, or delete the file"
            )
    print(f"{path} is a card of your own and is kept: check that it describes these weights")
    return True


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


def public_name(spec: str) -> str:
    """Returns what a card shows of PREFIX::PATH, or of a tokenizer: a name on the Hub as it is, else the last part.

    Only `huggingface::NAME`, and a name without a prefix, can be on the Hub. A path that exists wins.
    """
    prefix, _, path = spec.strip().rpartition("::")
    is_public = prefix in ("", "huggingface") and is_hub_name(path) and not os.path.exists(path)
    return path if is_public else last_part(path)


def last_part(path: str) -> str:
    """Returns the name of a file or folder, local or remote, without its folders: they can be private."""
    return os.path.basename(path.strip().rstrip("/"))
