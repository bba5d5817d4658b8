"""Short digests of JSON values and of file contents."""

import hashlib
import re
from typing import Any

import orjson

from EasyLM.storage.reading import open_binary

END_BYTES = 64 << 10  # hashed at each end of a file
SAMPLES, SAMPLE_BYTES = 256, 64 << 10  # of the whole file: a file of up to 16 MiB is hashed completely
_CONTENT = re.compile(r"[0-9a-f]{16}|[0-9a-f]{32}")  # of version 0.1.0, and of this one


def json_digest(value: Any) -> str:
    """Returns 16 hexadecimal digits, equal for equal JSON values."""
    return hashlib.blake2b(orjson.dumps(value, option=orjson.OPT_SORT_KEYS), digest_size=8).hexdigest()


def content_digest(path: str, size: int) -> str:
    """Returns 32 hexadecimal digits that identify a file of `size` bytes, at a bounded cost.

    The first 16 are a hash of the first and last 64 KiB, which is the whole digest in version 0.1.0. The others are a
    hash of the file up to 16 MiB, and of 256 evenly spaced samples of 64 KiB of a larger one.
    """
    with open_binary(path) as file:
        head = file.read(END_BYTES)
        file.seek(max(0, size - END_BYTES))
        ends = hashlib.blake2b(head + file.read(END_BYTES), digest_size=8)
        samples = hashlib.blake2b(digest_size=8)
        for start in _sample_starts(size):
            file.seek(start)
            samples.update(file.read(SAMPLE_BYTES))
    return ends.hexdigest() + samples.hexdigest()


def _sample_starts(size: int) -> list[int]:
    if size <= SAMPLES * SAMPLE_BYTES:
        return list(range(0, size, SAMPLE_BYTES))
    return [number * (size - SAMPLE_BYTES) // (SAMPLES - 1) for number in range(SAMPLES)]


def same_contents(saved: Any, current: Any) -> bool:
    """Whether two JSON values are equal. A content digest of version 0.1.0 equals a newer one that starts with it."""
    if isinstance(saved, dict) and isinstance(current, dict):
        return saved.keys() == current.keys() and all(same_contents(saved[key], current[key]) for key in saved)
    if isinstance(saved, list) and isinstance(current, list):
        return len(saved) == len(current) and all(map(same_contents, saved, current))
    if all(isinstance(value, str) and _CONTENT.fullmatch(value) for value in (saved, current)):
        return saved.startswith(current) or current.startswith(saved)
    return saved == current
