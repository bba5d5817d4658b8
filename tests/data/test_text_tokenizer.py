"""Text tokenizers: special ids, fingerprints, wrong files."""

import shutil

import pytest
from text_kit import SENTENCES

from EasyLM.data import load_tokenizer
from EasyLM.errors import UserError


@pytest.mark.parametrize("kind", ["model", "json"])
def test_tokenizers_add_their_special_ids(tokenizer_files, kind):
    plain = load_tokenizer(tokenizer_files[kind])
    ids = plain.encode(SENTENCES[0])
    assert 7 <= len(ids) < 40 and min(ids) >= 0 and max(ids) < plain.vocab_size
    both = load_tokenizer(tokenizer_files[kind], add_bos_token=True, add_eos_token=True)
    assert both.encode(SENTENCES[0]) == [plain.bos_token_id, *ids, plain.eos_token_id]
    assert {plain.bos_token_id, plain.eos_token_id} == {1, 2}
    assert plain.fingerprint() != both.fingerprint()


def test_tokenizer_config_names_the_special_tokens(tokenizer_files, tmp_path):
    path = tmp_path / "tokenizer.json"
    shutil.copy(tokenizer_files["json"], path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "dog"}, "eos_token": "no such"}')
    tokenizer = load_tokenizer(str(path))
    assert [tokenizer.bos_token_id] == tokenizer.encode("dog")
    with pytest.raises(UserError, match=r"--tokenizer.add_eos_token=True: .* has no such special token"):
        load_tokenizer(str(path), add_eos_token=True)


def test_wrong_tokenizer_files(tmp_path):
    pytest.importorskip("sentencepiece")
    pytest.importorskip("tokenizers")
    assert load_tokenizer("") is None
    with pytest.raises(UserError, match=r"--tokenizer.vocab_file=no.model: no such file"):
        load_tokenizer("no.model")
    for name, message in (("bad.model", "not a SentencePiece model"), ("bad.json", "not a tokenizer.json")):
        (tmp_path / name).write_text("{}")
        with pytest.raises(UserError, match=message):
            load_tokenizer(str(tmp_path / name))
