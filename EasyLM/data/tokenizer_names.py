"""The name of the image tokenizer that made a sentence's tokens: a digest of its weights, in the record's `tokenizer`.

Tokens of one tokenizer mean nothing to another one. Records of version 0.1.0 and of other programs have no name.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from EasyLM.errors import UserError

TOKENIZER_KEY = "tokenizer"
TOKENS_PER_IMAGE_KEY = "tokens_per_image"  # in records whose `sources` do not give the number of images
_MOST_CHARACTERS = 64


def tokenizer_of(record: Mapping[str, Any]) -> str | None:
    """Returns the name in a record or in a checkpoint's metadata; None if there is none."""
    name = record.get(TOKENIZER_KEY)
    return name if isinstance(name, str) and 0 < len(name) <= _MOST_CHARACTERS else None


class OneTokenizer:
    """Checks that sentences, files or data sets name one tokenizer. Those without a name always pass.

    Attributes:
      name: the tokenizer; None as long as nothing has named one.
      unnamed: how many had no name.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.unnamed = 0
        self._address = ""

    def add(self, name: str | None, address: str) -> None:
        """Checks the name of what lies at an address.

        Raises:
          UserError: with both addresses, if it differs from an earlier name.
        """
        if name is None:
            self.unnamed += 1
        elif self.name is None:
            self.name, self._address = name, address
        elif name != self.name:
            raise UserError(
                f"{address}: tokens of the tokenizer {name}, but those of {self._address} are of {self.name}: they "
                "cannot be used together"
            )


def common_tokenizer(names: Iterable[tuple[str | None, str]]) -> str | None:
    """Returns the one tokenizer of (name, address) pairs, or None. Raises UserError as `OneTokenizer`."""
    check = OneTokenizer()
    for name, address in names:
        check.add(name, address)
    return check.name
