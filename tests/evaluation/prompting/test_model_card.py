"""The limits of a model, as stated in its card."""

import pathlib

import pytest

from EasyLM.publishing import CardTexts, card_text
from evaluation.prompting import stated_limits

CARD = """---
license: apache-2.0
---
# A model

It has limits.

## Limits and intended use

It knows cats
and dogs.

It is small.

## Data
"""


def write_model(folder: pathlib.Path, card: str | None) -> str:
    (folder / "params").write_bytes(b"")
    if card is not None:
        (folder / "README.md").write_text(card)
    return f"params::{folder / 'params'}"


@pytest.mark.parametrize(
    "card, limits",
    [
        (CARD, "It knows cats and dogs."),
        (CARD.replace("Limits and", "Known limitations and"), "It knows cats and dogs."),
        (CARD.replace("Limits", "Data"), ""),
        (CARD.replace("It knows cats", "See [the *demo*](../a.md#b): no cats"), "See the *demo*: no cats and dogs."),
        (card_text("A model", "It is.", CardTexts(limits="No dogs."), {}, {"Data": ""}), "No dogs."),
        (card_text("A model", "It is.", CardTexts(), {}, {"Data": ""}), ""),
        (CARD.split("It knows")[0], ""),
        ("## Limits\n## Data\nScenes.", ""),
        ("", ""),
        (None, ""),
    ],
)
def test_the_first_paragraph_of_the_section_is_returned(tmp_path, card, limits):
    assert stated_limits(write_model(tmp_path, card)) == limits


def test_a_card_of_any_bytes_and_length_is_read_within_bounds(tmp_path):
    spec = write_model(tmp_path, "## Limits\n" + "x" * 10**6)
    assert len(stated_limits(spec)) < 1000
    (tmp_path / "README.md").write_bytes(b"## Limits\n\xff\xfe cats")
    assert "cats" in stated_limits(spec)


def test_the_shipped_model_states_its_limits():
    folder = pathlib.Path(__file__).parents[3] / "evaluation" / "demo_model"
    assert "rendered scenes" in stated_limits(str(folder))
