"""Text tokenizers, for records that hold text: SentencePiece `.model` files and Hugging Face `tokenizer.json` files."""

import functools
import hashlib
import os
from collections.abc import Callable
from typing import Any

from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.storage import read_json

TOKENIZER_FLAGS = {
    "vocab_file": Flag(
        "", "Text tokenizer: a SentencePiece .model or a Hugging Face tokenizer.json; empty: the data has no text."
    ),
    "add_bos_token": Flag(False, "Start each encoded text with the tokenizer's beginning-of-sentence id."),
    "add_eos_token": Flag(False, "End each encoded text with the tokenizer's end-of-sentence id."),
}

NO_ID = -1  # the id of a special token that the tokenizer lacks
# Common names of the special tokens, for a tokenizer.json without a tokenizer_config.json that names them.
BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "[BOS]", "<|endoftext|>", "[CLS]")
EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "[EOS]", "<|endoftext|>", "[SEP]")

Loaded = tuple[Callable[[str], list[int]], int, int, int]  # encode, vocab_size, bos_token_id, eos_token_id


class TextTokenizer:
    """A `protocols.Tokenizer`. Pickled as its three settings: each worker process loads the file itself."""

    def __init__(self, vocab_file: str, add_bos_token: bool = False, add_eos_token: bool = False):
        self._settings = (vocab_file, add_bos_token, add_eos_token)
        load = _load_tokenizer_json if vocab_file.endswith(".json") else _load_sentencepiece
        self._encode, self.vocab_size, self.bos_token_id, self.eos_token_id = load(vocab_file)
        for added, token_id, name in (
            (add_bos_token, self.bos_token_id, "add_bos_token"),
            (add_eos_token, self.eos_token_id, "add_eos_token"),
        ):
            if added and token_id == NO_ID:
                raise UserError(f"--tokenizer.{name}=True: {vocab_file} has no such special token")
        self._before = [self.bos_token_id] if add_bos_token else []
        self._after = [self.eos_token_id] if add_eos_token else []

    def __reduce__(self) -> tuple[Callable, tuple]:
        return _load_once, self._settings

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, with the special ids of the settings and no others."""
        return self._before + self._encode(text) + self._after

    def fingerprint(self) -> dict[str, Any]:
        """See `Tokenizer`: the digest of the file, and the settings."""
        path, add_bos, add_eos = self._settings
        with open(path, "rb") as file:
            digest = hashlib.blake2b(file.read(), digest_size=16).hexdigest()
        return {"file": digest, "add_bos_token": add_bos, "add_eos_token": add_eos}


@functools.lru_cache
def _load_once(*settings: Any) -> TextTokenizer:
    """Unpickles a tokenizer. It is cached because each task of a worker process unpickles the tokenizer."""
    return TextTokenizer(*settings)


def load_tokenizer(vocab_file: str, add_bos_token: bool = False, add_eos_token: bool = False) -> TextTokenizer | None:
    """Returns the text tokenizer, or None if `vocab_file` is empty. The arguments are values of `TOKENIZER_FLAGS`.

    Raises:
      UserError: if the file is missing or not a tokenizer, or the package that reads it is not installed.
    """
    if not vocab_file:
        return None
    if not os.path.isfile(vocab_file):
        raise UserError(f"--tokenizer.vocab_file={vocab_file}: no such file; give a .model or a tokenizer.json")
    try:
        return TextTokenizer(vocab_file, add_bos_token, add_eos_token)
    except ImportError as error:
        reason = f"needs the package {error.name}: pip install -e '.[text]'"
        raise UserError(f"--tokenizer.vocab_file={vocab_file}: {reason}") from None


def _load_sentencepiece(path: str) -> Loaded:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError) as error:
        raise UserError(f"--tokenizer.vocab_file={path}: not a SentencePiece model ({error})") from None
    return model.encode, model.vocab_size(), model.bos_id(), model.eos_id()


def _load_tokenizer_json(path: str) -> Loaded:
    import tokenizers

    try:
        model = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # `tokenizers` has no narrower exception
        raise UserError(f"--tokenizer.vocab_file={path}: not a tokenizer.json ({error})") from None

    def encode(text: str) -> list[int]:
        return model.encode(text, add_special_tokens=False).ids

    def special_id(setting: str, names: tuple[str, ...]) -> int:
        config = os.path.join(os.path.dirname(path), "tokenizer_config.json")
        if os.path.isfile(config):
            token = read_json(config, {f"{setting}?": (str, dict, type(None))}).get(setting)
            names = (token.get("content", "") if isinstance(token, dict) else token,) if token else ()
        ids = [model.token_to_id(name) for name in names]
        return next((token_id for token_id in ids if token_id is not None), NO_ID)

    # Ids may have gaps (added tokens), so the number of tokens is no bound.
    vocab_size = max(model.get_vocab(with_added_tokens=True).values()) + 1
    return encode, vocab_size, special_id("bos_token", BOS_NAMES), special_id("eos_token", EOS_NAMES)
