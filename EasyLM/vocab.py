"""The token ids of a Large Vision Model: the codes of its tokenizer first, then special ids."""

import dataclasses

CODEBOOK_SIZE = 8192  # codes of the released tokenizer, and the default: ids 0..8191
MOST_CODES = 2**16  # codes are stored in two bytes
NUM_SPECIAL_IDS = 100  # they follow the codes: by default ids 8192..8291
TOKENS_PER_IMAGE = 256  # 16x16 codes of the released tokenizer; that of another one gives its own number


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """The ids that follow the codes. None is a code. If one were, generation could stop inside an image.

    Attributes:
      bos, eos, pad: begin a sequence, end it, and fill a batch.
      vocab_size: number of codes and special ids.
    """

    bos: int
    eos: int
    pad: int
    vocab_size: int


def special_ids(codebook_size: int) -> SpecialIds:
    """Returns the special ids of a model whose tokenizer has `codebook_size` codes."""
    return SpecialIds(codebook_size, codebook_size + 1, codebook_size, codebook_size + NUM_SPECIAL_IDS)


DEFAULT_IDS = special_ids(CODEBOOK_SIZE)
BOS, EOS, PAD, VOCAB_SIZE = DEFAULT_IDS.bos, DEFAULT_IDS.eos, DEFAULT_IDS.pad, DEFAULT_IDS.vocab_size
