"""Seeded mutations of bytes and of JSON texts. They know no file format.

`mutated` changes bytes: bit flips, hostile numbers in places that may be length fields, and ranges that are removed,
repeated, moved or zeroed. `mutated_json` changes the value of a JSON text: hostile numbers, other types, deep nesting,
missing, repeated and foreign keys.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np

_HEADER_BYTES = 512  # a third of all places are among these, because headers are a small share of most files
_MOST_RANGE = 4096  # bytes that are removed, repeated or moved
_MOST_OPERATIONS = 3
_DEPTH = 100_000
_RAW = "\N{OBJECT REPLACEMENT CHARACTER}raw"  # stands for a text that json.dumps cannot write
# Texts of JSON values. Those after the first line are no JSON, or have no value of the usual types.
_HOSTILE_VALUES = (
    *("null", "true", "0", "-1", "1", "0.5", "-0.0", '""', '"x"', "[]", "{}", "[[]]", '{"": 0}', '"\\u0000"', "[null]"),
    *("NaN", "Infinity", "-Infinity", "1e999", "1e308", "-1e-320", "2147483648", "4294967295", "9223372036854775807"),
    *("9223372036854775808", "-9223372036854775809", "18446744073709551616", "1" + "0" * 400, "1" * 5000),
    *('"\\ud800"', '"../../x"', '"%s"', '"\\n\\r\\u2028"', '"' + "y" * 100_000 + '"', "[0,0,0,0,0,0,0,0,0]"),
    *("[" * 70 + "]" * 70, "[" * _DEPTH + "]" * _DEPTH, '{"a":' * _DEPTH + "1" + "}" * _DEPTH, "[" * _DEPTH),
)
_HOSTILE_KEYS = ("", "\0", "__class__", "../x", "k" * 10_000, "\ud800", "step", "params")


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    """Returns the bytes after one or more random operations. Rarely, the result equals the input."""
    if rng.random() < 0.01:
        return b""
    for _ in range(int(rng.integers(1, _MOST_OPERATIONS + 1)) if rng.random() < 0.3 else 1):
        operation = _OPERATIONS[int(rng.integers(len(_OPERATIONS)))]
        data = bytes(operation(rng, bytearray(data))) if data else data
    return data


def mutated_json(rng: np.random.Generator, value: Any) -> bytes:
    """Returns the JSON text of a value of which one part, or a few, are changed. The text may be invalid JSON."""
    value, raw = json.loads(json.dumps(value)), {}
    for number in range(1 if rng.random() < 0.8 else 3):
        entries = list(_entries(value))
        if not entries:
            break
        container, key = entries[int(rng.integers(len(entries)))]
        choice = rng.random()
        if choice < 0.6:
            placeholder = f"{_RAW}{number}"
            raw[json.dumps(placeholder)] = _HOSTILE_VALUES[int(rng.integers(len(_HOSTILE_VALUES)))]
            container[key] = placeholder
        elif choice < 0.75:
            del container[key]
        elif choice < 0.85:  # another part of the same value
            other, other_key = entries[int(rng.integers(len(entries)))]
            container[key] = json.loads(json.dumps(other[other_key]))
        elif isinstance(container, list):
            container.insert(key, container[key])
        else:
            container[_HOSTILE_KEYS[int(rng.integers(len(_HOSTILE_KEYS)))]] = container[key]
    text = json.dumps(value)
    for placeholder, replacement in raw.items():
        text = text.replace(placeholder, replacement)
    if rng.random() < 0.05 and text.startswith("{") and len(text) > 2:  # all keys are repeated
        text = f"{text[:-1]}, {text[1:]}"
    return text.encode()


def _entries(value: Any) -> Any:
    """Yields (container, key) of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _entries(inner)


def _position(rng: np.random.Generator, data: bytearray) -> int:
    most = len(data) if rng.random() < 2 / 3 else min(len(data), _HEADER_BYTES)
    return int(rng.integers(most))


def _range(rng: np.random.Generator, data: bytearray) -> slice:
    start = _position(rng, data)
    return slice(start, start + int(2 ** rng.uniform(0, np.log2(_MOST_RANGE))))


def _flip_bits(rng: np.random.Generator, data: bytearray) -> bytearray:
    for _ in range(int(rng.integers(1, 5))):
        data[_position(rng, data)] ^= 1 << int(rng.integers(8))
    return data


def _replace_bytes(rng: np.random.Generator, data: bytearray) -> bytearray:
    for _ in range(int(rng.integers(1, 5))):
        data[_position(rng, data)] = int(rng.integers(256))
    return data


def _write_number(rng: np.random.Generator, data: bytearray) -> bytearray:
    """Overwrites 1, 2, 4 or 8 bytes, which may be a length, with a hostile number."""
    width, start = int(rng.choice([1, 2, 4, 8])), _position(rng, data)
    largest = 256**width - 1
    numbers = [0, 1, largest, largest - 1, largest // 2, largest // 2 + 1, len(data), len(data) + 1, 10**9]
    number = numbers[int(rng.integers(len(numbers)))] & largest
    data[start : start + width] = number.to_bytes(width, "little" if rng.random() < 0.5 else "big")
    return data


def _truncate(rng: np.random.Generator, data: bytearray) -> bytearray:
    return data[: _position(rng, data)]


def _remove(rng: np.random.Generator, data: bytearray) -> bytearray:
    del data[_range(rng, data)]
    return data


def _repeat(rng: np.random.Generator, data: bytearray) -> bytearray:
    part = _range(rng, data)
    data[part.start : part.start] = data[part]
    return data


def _move(rng: np.random.Generator, data: bytearray) -> bytearray:
    part = data[_range(rng, data)]
    target = _position(rng, data)
    data[target : target + len(part)] = part
    return data


def _zero(rng: np.random.Generator, data: bytearray) -> bytearray:
    part = _range(rng, data)
    data[part] = bytes(len(data[part]))
    return data


def _insert(rng: np.random.Generator, data: bytearray) -> bytearray:
    target = _position(rng, data)
    data[target:target] = rng.bytes(int(2 ** rng.uniform(0, 8)))
    return data


def _double(rng: np.random.Generator, data: bytearray) -> bytearray:
    return data + data


_OPERATIONS: tuple[Callable[[np.random.Generator, bytearray], bytearray], ...] = (
    *(_flip_bits, _flip_bits, _replace_bytes, _write_number, _write_number, _truncate, _remove, _repeat, _move),
    *(_zero, _insert, _double),
)
