"""Datasets that several tests use."""

import numpy as np
import pytest
from data_kit import base64_line, copy_golden
from text_kit import SENTENCES


@pytest.fixture
def sentences(golden, tmp_path):
    """A copy of the golden dataset."""
    return copy_golden(golden, tmp_path)


@pytest.fixture(scope="module")
def two_files(tmp_path_factory):
    """Files with sentences of 0 to 11 tokens, as JSON in several spellings."""
    directory, rng = tmp_path_factory.mktemp("two"), np.random.default_rng(1)
    spellings = [
        '{"tokens": "%s"}',
        '{"tokens":"%s"}',
        '{"tokens": "%s", "label": "cat"}',
        '{"other": {"tokens": "AAAA"}, "tokens" :  "%s" }\r',
        '{"tokens": "%s"}',
    ]
    for name in ("b", "a"):
        lines = []
        for number in range(300):
            line = base64_line(rng.integers(0, 512, rng.integers(0, 12)), spellings[number % 5])
            lines.append(line.replace("/", r"\/") if number % 7 == 0 else line)  # as PHP writes base64
        # No newline after the last line.
        (directory / f"{name}.jsonl").write_text("\n\n".join(lines))
    return directory


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
