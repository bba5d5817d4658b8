"""Model cards: metadata that the Hub's package reads, and nothing that nobody stated."""

import pathlib

import pytest
from hub_kit import card_metadata

from EasyLM.errors import UserError
from EasyLM.publishing import CARD_FILE, CardTexts, card_table, card_text, keeps_card, last_part, public_name

ROOT = pathlib.Path(__file__).parents[2]


def test_stated_fields_are_in_the_card():
    texts = CardTexts("apache-2.0", data="Rendered scenes: 8,192.", limits="Small images.")
    text = card_text("Title: x", "A model.", texts, {"tags": ["a", "b: c"]}, {"Figures": card_table({"loss": 0.12345})})
    assert card_metadata(text) == {"license": "apache-2.0", "tags": ["a", "b: c"]}
    assert "# Title: x\n\nA model.\n\n## Licence\napache-2.0\n" in text
    assert "## Limits\nSmall images.\n" in text and "| loss | 0.1235 |" in text
    assert "not stated" not in text.lower()


@pytest.mark.parametrize("folder", ["tokenizer/pretrained", "evaluation/demo_model"])
def test_the_shipped_models_have_cards(folder):
    text = (ROOT / folder / CARD_FILE).read_text()
    metadata = card_metadata(text)
    assert metadata["license"] == "apache-2.0" and "easylm-lvm" in metadata["tags"]
    for heading in ("Licence", "Data", "Limits"):
        assert f"\n## {heading}\n" in text


def test_missing_fields_are_not_stated():
    text = card_text("Title", "A model.", CardTexts(), {"library_name": "x"}, {"Data": ""})
    assert card_metadata(text) == {"library_name": "x"}
    for heading in ("Licence", "Data", "Limits"):
        assert f"## {heading}\nNot stated.\n" in text


def test_cells_are_one_line():
    assert card_table({"a": None, "b": "x|y\nz", "c": 1234567, "d": 0}).splitlines()[2:] == [
        "| a | not stated |",
        "| b | x\\|y z |",
        "| c | 1,234,567 |",
        "| d | 0 |",
    ]


def test_names_that_are_not_utf8_can_be_written():
    text = card_text("a\udce9", "A model.", CardTexts(), {}, {"Data": card_table({"files": "b\ud800"})})
    assert b"# a\\udce9\n" in text.encode() and b"| b\\ud800 |" in text.encode()


def test_a_licence_is_a_name():
    with pytest.raises(UserError, match=r"^license=Apache License 2: must be a name of the Hub, such as apache"):
        CardTexts(license="Apache License 2")


def test_cards_of_exports_are_replaced_and_cards_of_authors_kept(tmp_path, capsys):
    card, path = card_text("Title", "A model.", CardTexts("mit"), {"tags": ["a"]}, {}), tmp_path / CARD_FILE
    assert not keeps_card(str(tmp_path), CardTexts("mit")), "there is none"
    path.write_text(card)
    assert not keeps_card(str(tmp_path), CardTexts("mit")) and not capsys.readouterr().out
    edits = {"a sentence": card.replace("A model.", "My model."), "metadata": card.replace("mit", "other", 1)}
    for text in (*edits.values(), card + "More.\n", "mine", ""):
        path.write_text(text)
        assert keeps_card(str(tmp_path), CardTexts())
        assert capsys.readouterr().out.startswith(f"{path} is a card of your own and is kept")
        with pytest.raises(UserError, match=f"^limits=No text: {path} is a card of your own, which is kept: state it"):
            keeps_card(str(tmp_path), CardTexts(limits="No text"))


@pytest.mark.parametrize(
    ("spec", "shown"),
    [
        ("huggingface::Owner/model@v1/small", "Owner/model@v1/small"),
        ("Owner/tokenizer", "Owner/tokenizer"),
        ("c4", "c4"),
        ("huggingface::/home/me/hf", "hf"),
        ("huggingface::here/hf", "hf"),
        ("here/hf", "hf"),
        ("params::secret/run/streaming_params", "streaming_params"),  # a relative path, of another machine
        ("trainstate_params::gs://lab/secret/streaming_train_state", "streaming_train_state"),
        ("../secret/hf/", "hf"),
        (" ~/secret/hf", "hf"),
    ],
)
def test_cards_show_names_on_the_hub_and_no_folders(tmp_path, monkeypatch, spec, shown):
    (tmp_path / "here" / "hf").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name(spec) == shown


def test_cards_show_files_without_folders():
    assert [last_part(path) for path in ("secret/run/a.jsonl", "gs://lab/secret/b/", " c.jsonl")] == [
        "a.jsonl",
        "b",
        "c.jsonl",
    ]
