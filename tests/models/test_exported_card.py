"""The model card of an export, and its upload to an imitation of the Hub."""

import json

import pytest
from checkpoint_kit import random_params
from convert_kit import export, tiny_state
from hub_kit import card_metadata, connected_hub
from prompting_kit import CONFIG

from EasyLM.errors import UserError
from EasyLM.models.llama import costs, llama_config

MODEL = llama_config.updated(CONFIG, "{'codebook_size': 32}")
FLAGS = {
    "dtype": "bf16",
    "optimizer": {"type": "adamw", "accumulate_gradient_steps": 2, "adamw_optimizer": {"lr": 3e-4}},
    "train_dataset": {
        "type": "json",
        "json_dataset": {
            "path": "/home/me/pairs.jsonl,gs://lab/secret/videos.jsonl,secret/a.jsonl",
            "seq_length": 512,
            "batch_size": 8,
        },
    },
}


@pytest.fixture
def run(tmp_path):
    """A run of 30 steps with records. Returns the checkpoint's name."""
    random_params(tmp_path / "run", MODEL)
    path = tmp_path / "run" / "metadata.json"
    record = {name: value for name, value in json.loads(path.read_text()).items() if name != "digest"}
    record |= {"step": 30, "flags": FLAGS, "started_from": ["", "params::secret/base", "huggingface::Owner/lvm@v1"]}
    record["tokenizer"] = "7f061d445e58df20"
    path.write_text(json.dumps(record))
    rows = [{"step": step, "loss": 4 - step / 10, "accuracy": None, "eval_loss": 3.5} for step in (10, 20, 29, 30)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"params::{tmp_path}/run/streaming_params"


def test_the_card_says_what_the_records_say(run, tmp_path):
    card = {"license": "apache-2.0", "data": "Pairs of our lab.", "limits": "No faces."}
    text = (tmp_path / "hf" / "README.md").read_text() if export(run, tmp_path / "hf", card=card) else ""
    metadata = card_metadata(text)
    assert metadata["license"] == "apache-2.0" and metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "image-to-image"
    for line in (
        f"| parameters | {costs.num_parameters(MODEL):,} |",
        "| token ids | 132; codes of images are 0 to 31 |",
        "| image tokenizer | 7f061d445e58df20 |",
        "| type of the weights | float32 |",
        "Pairs of our lab.",
        "| files | pairs.jsonl, videos.jsonl, a.jsonl |",
        "| tokens of a row | 512 |",
        "| steps | 30 |",
        "| peak learning rate | 0.0003 |",
        "| started from | base, Owner/lvm@v1 |",
        "| step | 29 |",  # of the saved state: 30 comes after it
        "| loss of the training data, nats a token | 1.1 |",
        "## Limits\nNo faces.",
    ):
        assert line in text, line
    assert "/home" not in text and "secret" not in text and "Not stated." not in text and "| accuracy" not in text


def test_what_nothing_says_is_not_stated(golden, tmp_path):
    text = (tmp_path / "hf" / "README.md").read_text() if export(tiny_state(golden), tmp_path / "hf") else ""
    assert "license" not in card_metadata(text) and "## Licence\nNot stated." in text
    assert "| started from | not stated |" in text, "the release does not record it"
    assert "| image tokenizer | not stated |" in text and "## Figures\nNot stated." in text


def test_a_card_that_is_there_is_kept(run, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "README.md").write_text("mine")
    with pytest.raises(UserError, match=f"^--card.license=mit: {tmp_path}/hf/README.md is a card of your own"):
        export(run, tmp_path / "hf", card={"license": "mit"})
    export(run, tmp_path / "hf")
    assert (tmp_path / "hf" / "README.md").read_text() == "mine"


def test_a_card_of_an_earlier_export_is_written_again(run, tmp_path):
    export(run, tmp_path / "hf", float_dtype="bf16", card={"data": "Pairs."})
    for path in (tmp_path / "hf").glob("*[!d]"):  # its user deletes all but the card
        path.unlink()
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["README.md"]
    export(run, tmp_path / "hf")
    text = (tmp_path / "hf" / "README.md").read_text()
    assert "| type of the weights | float32 |" in text and "Pairs." not in text


def test_an_export_is_uploaded_without_other_files_of_its_directory(run, tmp_path, monkeypatch):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "notes.txt").write_text("private")
    with connected_hub(monkeypatch, tmp_path) as hub:
        export(run, tmp_path / "hf", push_to_hub="Owner/lvm", max_shard_mb=0.02)
        files = dict(hub.repositories["Owner/lvm"])
        with pytest.raises(UserError, match=r"^--push_to_hub=Owner/lvm: the repository holds README\.md, config"):
            export(run, tmp_path / "again", push_to_hub="Owner/lvm")
    assert not (tmp_path / "again").exists(), "it is refused before the export"
    del files[".gitattributes"]
    assert len(files) > 4 and "notes.txt" not in files
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors.index.json"} <= set(files)
    for name, data in files.items():
        assert (tmp_path / "hf" / name).read_bytes() == data
    assert b"\n# lvm\n" in files["README.md"] and hub.commits == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"push_to_hub": "lvm"}, "^--push_to_hub=lvm: must be OWNER/NAME"),
        ({"push_to_hub": "Other/lvm"}, "^--push_to_hub=Other/lvm: the token may not write there"),
        ({"card": {"license": "My own"}}, "^--card.license=My own: must be a name of the Hub"),
    ],
)
def test_errors_come_before_the_export(run, tmp_path, monkeypatch, values, message):
    with connected_hub(monkeypatch, tmp_path), pytest.raises(UserError, match=message):
        export(run, tmp_path / "hf", **values)
    assert not (tmp_path / "hf").exists()
