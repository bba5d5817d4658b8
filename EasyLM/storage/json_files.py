"""JSON that other programs or a damaged disk may have written: bounded in size and depth, and checked with a schema."""

import contextlib
import json
import os
from typing import Any

from EasyLM.errors import UserError, prefix_errors
from EasyLM.storage.reading import open_binary

MOST_BYTES = 64 << 20
MOST_DEPTH = 64
# What a value must be:
#   a type, or a tuple of types
#   {"key": schema, "key?": schema}   an object with these keys, of which those with ? may be missing, and any others
#   {str: schema}                     an object whose values all follow the schema
#   [schema]                          a list whose items all follow the schema
Schema = Any


def read_json(path: str | os.PathLike, schema: Schema = dict) -> Any:
    """Returns the content of a JSON file, local or remote.

    Raises:
      UserError: naming the file and the path of the value in it, if it is not JSON, is too large or too deep, repeats a
        key, or does not follow the schema.
      OSError: if it cannot be read.
    """
    with contextlib.closing(open_binary(os.fspath(path))) as file:
        data = file.read(MOST_BYTES + 1)
    with prefix_errors(os.fspath(path)):
        return parse_json(data, schema)


def parse_json(data: bytes | str, schema: Schema = dict) -> Any:
    """Returns the value of a JSON text. Raises UserError as `read_json` does, without the name of a file."""
    if len(data) > MOST_BYTES:
        raise UserError(f"not JSON of this project: it has more than {MOST_BYTES >> 20} MiB")
    try:
        value = json.loads(data, object_pairs_hook=_unique)
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})") from None
    check_schema(value, schema)
    return value


def check_schema(value: Any, schema: Schema, path: str = "") -> None:
    """Raises UserError, naming the path of the value (`a.b[2]`), unless it follows the schema."""
    subject = f"{path} " if path else ""
    if isinstance(schema, type | tuple):
        kinds = schema if isinstance(schema, tuple) else (schema,)
        if type(value) not in kinds and not (float in kinds and type(value) is int):
            names = " or ".join(_NAMES.get(kind, kind.__name__) for kind in kinds)
            raise UserError(f"{subject}must be {names}, not {_NAMES.get(type(value), type(value).__name__)}")
    elif isinstance(schema, list):
        if not isinstance(value, tuple):  # in Python's own settings
            check_schema(value, list, path)
        for number, item in enumerate(value):
            check_schema(item, schema[0], f"{path}[{number}]")
    else:
        check_schema(value, dict, path)
        if str in schema:
            wanted = dict.fromkeys(value, schema[str])
        else:
            wanted = {key.removesuffix("?"): inner for key, inner in schema.items()}
        for key, inner in wanted.items():
            if key in value:
                check_schema(value[key], inner, f"{path}.{key}" if path else key)
            elif f"{key}?" not in schema:
                raise UserError(f"{subject}lacks the key {key!r}")


_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is repeated")
    return values


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [
        inner
        for outer in level
        if isinstance(outer, dict | list)
        for inner in (outer.values() if isinstance(outer, dict) else outer)
    ]:
        depth += 1
        if depth > MOST_DEPTH:
            raise ValueError(f"more than {MOST_DEPTH} levels deep")
