"""Short digests of JSON values and of file contents."""

import hashlib
from typing import Any

import orjson

from EasyLM.storage.reading import open_binary

END_BYTES = 64 << 10  # hashed at each end of a file


def json_digest(value: Any) -> str:
    """Returns 16 hexadecimal digits, equal for equal JSON values."""
    return hashlib.blake2b(orjson.dumps(value, option=orjson.OPT_SORT_KEYS), digest_size=8).hexdigest()


def content_digest(path: str, size: int) -> str:
    """Returns 16 hexadecimal digits that identify a file of `size` bytes: a hash of its first and last 64 KiB."""
    with open_binary(path) as file:
        head = file.read(END_BYTES)
        file.seek(max(0, size - END_BYTES))
        return hashlib.blake2b(head + file.read(END_BYTES), digest_size=8).hexdigest()
