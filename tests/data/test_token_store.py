"""Token stores: rows of tokenized text, the cache, bad examples."""

import json
import os

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from text_kit import SENTENCES, encoded, text_config, text_rows, write_jsonl

from EasyLM.data import load_tokenizer, make_dataset, token_store
from EasyLM.errors import UserError


@pytest.mark.parametrize("kind", ["model", "json"])
@pytest.mark.parametrize("processes", [1, 2])
def test_json_text(tokenizer_files, tmp_path, kind, processes):
    tokenizer = load_tokenizer(tokenizer_files[kind])
    config = text_config("json", write_jsonl(tmp_path / "text.jsonl"), tokenizer_processes=processes)
    config.json_dataset.update(tokenizer_parallel_chunk_size=3, tokenizer_parallel_batch_size=7)
    source = make_dataset(config, tokenizer, 100)
    inputs, targets = text_rows(encoded(tokenizer), 40)
    got = source.rows(0, 40)
    np.testing.assert_array_equal(got["input_tokens"], inputs)
    np.testing.assert_array_equal(got["target_tokens"], targets)
    assert source.num_tokens == len(encoded(tokenizer)) and got["loss_masks"].min() == 1
    assert source.bytes_read == (40 * 16 + 1) * 4
    ends = np.cumsum([len(tokenizer.encode(sentence)) for sentence in SENTENCES])
    assert source.metrics(3)["dataset_example_index"] == np.searchsorted(ends, 3 * 16, side="right") > 0


def test_tokens_are_cached(tokenizer_files, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(tokenizer_files["json"])
    path = write_jsonl(tmp_path / "text.jsonl")
    first = make_dataset(text_config("json", path), tokenizer, 100).rows(3, 5)
    tokenize = token_store._tokenize
    monkeypatch.setattr(token_store, "_tokenize", None)
    again = make_dataset(text_config("json", path), tokenizer, 100).rows(3, 5)
    np.testing.assert_array_equal(first["input_tokens"], again["input_tokens"])
    monkeypatch.setattr(token_store, "_tokenize", tokenize)
    path.write_text(json.dumps({"text": "two birds"}))
    assert make_dataset(text_config("json", path), tokenizer, 100).num_tokens == 2


def test_a_cache_that_is_truncated_during_reading_is_named(tokenizer_files, tmp_path):
    config = text_config("json", write_jsonl(tmp_path / "text.jsonl"))
    config.json_dataset.document_mask = True
    source = make_dataset(config, load_tokenizer(tokenizer_files["json"]), 100)
    source.rows(0, 4)
    (path,) = tmp_path.glob("*.tokens")
    os.truncate(path, 4100)
    for call in (lambda: source.rows(4, 4), lambda: source.metrics(4), lambda: source._sentence_starts(0, 4)):
        with pytest.raises(UserError, match=f"^{path}: was truncated while it was read"):
            call()


def test_tokens_of_remote_text_stay_on_the_host(tokenizer_files, tmp_path, monkeypatch, caplog):
    """They can be large, and buckets of data are often read-only. The log says where they are."""
    caplog.set_level("INFO")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer, store = load_tokenizer(tokenizer_files["json"]), MemoryFileSystem()
    for name in "ab":
        store.pipe_file(f"/texts/{name}.jsonl", write_jsonl(tmp_path / name).read_bytes())
    config = text_config("json", "memory://texts/*.jsonl")
    expected = text_rows(encoded(tokenizer), 40)[0]
    np.testing.assert_array_equal(make_dataset(config, tokenizer, 100).rows(0, 40)["input_tokens"], expected)
    (path,) = (tmp_path / "cache" / "EasyLM").iterdir()
    assert f"memory:///texts/a.jsonl: its cache is {path}" in caplog.messages and path.suffix == ".tokens"
    assert store.ls("/texts", detail=False) == ["/texts/a.jsonl", "/texts/b.jsonl"]
    monkeypatch.setattr(token_store, "_tokenize", None)
    monkeypatch.chdir(tmp_path)  # a program that runs in another directory uses the same cache
    np.testing.assert_array_equal(make_dataset(config, tokenizer, 100).rows(0, 40)["input_tokens"], expected)


def test_masks_bos_shuffle_and_start(tokenizer_files, tmp_path):
    tokenizer = load_tokenizer(tokenizer_files["json"])
    path = write_jsonl(tmp_path / "text.jsonl", label="dog")
    begin = sum(len(line) for line in path.read_text().splitlines(keepends=True)[:2])
    config = text_config(
        "json", path, "[label],text,<|eos|>", shuffle_seed=1, start_seek_loc=begin, always_start_with_bos=True
    )
    source = make_dataset(config, tokenizer, 100)
    (dog,) = tokenizer.encode("dog")
    ids, masks = [], []
    for sentence in SENTENCES[2:] + SENTENCES[:2]:
        ids += [dog, *tokenizer.encode(sentence), 2]
        masks += [0] + [1] * (len(tokenizer.encode(sentence)) + 1)
    order = [source.shuffled(row) for row in range(source.rows_per_epoch)]
    inputs, targets = (rows[order] for rows in text_rows(ids, source.rows_per_epoch))
    inputs[:, 0] = 1
    got = source.rows(0, source.rows_per_epoch)
    np.testing.assert_array_equal(got["input_tokens"], inputs)
    np.testing.assert_array_equal(got["target_tokens"], targets)
    np.testing.assert_array_equal(got["loss_masks"], text_rows(masks, source.rows_per_epoch)[1][order])


def test_bad_text_is_named(tokenizer_files, tmp_path):
    tokenizer = load_tokenizer(tokenizer_files["json"])
    path = write_jsonl(tmp_path / "text.jsonl", SENTENCES[:3])
    path.write_text(path.read_text() + '{"text": 5}\n\n{"txt": ""}\n' + path.read_text())
    with pytest.raises(UserError, match=f"^{path}:4: field 'text' is of type int, not text"):
        make_dataset(text_config("json", path), tokenizer, 100)
    assert os.listdir(tmp_path) == ["text.jsonl"]
    source = make_dataset(text_config("json", path, skip_bad_lines=True), tokenizer, 100)
    assert source.skipped_lines == 2 and source.num_tokens == 2 * len(encoded(tokenizer, SENTENCES[:3]))
    with pytest.raises(UserError, match=f"--tokenizer.vocab_file has {tokenizer.vocab_size} ids, more than .* of 10"):
        make_dataset(text_config("json", path), tokenizer, 10)
