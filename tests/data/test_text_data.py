"""Rows of text: text tokenizers, token stores, Hugging Face datasets."""

import json
import os
import shutil

import numpy as np
import pytest

from EasyLM import flags
from EasyLM.data import dataset, text_tokenizer, token_store
from EasyLM.errors import UserError

SENTENCES = [
    "a dog runs over the green field",
    "the cat sleeps on the red chair",
    "two birds fly over a blue house",
    "a green bird and a red dog sleep",
] * 5


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    """{"model": SentencePiece, "json": tokenizer.json}, trained on the sentences."""
    sentencepiece = pytest.importorskip("sentencepiece")
    tokenizers = pytest.importorskip("tokenizers")
    directory = tmp_path_factory.mktemp("tokenizers")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(directory / "words"), vocab_size=35, minloglevel=2
    )
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=["[UNK]", "<s>", "</s>"])
    model.train_from_iterator(SENTENCES, trainer)
    model.save(str(directory / "tokenizer.json"))
    return {"model": str(directory / "words.model"), "json": str(directory / "tokenizer.json")}


def load(vocab_file, **settings):
    return text_tokenizer.load_tokenizer(vocab_file, **settings)


def config_of(kind, path, fields="text", **settings):
    config = flags.defaults(dataset.DATASET_FLAGS)
    config.type = kind
    config.text_processor.fields = fields
    config[f"{kind}_dataset"].update(path=str(path), seq_length=16, batch_size=2, **settings)
    return config


def write_jsonl(path, sentences=SENTENCES, **others):
    path.write_text("".join(json.dumps({"text": sentence, **others}) + "\n" for sentence in sentences))
    return path


def expected_rows(ids, count, seq_length=16):
    stream = np.resize(np.array(ids), count * seq_length + 1)
    return stream[:-1].reshape(count, seq_length), stream[1:].reshape(count, seq_length)


def encoded(tokenizer, sentences=SENTENCES):
    return [token for sentence in sentences for token in tokenizer.encode(sentence)]


@pytest.mark.parametrize("kind", ["model", "json"])
def test_tokenizers_add_their_special_ids(tokenizer_files, kind):
    plain = load(tokenizer_files[kind])
    ids = plain.encode(SENTENCES[0])
    assert 7 <= len(ids) < 40 and min(ids) >= 0 and max(ids) < plain.vocab_size
    both = load(tokenizer_files[kind], add_bos_token=True, add_eos_token=True)
    assert both.encode(SENTENCES[0]) == [plain.bos_token_id, *ids, plain.eos_token_id]
    assert {plain.bos_token_id, plain.eos_token_id} == {1, 2}
    assert plain.fingerprint() != both.fingerprint()


def test_tokenizer_config_names_the_special_tokens(tokenizer_files, tmp_path):
    path = tmp_path / "tokenizer.json"
    shutil.copy(tokenizer_files["json"], path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "dog"}, "eos_token": "no such"}')
    tokenizer = load(str(path))
    assert [tokenizer.bos_token_id] == tokenizer.encode("dog")
    with pytest.raises(UserError, match=r"--tokenizer.add_eos_token=True: .* has no such special token"):
        load(str(path), add_eos_token=True)


def test_wrong_tokenizer_files(tmp_path):
    pytest.importorskip("sentencepiece")
    pytest.importorskip("tokenizers")
    assert load("") is None
    with pytest.raises(UserError, match=r"--tokenizer.vocab_file=no.model: no such file"):
        load("no.model")
    for name, message in (("bad.model", "not a SentencePiece model"), ("bad.json", "not a tokenizer.json")):
        (tmp_path / name).write_text("{}")
        with pytest.raises(UserError, match=message):
            load(str(tmp_path / name))


@pytest.mark.parametrize("kind", ["model", "json"])
@pytest.mark.parametrize("processes", [1, 2])
def test_json_text(tokenizer_files, tmp_path, kind, processes):
    tokenizer = load(tokenizer_files[kind])
    config = config_of("json", write_jsonl(tmp_path / "text.jsonl"), tokenizer_processes=processes)
    config.json_dataset.update(tokenizer_parallel_chunk_size=3, tokenizer_parallel_batch_size=7)
    source = dataset.make_dataset(config, tokenizer, 100)
    inputs, targets = expected_rows(encoded(tokenizer), 40)
    got = source.rows(0, 40)
    np.testing.assert_array_equal(got["input_tokens"], inputs)
    np.testing.assert_array_equal(got["target_tokens"], targets)
    assert source.num_tokens == len(encoded(tokenizer)) and got["loss_masks"].min() == 1
    assert source.bytes_read == (40 * 16 + 1) * 4
    ends = np.cumsum([len(tokenizer.encode(sentence)) for sentence in SENTENCES])
    assert source.metrics(3)["dataset_example_index"] == np.searchsorted(ends, 3 * 16, side="right") > 0


def test_tokens_are_cached(tokenizer_files, tmp_path, monkeypatch):
    tokenizer = load(tokenizer_files["json"])
    path = write_jsonl(tmp_path / "text.jsonl")
    first = dataset.make_dataset(config_of("json", path), tokenizer, 100).rows(3, 5)
    tokenize = token_store._tokenize
    monkeypatch.setattr(token_store, "_tokenize", None)
    again = dataset.make_dataset(config_of("json", path), tokenizer, 100).rows(3, 5)
    np.testing.assert_array_equal(first["input_tokens"], again["input_tokens"])
    monkeypatch.setattr(token_store, "_tokenize", tokenize)
    path.write_text(json.dumps({"text": "two birds"}))
    assert dataset.make_dataset(config_of("json", path), tokenizer, 100).num_tokens == 2


def test_masks_bos_shuffle_and_start(tokenizer_files, tmp_path):
    tokenizer = load(tokenizer_files["json"])
    path = write_jsonl(tmp_path / "text.jsonl", label="dog")
    begin = sum(len(line) for line in path.read_text().splitlines(keepends=True)[:2])
    config = config_of(
        "json", path, "[label],text,<|eos|>", shuffle_seed=1, start_seek_loc=begin, always_start_with_bos=True
    )
    source = dataset.make_dataset(config, tokenizer, 100)
    (dog,) = tokenizer.encode("dog")
    ids, masks = [], []
    for sentence in SENTENCES[2:] + SENTENCES[:2]:
        ids += [dog, *tokenizer.encode(sentence), 2]
        masks += [0] + [1] * (len(tokenizer.encode(sentence)) + 1)
    order = [source.shuffled(row) for row in range(source.rows_per_epoch)]
    inputs, targets = (rows[order] for rows in expected_rows(ids, source.rows_per_epoch))
    inputs[:, 0] = 1
    got = source.rows(0, source.rows_per_epoch)
    np.testing.assert_array_equal(got["input_tokens"], inputs)
    np.testing.assert_array_equal(got["target_tokens"], targets)
    np.testing.assert_array_equal(got["loss_masks"], expected_rows(masks, source.rows_per_epoch)[1][order])


def test_bad_text_is_named(tokenizer_files, tmp_path):
    tokenizer = load(tokenizer_files["json"])
    path = write_jsonl(tmp_path / "text.jsonl", SENTENCES[:3])
    path.write_text(path.read_text() + '{"text": 5}\n\n{"txt": ""}\n' + path.read_text())
    with pytest.raises(UserError, match=f"^{path}:4: field 'text' is of type int, not text"):
        dataset.make_dataset(config_of("json", path), tokenizer, 100)
    assert os.listdir(tmp_path) == ["text.jsonl"]
    source = dataset.make_dataset(config_of("json", path, skip_bad_lines=True), tokenizer, 100)
    assert source.skipped_lines == 2 and source.num_tokens == 2 * len(encoded(tokenizer, SENTENCES[:3]))
    with pytest.raises(UserError, match=f"--tokenizer.vocab_file has {tokenizer.vocab_size} ids, more than .* of 10"):
        dataset.make_dataset(config_of("json", path), tokenizer, 10)


class TestHuggingFace:
    @pytest.mark.parametrize("form", ["file", "directory", "text", "saved", "saved splits"])
    def test_local_forms_give_the_same_rows(self, tokenizer_files, tmp_path, form):
        tokenizer = load(tokenizer_files["model"], add_eos_token=True)
        path = tmp_path / "data"
        if "saved" in form:
            datasets = pytest.importorskip("datasets")
            made = datasets.Dataset.from_dict({"text": SENTENCES})
            (datasets.DatasetDict({"train": made}) if form == "saved splits" else made).save_to_disk(path)
        elif form == "file":
            path = write_jsonl(tmp_path / "data.jsonl")
        elif form == "directory":
            path.mkdir()
            write_jsonl(path / "b.jsonl", SENTENCES[10:])
            write_jsonl(path / "a.jsonl", SENTENCES[:10])
        else:
            path.mkdir()
            (path / "a.txt").write_text("\n\n".join(SENTENCES) + "\n")
        source = dataset.make_dataset(config_of("huggingface", path), tokenizer, 100)
        inputs, targets = expected_rows(encoded(tokenizer), 60)
        got = source.rows(0, 60)
        np.testing.assert_array_equal(got["input_tokens"], inputs)
        np.testing.assert_array_equal(got["target_tokens"], targets)
        again = dataset.make_dataset(config_of("huggingface", path), tokenizer, 100)
        assert again.fingerprint == source.fingerprint

    def test_hub_dataset_settings(self, tokenizer_files, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        calls = []

        def load_dataset(*arguments, **settings):
            calls.append((arguments, settings))
            made = datasets.Dataset.from_dict({"text": SENTENCES})
            return (example for example in made) if settings["streaming"] else made

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        tokenizer = load(tokenizer_files["json"])
        for streaming in (False, True):
            config = config_of("huggingface", "some/corpus", name="en", split="validation", streaming=streaming)
            source = dataset.make_dataset(config, tokenizer, 100)
            np.testing.assert_array_equal(source.rows(0, 9)["input_tokens"], expected_rows(encoded(tokenizer), 9)[0])
            assert calls.pop() == (("some/corpus", "en"), {"split": "validation", "streaming": streaming})

    def test_batch_token_dtype(self, tokenizer_files, tmp_path):
        tokenizer = load(tokenizer_files["json"])
        path = write_jsonl(tmp_path / "text.jsonl")
        config = config_of("huggingface", path, batch_token_dtype="u2", always_start_with_bos=True)
        got = dataset.make_dataset(config, tokenizer, 60000).rows(0, 3)
        assert got["input_tokens"].dtype == got["target_tokens"].dtype == np.uint16
        assert (got["input_tokens"][:, 0] == 1).all()
        with pytest.raises(UserError, match="batch_token_dtype=i2: holds ids up to 32767, the vocabulary has 60000"):
            dataset.make_dataset(config_of("huggingface", path, batch_token_dtype="i2"), tokenizer, 60000)

    def test_missing_data_is_named(self, tokenizer_files, tmp_path):
        datasets = pytest.importorskip("datasets")
        tokenizer = load(tokenizer_files["json"])
        made = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": SENTENCES})})
        made.save_to_disk(tmp_path / "saved")
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
                dataset.make_dataset(config_of("huggingface", tmp_path / path, **settings), tokenizer, 100)
