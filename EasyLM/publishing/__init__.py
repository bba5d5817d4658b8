"""Publishes exported weights: the card of a model, and its upload to the Hugging Face Hub.

May import `EasyLM.storage`. Only the commands that export weights use this room.

Vocabulary:
  card  the README.md beside the weights, with the metadata that the Hub reads

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
    last_metrics,
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
    "last_metrics",
    "prepare_repository",
    "public_name",
    "upload_files",
]
