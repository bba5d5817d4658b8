"""The limits of a model, as stated in its card: the README.md beside its files."""

import os
import re

from EasyLM.publishing import CARD_FILE, NOT_STATED
from EasyLM.storage import is_remote
from evaluation.prompting.checkpoint import parse_spec

_HEADING = re.compile(r"#+\s.*\blimit(s|ations)\b", re.IGNORECASE)
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
_READ_BYTES, _MAX_CHARACTERS = 2**16, 600


def stated_limits(spec: str) -> str:
    """Returns the first paragraph of the section "Limits" (or "Limitations") of a model's card, without links.

    The card of a Hugging Face directory lies in it, that of another checkpoint beside it. Returns "" if it states none.

    Args:
      spec: PREFIX::PATH or a Hugging Face directory.
    """
    prefix, path = parse_spec(spec)
    card = os.path.join(path if prefix == "huggingface" else os.path.dirname(path), CARD_FILE)
    if is_remote(path) or not os.path.isfile(card):
        return ""
    with open(card, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file.read(_READ_BYTES).splitlines()]
    begin = next((i for i, line in enumerate(lines) if _HEADING.match(line)), len(lines))
    paragraph: list[str] = []
    for line in lines[begin + 1 :]:
        if line.startswith("#") or (paragraph and not line):
            break
        paragraph += [line] if line else []
    text = _LINK.sub(r"\1", " ".join(paragraph))
    if text.strip(".").lower() == NOT_STATED:
        return ""
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}…"
