"""Text tokenizers, for records that hold text: SentencePiece `.model` files and Hugging Face `tokenizer.json` files."""

import functools
import hashlib
import json
import os

from EasyLM.errors import UserError
from EasyLM.flags import Flag

TOKENIZER_FLAGS = {
    "vocab_file": Flag(
        "", "Text tokenizer: a SentencePiece .model or a Hugging Face tokenizer.json; empty: none, as for images alone."
    ),
    "add_bos_token": Flag(False, "Begin each encoded text with the tokenizer's beginning-of-sentence id."),
    "add_eos_token": Flag(False, "End each encoded text with the tokenizer's end-of-sentence id."),
}

NO_ID = -1  # of a special token that the tokenizer does not have
# Names that tokenizer.json files give to the special tokens, where no tokenizer_config.json beside them says which.
BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "[BOS]", "<|endoftext|>", "[CLS]")
EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "[EOS]", "<|endoftext|>", "[SEP]")


class TextTokenizer:
    """Text -> ids. Pickles as its three settings, so that worker processes load their own.

    Attributes:
      vocab_size: ids are below it.
      bos_token_id, eos_token_id: special ids, or -1 where the tokenizer has none.
    """

    def __init__(self, vocab_file: str, add_bos_token: bool = False, add_eos_token: bool = False):
        self._settings = (vocab_file, add_bos_token, add_eos_token)
        load = _load_tokenizer_json if vocab_file.endswith(".json") else _load_sentencepiece
        self._encode, self.vocab_size, self.bos_token_id, self.eos_token_id = load(vocab_file)
        for wanted, id, name in (
            (add_bos_token, self.bos_token_id, "add_bos_token"),
            (add_eos_token, self.eos_token_id, "add_eos_token"),
        ):
            if wanted and id == NO_ID:
                raise UserError(f"--tokenizer.{name}=True: {vocab_file} has no such special token")
        self._before = [self.bos_token_id] if add_bos_token else []
        self._after = [self.eos_token_id] if add_eos_token else []

    def __reduce__(self):
        return _loaded_once, self._settings

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the special ids that the settings add and no others."""
        return self._before + self._encode(text) + self._after

    def identity(self) -> dict:
        """What the ids depend on, as JSON values: the file's content, not its name."""
        path, add_bos, add_eos = self._settings
        with open(path, "rb") as file:
            digest = hashlib.blake2b(file.read(), digest_size=16).hexdigest()
        return {"file": digest, "add_bos_token": add_bos, "add_eos_token": add_eos}


@functools.lru_cache
def _loaded_once(*settings) -> TextTokenizer:
    """What a worker process unpickles with each piece of work."""
    return TextTokenizer(*settings)


def load_tokenizer(config) -> TextTokenizer | None:
    """The text tokenizer of a `tokenizer` config, or None where no vocab_file is given.

    Raises:
      UserError: if the file is missing or holds no tokenizer, or the package that reads it is not installed.
    """
    if not config.vocab_file:
        return None
    if not os.path.isfile(config.vocab_file):
        raise UserError(f"--tokenizer.vocab_file={config.vocab_file}: no such file; give a .model or a tokenizer.json")
    try:
        return TextTokenizer(config.vocab_file, config.add_bos_token, config.add_eos_token)
    except ImportError as error:
        need = f"needs the package {error.name}: pip install -e '.[text]'"
        raise UserError(f"--tokenizer.vocab_file={config.vocab_file}: {need}") from None


def _load_sentencepiece(path):
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError) as error:
        raise UserError(f"--tokenizer.vocab_file={path}: not a SentencePiece model ({error})") from None
    return model.encode, model.vocab_size(), model.bos_id(), model.eos_id()


def _load_tokenizer_json(path):
    import tokenizers

    try:
        model = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the package raises nothing narrower
        raise UserError(f"--tokenizer.vocab_file={path}: not a tokenizer.json ({error})") from None

    def encode(text):
        return model.encode(text, add_special_tokens=False).ids

    def special(setting, names):
        beside = os.path.join(os.path.dirname(path), "tokenizer_config.json")
        if os.path.isfile(beside):
            with open(beside) as file:
                token = json.load(file).get(setting)
            names = (token["content"] if isinstance(token, dict) else token,) if token else ()
        ids = [model.token_to_id(name) for name in names]
        return next((id for id in ids if id is not None), NO_ID)

    # Ids may have gaps (added tokens), so the largest id counts, not the number of tokens.
    vocab_size = max(model.get_vocab(with_added_tokens=True).values()) + 1
    return encode, vocab_size, special("bos_token", BOS_NAMES), special("eos_token", EOS_NAMES)
