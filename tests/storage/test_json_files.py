"""JSON that may be damaged or hostile: bounds, repeated keys, schemas; errors name the file and the place."""

import re

import pytest

from EasyLM.errors import UserError
from EasyLM.storage import json_files, parse_json, read_json

SCHEMA = {"step": int, "rate?": float, "names?": [str], "map?": {str: [int]}, "either?": (int, str)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"not JSON \("),
        ("[1", r"not JSON \("),
        (b"\xff\xfe", r"not JSON \("),
        ("[" * 100_000, r"not JSON \("),
        ('{"step": ' + "[" * 65 + "]" * 65 + "}", "more than 64 levels deep"),
        ('{"step": 1, "step": 2}', "the key 'step' is repeated"),
        ('{"step": 1, "a": {"b": 1, "b": 1}}', "the key 'b' is repeated"),
        ("1" * 5000, r"not JSON \("),
        ("[]", "^must be an object, not a list"),
        ("null", "^must be an object, not null"),
        ("{}", "^lacks the key 'step'"),
        ('{"step": true}', "^step must be an integer, not true or false"),
        ('{"step": 1.0}', "^step must be an integer, not a number"),
        ('{"step": 1, "rate": "x"}', "^rate must be a number, not a text"),
        ('{"step": 1, "names": "ab"}', "^names must be a list, not a text"),
        ('{"step": 1, "names": ["a", 3]}', r"^names\[1\] must be a text, not an integer"),
        ('{"step": 1, "map": {"": [1], "k": {}}}', "^map.k must be a list, not an object"),
        ('{"step": 1, "either": null}', "^either must be an integer or a text, not null"),
    ],
)
def test_invalid_json_is_named(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_json(text, SCHEMA)
    assert len(str(caught.value)) < 300


def test_valid_json():
    values = {"step": 1, "rate": 3, "names": [], "map": {"?": [1]}, "either": "x", "other": [{}]}
    assert parse_json('{"step":1,"rate":3,"names":[],"map":{"?":[1]},"either":"x","other":[{}]}', SCHEMA) == values
    assert parse_json("[1, Infinity]", [float]) == [1, float("inf")]  # some programs write it


def test_a_file_is_named_and_bounded(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text('{"step": "one"}')
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: step must be an integer"):
        read_json(path, SCHEMA)
    monkeypatch.setattr(json_files, "MOST_BYTES", 1 << 20)
    path.write_text('{"step": 1}' + " " * (1 << 20))
    with pytest.raises(UserError, match="it has more than 1 MiB"):
        read_json(path, SCHEMA)
