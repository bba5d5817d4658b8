"""Publishes exported weights: the card of a model, and its upload to the Hugging Face Hub.

May import `EasyLM.storage`. The commands that export weights write cards; `evaluation.prompting` reads them.

Vocabulary:
  card         the README.md beside the weights, with the metadata that the Hub reads
  public name  what a card shows of a path: a name on the Hub, else its last part

Modules:
  model_card  writes cards
  hub_upload  uploads a directory
"""

from EasyLM.publishing.hub_upload import PUSH_FLAG, prepare_repository, upload_files
from EasyLM.publishing.model_card import (
    CARD_FILE,
    CARD_FLAGS,
    NOT_STATED,
    CardTexts,
    card_table,
    card_text,
    keeps_card,
    last_metrics,
    last_part,
    public_name,
)

__all__ = [
    "CARD_FILE",
    "CARD_FLAGS",
    "NOT_STATED",
    "PUSH_FLAG",
    "CardTexts",
    "card_table",
    "card_text",
    "keeps_card",
    "last_metrics",
    "last_part",
    "prepare_repository",
    "public_name",
    "upload_files",
]
