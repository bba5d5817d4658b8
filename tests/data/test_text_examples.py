"""Examples of Hugging Face datasets, saved, local or on the Hub."""

import numpy as np
import pytest
from text_kit import SENTENCES, encoded, text_config, text_rows, write_jsonl

from EasyLM.data import load_tokenizer, make_dataset
from EasyLM.errors import UserError


@pytest.mark.parametrize("form", ["file", "directory", "text", "saved", "saved splits"])
def test_local_forms_give_the_same_rows(tokenizer_files, tmp_path, form):
    tokenizer = load_tokenizer(tokenizer_files["model"], add_eos_token=True)
    path = tmp_path / "data"
    if "saved" in form:
        datasets = pytest.importorskip("datasets")
        hub_dataset = datasets.Dataset.from_dict({"text": SENTENCES})
        (datasets.DatasetDict({"train": hub_dataset}) if form == "saved splits" else hub_dataset).save_to_disk(path)
    elif form == "file":
        path = write_jsonl(tmp_path / "data.jsonl")
    elif form == "directory":
        path.mkdir()
        write_jsonl(path / "b.jsonl", SENTENCES[10:])
        write_jsonl(path / "a.jsonl", SENTENCES[:10])
    else:
        path.mkdir()
        (path / "a.txt").write_text("\n\n".join(SENTENCES) + "\n")
    source = make_dataset(text_config("huggingface", path), tokenizer, 100)
    inputs, targets = text_rows(encoded(tokenizer), 60)
    got = source.rows(0, 60)
    np.testing.assert_array_equal(got["input_tokens"], inputs)
    np.testing.assert_array_equal(got["target_tokens"], targets)
    again = make_dataset(text_config("huggingface", path), tokenizer, 100)
    assert again.fingerprint == source.fingerprint


def test_hub_dataset_settings(tokenizer_files, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*arguments, **settings):
        calls.append((arguments, settings))
        hub_dataset = datasets.Dataset.from_dict({"text": SENTENCES})
        return (example for example in hub_dataset) if settings["streaming"] else hub_dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokenizer = load_tokenizer(tokenizer_files["json"])
    for streaming in (False, True):
        config = text_config("huggingface", "some/corpus", name="en", split="validation", streaming=streaming)
        source = make_dataset(config, tokenizer, 100)
        np.testing.assert_array_equal(source.rows(0, 9)["input_tokens"], text_rows(encoded(tokenizer), 9)[0])
        assert calls.pop() == (("some/corpus", "en"), {"split": "validation", "streaming": streaming})


def test_batch_token_dtype(tokenizer_files, tmp_path):
    tokenizer = load_tokenizer(tokenizer_files["json"])
    path = write_jsonl(tmp_path / "text.jsonl")
    config = text_config("huggingface", path, batch_token_dtype="u2", always_start_with_bos=True)
    got = make_dataset(config, tokenizer, 60000).rows(0, 3)
    assert got["input_tokens"].dtype == got["target_tokens"].dtype == np.uint16
    assert (got["input_tokens"][:, 0] == 1).all()
    with pytest.raises(UserError, match="batch_token_dtype=i2: holds ids up to 32767, the vocabulary has 60000"):
        make_dataset(text_config("huggingface", path, batch_token_dtype="i2"), tokenizer, 60000)


def test_missing_data_is_named(tokenizer_files, tmp_path):
    datasets = pytest.importorskip("datasets")
    tokenizer = load_tokenizer(tokenizer_files["json"])
    hub_dataset = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": SENTENCES})})
    hub_dataset.save_to_disk(tmp_path / "saved")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"good\ncaf\xe9\n")
    (tmp_path / "a.jsonl.gz").touch()
    for path, settings, message in (
        ("saved", {"split": "test"}, r"--train_dataset.huggingface_dataset.split='test': choose one of 'train'"),
        ("saved", {"fields": "txt"}, r"saved\[train\], example 0: lacks the field 'txt' \(fields here: text\)"),
        ("nothing", {}, r"huggingface_dataset.path=.*nothing: holds no saved dataset, and no .jsonl or .txt file"),
        ("no", {}, r"huggingface_dataset.path=.*no: no such"),
        ("latin.txt", {}, r"latin.txt:2: not UTF-8 text"),
        ("a.jsonl.gz", {}, r"huggingface_dataset.path=.*a.jsonl.gz: is compressed"),
    ):
        with pytest.raises(UserError, match=message):
            make_dataset(text_config("huggingface", tmp_path / path, **settings), tokenizer, 100)
