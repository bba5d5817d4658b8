"""The token ids of a Large Vision Model: the codes of its tokenizer first, then special ids."""

import dataclasses

CODEBOOK_SIZE = 8192  # codes of the released tokenizer, and the default: ids 0..8191
MOST_CODES = 2**16  # codes are stored in two bytes
NUM_SPECIAL_IDS = 100  # they follow the codes: by default ids 8192..8291
TOKENS_PER_IMAGE = 256  # 16x16 codes of the released tokenizer; that of another one gives its own number


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The number of ids, and the ids that begin a sequence, end it, and fill a batch.

    None of these ids is a code. If one were, generation could stop inside an image. transformers has the same names.
    """

    vocab_size: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int


def vocabulary(codebook_size: int) -> Vocabulary:
    """Returns the vocabulary of a model whose tokenizer has `codebook_size` codes."""
    return Vocabulary(codebook_size + NUM_SPECIAL_IDS, codebook_size, codebook_size + 1, codebook_size)


SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DEFAULT = vocabulary(CODEBOOK_SIZE)
VOCAB_SIZE = _DEFAULT.vocab_size
BOS, EOS, PAD = _DEFAULT.bos_token_id, _DEFAULT.eos_token_id, _DEFAULT.pad_token_id
