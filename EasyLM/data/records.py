"""Records: one JSON object per line, {"tokens": base64(int32 little-endian ids)}, with any other keys.

Every reader and writer of records uses these functions. `record_fields` selects the parts of a record that become
tokens.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pybase64

from EasyLM.errors import UserError
from EasyLM.storage import read_lines

TOKENS_KEY = "tokens"
TOKEN_DTYPE = "<i4"
_ENOUGH = 8  # ids of which a pattern is no coincidence


class RecordError(ValueError):
    """The reason why a line is not a record. Callers that know FILE:LINE turn it into a UserError."""


@functools.lru_cache
def token_type(dtype: str) -> np.dtype:
    """Returns the little-endian item type of a name such as "i4"."""
    return np.dtype(dtype).newbyteorder("<")


def encode_tokens(tokens: np.typing.ArrayLike) -> str:
    """Returns the base64 of ids [n] as little-endian int32, which must hold them."""
    ids = np.asarray(tokens)
    assert ids.ndim == 1 and (ids.size == 0 or np.can_cast(ids.dtype, np.int64)), f"not ids: {ids.dtype} {ids.shape}"
    narrow = ids.astype(TOKEN_DTYPE)
    assert np.array_equal(narrow, ids), f"an id does not fit into {TOKEN_DTYPE}"
    return pybase64.b64encode_as_string(narrow.tobytes())


def decode_tokens(text: Any, key: str = TOKENS_KEY, dtype: str = TOKEN_DTYPE) -> np.ndarray:
    """Returns the ids of a base64 field, a read-only array [n] of the given item type.

    Raises:
      RecordError: if `text` is not base64 text, or its length is not a multiple of the item size.
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
    """Raises RecordError, naming the first id outside 0..vocab_size-1, and the type in which all would be inside."""
    if not _are_inside(ids, vocab_size):
        outside = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise RecordError(f"id {outside} is outside the vocabulary 0..{vocab_size - 1}{_other_type(ids, vocab_size)}")


def _are_inside(ids: np.ndarray, vocab_size: int) -> bool:
    unsigned = ids.view(f"u{ids.dtype.itemsize}")  # negative ids become huge: one comparison checks both bounds
    return ids.size == 0 or bool(unsigned.max() < vocab_size)


def _other_type(ids: np.ndarray, vocab_size: int) -> str:
    """Returns a question that names the item type as which ids [n] would be in the vocabulary. Empty: there is none."""
    name = f"{ids.dtype.kind}{ids.dtype.itemsize}"
    readings = {f"big-endian {name}": ids.byteswap()}
    for other in ("i8", "i4", "u2"):  # the widest first: a wide id has zeros in it
        if ids.nbytes % token_type(other).itemsize == 0:
            readings[other] = np.frombuffer(ids.tobytes(), token_type(other))
    for other, reading in readings.items():
        if reading.size >= _ENOUGH and reading.any() and _are_inside(reading, vocab_size):
            return f"; are they stored as {other}, not as {name}?"
    return ""


def type_warning(ids: np.ndarray) -> str:
    """Returns why ids [n] seem to be stored in a wider item type, or in another byte order; empty: they do not.

    Ids of a wider type come with zeros between them. Swapped bytes of ids below 256 are multiples of 256.
    """
    if len(ids) < _ENOUGH or not ids.any():
        return ""
    for width in (8, 4):
        times = width // ids.dtype.itemsize
        if times > 1 and len(ids) % times == 0 and not ids.reshape(-1, times)[:, 1:].any():
            return f"every second id is 0; are its ids {8 * width}-bit numbers (base64_token_dtype=i{width})?"
    if ids.dtype.itemsize == 2 and not (ids & 255).any() and (ids != ids[0]).any():
        return "every id is a multiple of 256; are its ids big-endian? They must be little-endian"
    return ""


def parse_line(line: bytes | memoryview) -> dict[str, Any]:
    """Returns the JSON object of a line. Raises RecordError if the line is not a JSON object."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise RecordError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise RecordError(f"not a JSON object but a {type(record).__name__}")
    return record


def field(record: dict[str, Any], key: str) -> Any:
    """Returns `record[key]`. Raises RecordError, listing the fields of the record, if the key is missing."""
    if key not in record:
        raise RecordError(f"lacks the field {key!r} (fields here: {', '.join(map(str, record)) or 'none'})")
    return record[key]


def record_line(tokens: np.typing.ArrayLike, **others: Any) -> bytes:
    """Returns the line of a record, with its newline, from ids [n] and other keys with JSON values."""
    assert TOKENS_KEY not in others
    return orjson.dumps({TOKENS_KEY: encode_tokens(tokens), **others}) + b"\n"


def read_record(line: bytes, vocab_size: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns ids int32 [n] and the whole JSON object of a line.

    Raises:
      RecordError: if the line is not a record, or an id is outside the vocabulary.
    """
    record = parse_line(line)
    ids = decode_tokens(field(record, TOKENS_KEY))
    check_ids(ids, vocab_size)
    return ids, record


def read_records(path: str, vocab_size: int) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Yields `read_record` of each line that is not blank; .gz and .zst files are decompressed.

    Raises:
      UserError: naming FILE:LINE, for a line that is not a record.
    """
    for number, line in read_lines(path):
        try:
            yield read_record(line, vocab_size)
        except RecordError as reason:
            raise UserError(f"{path}:{number}: {reason}") from None
