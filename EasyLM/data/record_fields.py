"""Field lists: which parts of a record become tokens, in what order, and which of them count in the loss."""

import dataclasses
import functools
from typing import Any

import numpy as np

from EasyLM.data.protocols import Tokenizer
from EasyLM.data.records import TOKENS_KEY, RecordError, check_ids, decode_tokens, field
from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.vocab import BOS, EOS

FIELD_DTYPES = ("i4", "u4", "i2", "u2", "i8")

TEXT_PROCESSOR_FLAGS = {
    "fields_from_example": Flag("", "Key under which each record holds its own field list; it replaces `fields`."),
    "fields": Flag(
        "",
        "Comma list of the parts of a record that become tokens, in order: {key} is a base64 token field, <|8192|> a "
        "literal id, <|bos|> and <|eos|> the special ids, a+b text fields joined (needs a text tokenizer), [x] the "
        "part x without loss. Empty names are skipped. Visual sentences: '{tokens}'.",
    ),
    "subfield_separator": Flag(" ", "Separator of the text fields of a+b."),
    "add_bos_token": Flag(False, "Start each record with the beginning-of-sentence id, without loss."),
    "add_eos_token": Flag(False, "End each record with the end-of-sentence id, with loss."),
    "prepend_text": Flag("", "Text before the first field of each record, which must be a text field."),
    "base64_token_dtype": Flag("i4", "Item type of the base64 token fields (little-endian).", choices=FIELD_DTYPES),
}


@dataclasses.dataclass(frozen=True)
class FieldSettings:
    """The values of `TEXT_PROCESSOR_FLAGS`."""

    fields: str
    fields_from_example: str = ""
    subfield_separator: str = " "
    add_bos_token: bool = False
    add_eos_token: bool = False
    prepend_text: str = ""
    base64_token_dtype: str = "i4"


@dataclasses.dataclass(frozen=True)
class Part:
    """One name of a field list: base64 ids under a key, a literal id, or texts to join; `mask` is its loss weight."""

    kind: str  # "ids", "literal" or "text"
    keys: tuple[str, ...] = ()
    literal: int = 0
    mask: float = 1.0


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """The tokens of a record, if they are the ids of one field between literals.

    Attributes:
      head, tail: literals before and after the ids.
      mask: loss weight of the ids; None if the record is not of this form. Then `head` and `tail` are empty, and the
        ids and their loss weights come from parsing the record.
    """

    head: tuple[Part, ...] = ()
    tail: tuple[Part, ...] = ()
    mask: float | None = None

    @property
    def num_literals(self) -> int:
        """Literal tokens of a record."""
        return len(self.head) + len(self.tail)


@functools.lru_cache(maxsize=256)
def parse_fields(fields: str, bos: int, eos: int) -> tuple[Part, ...]:
    """Returns the parts of a comma list of names (the flag `fields`). Skips empty names: ',{tokens},' is '{tokens}'.

    Raises:
      RecordError: naming the part that is invalid, or if the list is empty.
    """
    names = [name.strip() for name in fields.split(",") if name.strip()]
    if not names:
        raise RecordError(f"{fields!r} names no field: give for instance '{{{TOKENS_KEY}}}'")
    return tuple(_parse_name(name, fields, {"bos": bos, "eos": eos}) for name in names)


def _parse_name(name: str, fields: str, special: dict[str, int]) -> Part:
    mask = 1.0
    if name.startswith("[") and name.endswith("]"):
        name, mask = name[1:-1].strip(), 0.0
    if name.startswith("<|") and name.endswith("|>"):
        literal = name[2:-2]
        if literal not in special and not literal.isdecimal():
            raise RecordError(f"cannot read {name!r} in {fields!r}: choose <|bos|>, <|eos|> or an id such as <|8192|>")
        return Part("literal", literal=special[literal] if literal in special else int(literal), mask=mask)
    if name.startswith("{") and name.endswith("}") and len(name) > 2:
        return Part("ids", keys=(name[1:-1],), mask=mask)
    if any(c in "{}[]<>|" for c in name) or not all(name.split("+")):
        raise RecordError(f"cannot read {name!r} in {fields!r}: choose {{key}}, <|id|>, [x] or text fields a+b")
    return Part("text", keys=tuple(name.split("+")), mask=mask)


@dataclasses.dataclass(frozen=True)
class RecordProcessor:
    """Converts a record to ids int32 [n] and loss weights float32 [n].

    Do not rename attributes: their names are part of the fingerprints in saved data states.

    Attributes:
      parts: including the special ids of `add_bos` and `add_eos`; empty if each record has its own field list.
    """

    parts: tuple[Part, ...]
    fields_from_example: str
    add_bos: bool
    add_eos: bool
    bos: int
    eos: int
    prepend_text: str
    separator: str
    dtype: str
    vocab_size: int
    tokenizer: Tokenizer | None = None

    def __call__(self, record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids and loss weights. Raises RecordError if a field is missing or of another type."""
        parts = self.parts or self._own_parts(record)
        ids = [self._ids(record, part, first=i == int(self.add_bos)) for i, part in enumerate(parts)]
        masks = [np.full(len(part_ids), part.mask, np.float32) for part_ids, part in zip(ids, parts, strict=True)]
        return np.concatenate(ids, dtype=np.int32, casting="unsafe"), np.concatenate(masks)

    def stored_ids(self, record: dict[str, Any]) -> list[np.ndarray]:
        """Returns the ids of each base64 field, in their item type. Raises RecordError as a call does."""
        parts = self.parts or self._own_parts(record)
        return [self._ids(record, part, first=False) for part in parts if part.kind == "ids"]

    @property
    def slice_part(self) -> int | None:
        """Index of the only base64 field if all other parts are literals, so its ids can be sliced from a raw line."""
        ids = [i for i, part in enumerate(self.parts) if part.kind != "literal"]
        return ids[0] if len(ids) == 1 and self.parts[ids[0]].kind == "ids" else None

    @property
    def layout(self) -> TokenLayout:
        """The layout of every record."""
        index = self.slice_part
        if index is None:
            return TokenLayout()
        return TokenLayout(self.parts[:index], self.parts[index + 1 :], self.parts[index].mask)

    @property
    def all_in_loss(self) -> bool:
        """Whether every token of every record has loss weight 1."""
        return bool(self.parts) and all(part.mask == 1 for part in self.parts)

    @property
    def needs_text(self) -> bool:
        """Whether records hold text to tokenize; true with `fields_from_example` if there is a text tokenizer."""
        return any(part.kind == "text" for part in self.parts) or (not self.parts and self.tokenizer is not None)

    def fingerprint(self) -> dict[str, Any]:
        """Returns JSON values that the ids of a record depend on."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "tokenizer"}
        values["parts"] = [[part.kind, list(part.keys), part.literal, part.mask] for part in self.parts]
        tokenizer = self.tokenizer.fingerprint() if self.needs_text and self.tokenizer else None
        return values | {"tokenizer": tokenizer}

    def _own_parts(self, record: dict[str, Any]) -> tuple[Part, ...]:
        fields = field(record, self.fields_from_example)
        if not isinstance(fields, str):
            raise RecordError(
                f"field {self.fields_from_example!r} is of type {type(fields).__name__}, not a field list"
            )
        return _add_special(parse_fields(fields, self.bos, self.eos), self.add_bos, self.add_eos, self.bos, self.eos)

    def _ids(self, record: dict[str, Any], part: Part, first: bool) -> np.ndarray:
        if part.kind == "literal":
            ids = np.array([part.literal])
        elif part.kind == "ids":
            ids = decode_tokens(field(record, part.keys[0]), part.keys[0], self.dtype)
        elif self.tokenizer is None:
            raise RecordError(f"field {'+'.join(part.keys)!r} is text, which needs a text tokenizer")
        else:
            texts = [field(record, key) for key in part.keys]
            for key, text in zip(part.keys, texts, strict=True):
                if not isinstance(text, str):
                    raise RecordError(f"field {key!r} is of type {type(text).__name__}, not text")
            text = (self.prepend_text if first else "") + self.separator.join(texts)
            ids = np.array(self.tokenizer.encode(text), np.int64)
        check_ids(ids, self.vocab_size)
        return ids


def make_processor(
    settings: FieldSettings, vocab_size: int, tokenizer: Tokenizer | None = None, bos: int = BOS, eos: int = EOS
) -> RecordProcessor:
    """Returns the processor of a field list.

    Args:
      vocab_size: of the model; ids must be below it.
      tokenizer: a text tokenizer, whose special ids replace `bos` and `eos`.
      bos, eos: special ids of the model.

    Raises:
      UserError: naming the setting, if the field list is invalid, an id is outside the vocabulary, or a text field has
        no text tokenizer.
    """
    if tokenizer is not None:
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    parts: tuple[Part, ...] = ()
    if not settings.fields_from_example:
        try:
            parts = parse_fields(settings.fields, bos, eos)
        except RecordError as reason:
            raise UserError(f"fields: {reason}") from None
        if settings.prepend_text and parts[0].kind != "text":
            raise UserError(f"prepend_text={settings.prepend_text!r}: the first of {settings.fields!r} is not text")
        parts = _add_special(parts, settings.add_bos_token, settings.add_eos_token, bos, eos)
    for part in parts:
        _check_part(part, settings.fields, vocab_size, tokenizer)
    return RecordProcessor(
        parts=parts,
        fields_from_example=settings.fields_from_example,
        add_bos=settings.add_bos_token,
        add_eos=settings.add_eos_token,
        bos=bos,
        eos=eos,
        prepend_text=settings.prepend_text,
        separator=settings.subfield_separator,
        dtype=settings.base64_token_dtype,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
    )


def _check_part(part: Part, fields: str, vocab_size: int, tokenizer: Tokenizer | None) -> None:
    if part.kind == "literal" and part.literal < 0:
        raise UserError(f"fields={fields!r}: the text tokenizer has no such special token (bos, eos)")
    if part.kind == "literal" and part.literal >= vocab_size:
        raise UserError(f"fields={fields!r}: id {part.literal} is outside the vocabulary 0..{vocab_size - 1}")
    if part.kind == "text" and tokenizer is None:
        text = "+".join(part.keys)
        raise UserError(
            f"fields={fields!r}: {text!r} is a text field and needs a text tokenizer (--tokenizer.vocab_file); "
            f"a base64 token field is written {{{text}}}"
        )


def _add_special(parts: tuple[Part, ...], add_bos: bool, add_eos: bool, bos: int, eos: int) -> tuple[Part, ...]:
    """Adds the special ids to a field list: bos without loss, because nothing precedes it; eos with loss."""
    before = (Part("literal", literal=bos, mask=0.0),) if add_bos else ()
    after = (Part("literal", literal=eos),) if add_eos else ()
    return before + parts + after
