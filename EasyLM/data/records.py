"""Records: one JSON object a line, `{"tokens": base64(int32 little-endian ids)}`, other keys riding along.

The only reader and writer of a record. `EasyLM.fields` says which parts of a record become tokens.
"""

import functools
from collections.abc import Iterator

import numpy as np
import orjson
import pybase64

from EasyLM.errors import UserError
from EasyLM.storage import read_lines

TOKENS_KEY = "tokens"
TOKEN_DTYPE = "<i4"


class RecordError(ValueError):
    """Why a line is no record. Whoever knows the line's address turns it into a UserError `file:line: reason`."""


@functools.lru_cache
def token_type(dtype: str) -> np.dtype:
    """The little-endian item type of that name."""
    return np.dtype(dtype).newbyteorder("<")


def encode_tokens(tokens, dtype: str = TOKEN_DTYPE) -> str:
    """Base64 of the ids [n] as little-endian integers. Ids that `dtype` cannot hold are our fault, not the user's."""
    ids = np.asarray(tokens)
    assert ids.ndim == 1 and (ids.size == 0 or np.can_cast(ids.dtype, np.int64)), f"no ids: {ids.dtype} {ids.shape}"
    narrow = ids.astype(token_type(dtype))
    assert np.array_equal(narrow, ids), f"an id does not fit into {dtype}"
    return pybase64.b64encode_as_string(narrow.tobytes())


def decode_tokens(text, key: str = TOKENS_KEY, dtype: str = TOKEN_DTYPE) -> np.ndarray:
    """The ids [n] of a base64 field as a read-only array of the given item type.

    Raises:
      RecordError: if it is not base64 text, or its length is not a multiple of the item size.
    """
    if not isinstance(text, str):
        raise RecordError(f"field {key!r} is of type {type(text).__name__}, not base64 text")
    try:
        raw = pybase64.b64decode(text, validate=True)
    except ValueError as error:
        raise RecordError(f"field {key!r} is not base64 ({error})") from None
    item = token_type(dtype)
    if len(raw) % item.itemsize:
        raise RecordError(
            f"field {key!r} has {len(raw)} bytes, not a multiple of {item.itemsize} (item type {item.name})"
        )
    return np.frombuffer(raw, item)


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Raises RecordError, naming the first id that is outside 0..vocab_size-1."""
    unsigned = ids.view(f"u{ids.dtype.itemsize}")  # a negative id becomes a huge one: one comparison for both ends
    if ids.size and unsigned.max() >= vocab_size:
        raise RecordError(f"id {ids[unsigned >= vocab_size][0]} is outside the vocabulary 0..{vocab_size - 1}")


def parse_line(line) -> dict:
    """The JSON object of a line (bytes). Raises RecordError if it is none."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise RecordError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise RecordError(f"not a JSON object but a {type(record).__name__}")
    return record


def field(record: dict, key: str):
    """`record[key]`. Raises RecordError listing the fields that are there."""
    if key not in record:
        raise RecordError(f"lacks the field {key!r} (fields here: {', '.join(map(str, record)) or 'none'})")
    return record[key]


def record_line(tokens, **others) -> bytes:
    """The line of a record, with its newline: ids [n] and any further JSON values under their own keys."""
    assert TOKENS_KEY not in others
    return orjson.dumps({TOKENS_KEY: encode_tokens(tokens), **others}) + b"\n"


def read_record(line, vocab_size: int) -> tuple[np.ndarray, dict]:
    """(ids int32 [n], the whole JSON object) of a line. Raises RecordError if it is no record of that vocabulary."""
    record = parse_line(line)
    ids = decode_tokens(field(record, TOKENS_KEY))
    check_ids(ids, vocab_size)
    return ids, record


def read_records(path: str, vocab_size: int) -> Iterator[tuple[np.ndarray, dict]]:
    """Yields `read_record` of each line that is not blank; .gz and .zst files are unpacked.

    Raises:
      UserError: addressed `file:line`, for a line that is no record.
    """
    for number, line in read_lines(path):
        try:
            yield read_record(line, vocab_size)
        except RecordError as reason:
            raise UserError(f"{path}:{number}: {reason}") from None
