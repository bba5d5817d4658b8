"""Field lists: which parts of a record become tokens, in what order, and which of them count in the loss."""

import dataclasses
import functools

import numpy as np

from EasyLM.data.records import TOKENS_KEY, RecordError, check_ids, decode_tokens, field
from EasyLM.errors import UserError, choose
from EasyLM.flags import Flag
from EasyLM.vocab import BOS, EOS

DTYPES = ("i4", "u4", "i2", "u2", "i8")

TEXT_PROCESSOR_FLAGS = {
    "fields_from_example": Flag(
        "", "Key of the record whose text is that record's own field list; used instead of `fields`."
    ),
    "fields": Flag(
        "",
        "Comma list of the parts of a record that become tokens, in order: {key} is a base64 token field, <|8192|> a "
        "literal id, <|bos|> and <|eos|> the special ids, a+b text fields joined (needs a text tokenizer), [x] the "
        "part x without loss. Empty names are skipped. Visual sentences: '{tokens}'.",
    ),
    "subfield_separator": Flag(" ", "Put between the text fields of a+b."),
    "add_bos_token": Flag(False, "Begin each record with the beginning-of-sentence id, without loss."),
    "add_eos_token": Flag(False, "End each record with the end-of-sentence id, with loss."),
    "prepend_text": Flag("", "Text put before the record's first field, which must be a text field."),
    "base64_token_dtype": Flag("i4", "Item type of the base64 token fields (little-endian).", choices=DTYPES),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One name of a field list: base64 ids under a key, a literal id, or texts to join; `mask` is its loss weight."""

    kind: str  # "ids", "literal" or "text"
    keys: tuple[str, ...] = ()
    literal: int = 0
    mask: float = 1.0


@functools.lru_cache(maxsize=256)
def parse_fields(fields: str, bos: int, eos: int) -> tuple[Part, ...]:
    """The parts of a comma list of names (the flag `fields`). Empty names are skipped: ',{tokens},' means '{tokens}'.

    Raises:
      RecordError: naming the part that cannot be read, or that none is left.
    """
    special = {"bos": bos, "eos": eos}
    parts = []
    for name in filter(None, (name.strip() for name in fields.split(","))):
        mask = 1.0
        if name.startswith("[") and name.endswith("]"):
            name, mask = name[1:-1].strip(), 0.0
        if name.startswith("<|") and name.endswith("|>"):
            if name[2:-2] not in special and not name[2:-2].isdecimal():
                raise RecordError(f"cannot read {name!r} in {fields!r}: choose <|bos|>, <|eos|> or an id, as <|8192|>")
            literal = special[name[2:-2]] if name[2:-2] in special else int(name[2:-2])
            parts.append(Part("literal", literal=literal, mask=mask))
        elif name.startswith("{") and name.endswith("}") and len(name) > 2:
            parts.append(Part("ids", keys=(name[1:-1],), mask=mask))
        elif any(c in "{}[]<>|" for c in name) or not all(name.split("+")):
            raise RecordError(f"cannot read {name!r} in {fields!r}: choose {{key}}, <|id|>, [x] or text fields a+b")
        else:
            parts.append(Part("text", keys=tuple(name.split("+")), mask=mask))
    if not parts:
        raise RecordError(f"{fields!r} names no field: give for instance '{{{TOKENS_KEY}}}'")
    return tuple(parts)


@dataclasses.dataclass(frozen=True)
class RecordProcessor:
    """Record -> (ids int32 [n], loss weights float32 [n]). Plain data, but for the tokenizer."""

    parts: tuple[Part, ...]  # with the bos and eos that the flags add; empty where the record names its own
    fields_from_example: str
    add_bos: bool
    add_eos: bool
    bos: int
    eos: int
    prepend_text: str
    separator: str
    dtype: str
    vocab_size: int
    tokenizer: object | None = None  # a text tokenizer: `encode(text) -> list of ids`

    def __call__(self, record: dict) -> tuple[np.ndarray, np.ndarray]:
        """Raises RecordError if the record lacks a field, or a field is not what its name promises."""
        parts = self.parts or self._own_parts(record)
        pieces = [self._ids(record, part, first=i == int(self.add_bos)) for i, part in enumerate(parts)]
        masks = [np.full(len(piece), part.mask, np.float32) for piece, part in zip(pieces, parts, strict=True)]
        return np.concatenate(pieces, dtype=np.int32, casting="unsafe"), np.concatenate(masks)

    @property
    def slice_part(self) -> int | None:
        """Index of the one base64 field among literals, if just one: its ids can be cut out of a raw line."""
        ids = [i for i, part in enumerate(self.parts) if part.kind != "literal"]
        return ids[0] if len(ids) == 1 and self.parts[ids[0]].kind == "ids" else None

    @property
    def all_in_loss(self) -> bool:
        """Whether every token of every record counts in the loss."""
        return bool(self.parts) and all(part.mask == 1 for part in self.parts)

    @property
    def needs_text(self) -> bool:
        """Whether records hold text to tokenize (with `fields_from_example` and a text tokenizer: they may)."""
        return any(part.kind == "text" for part in self.parts) or (not self.parts and self.tokenizer is not None)

    def identity(self) -> dict:
        """All that the ids of a record depend on, as JSON values."""
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "tokenizer"}
        facts["parts"] = [[part.kind, list(part.keys), part.literal, part.mask] for part in self.parts]
        return facts | {"tokenizer": self.tokenizer.identity() if self.needs_text else None}

    def _own_parts(self, record):
        fields = field(record, self.fields_from_example)
        if not isinstance(fields, str):
            raise RecordError(
                f"field {self.fields_from_example!r} is of type {type(fields).__name__}, not a field list"
            )
        return _surround(parse_fields(fields, self.bos, self.eos), self.add_bos, self.add_eos, self.bos, self.eos)

    def _ids(self, record, part, first):
        if part.kind == "literal":
            ids = np.array([part.literal])
        elif part.kind == "ids":
            ids = decode_tokens(field(record, part.keys[0]), part.keys[0], self.dtype)
        elif self.tokenizer is None:
            raise RecordError(f"field {'+'.join(part.keys)!r} is text, which needs --tokenizer.vocab_file")
        else:
            texts = [field(record, key) for key in part.keys]
            for key, text in zip(part.keys, texts, strict=True):
                if not isinstance(text, str):
                    raise RecordError(f"field {key!r} is of type {type(text).__name__}, not text")
            text = self.prepend_text * first + self.separator.join(texts)
            ids = np.array(self.tokenizer.encode(text), np.int64)
        check_ids(ids, self.vocab_size)
        return ids


def make_processor(config, vocab_size: int, tokenizer=None, name: str = "text_processor") -> RecordProcessor:
    """The processor of a `text_processor` config; `name` is how messages call its flags.

    Raises:
      UserError: naming the flag, if no field is named, a name cannot be read, an id is outside the vocabulary, or text
        is named and there is no text tokenizer.
    """
    bos, eos = (BOS, EOS) if tokenizer is None else (tokenizer.bos_token_id, tokenizer.eos_token_id)
    choose(f"--{name}.base64_token_dtype", config.base64_token_dtype, DTYPES)
    parts = ()
    if not config.fields_from_example:
        try:
            parts = parse_fields(config.fields, bos, eos)
        except RecordError as reason:
            raise UserError(f"--{name}.fields: {reason}") from None
        if config.prepend_text and parts[0].kind != "text":
            raise UserError(
                f"--{name}.prepend_text={config.prepend_text!r}: the first of {config.fields!r} is not text"
            )
        parts = _surround(parts, config.add_bos_token, config.add_eos_token, bos, eos)
    for part in parts:
        if part.kind == "literal" and part.literal < 0:
            raise UserError(f"--{name}: the tokenizer of --tokenizer.vocab_file has no bos or eos token to add")
        if part.kind == "literal" and part.literal >= vocab_size:
            raise UserError(
                f"--{name}.fields={config.fields!r}: id {part.literal} is outside the vocabulary 0..{vocab_size - 1}"
            )
        if part.kind == "text" and tokenizer is None:
            text = "+".join(part.keys)
            raise UserError(
                f"--{name}.fields={config.fields!r}: {text!r} is a text field and needs --tokenizer.vocab_file; "
                f"a base64 token field is written {{{text}}}"
            )
    return RecordProcessor(
        parts=parts,
        fields_from_example=config.fields_from_example,
        add_bos=config.add_bos_token,
        add_eos=config.add_eos_token,
        bos=bos,
        eos=eos,
        prepend_text=config.prepend_text,
        separator=config.subfield_separator,
        dtype=config.base64_token_dtype,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
    )


def _surround(parts, add_bos, add_eos, bos, eos):
    """The parts with the special ids that the flags add: a sentence's end is worth predicting, its beginning is not."""
    before = (Part("literal", literal=bos, mask=0.0),) * add_bos
    return before + parts + (Part("literal", literal=eos),) * add_eos
