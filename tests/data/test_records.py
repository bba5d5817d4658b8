"""Records and field lists: reading and writing, the parts that become tokens, messages about bad lines."""

import base64
import json

import numpy as np
import pytest

from EasyLM.data import record_fields, records
from EasyLM.errors import UserError

IDS = np.random.default_rng(0).integers(0, 8192, 512)
RECORD = {"tokens": base64.b64encode(IDS.astype("<i4").tobytes()).decode(), "more": "AQAAAAIAAAA=", "note": "a dog"}
MORE = [1, 2]


class Words:
    """A text tokenizer that encodes a word of n letters as the id n."""

    bos_token_id, eos_token_id, vocab_size = 98, 99, 100

    def encode(self, text):
        return [len(word) for word in text.split()]


def processor(fields_flag="", tokenizer=None, vocab_size=8292, **settings):
    field_settings = record_fields.FieldSettings(fields_flag, **settings)
    return record_fields.make_processor(field_settings, vocab_size, tokenizer)


def test_record_round_trip(tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_bytes(records.record_line(IDS, label="cat") + b"\n" + records.record_line([]))
    assert json.loads(path.read_text().splitlines()[0]) == {"tokens": RECORD["tokens"], "label": "cat"}
    (ids, record), (none, _) = records.read_records(str(path), 8192)
    np.testing.assert_array_equal(ids, IDS)
    assert record["label"] == "cat" and len(none) == 0


# The results of the LVM release (tests/golden/README.md, "Record fields"), which fails on `,{tokens},`.
@pytest.mark.parametrize(
    "names, ids, mask",
    [
        ("{tokens}", [*IDS], [1] * 512),
        (",{tokens},", [*IDS], [1] * 512),
        (" {tokens} ,, ", [*IDS], [1] * 512),
        ("[{tokens}]", [*IDS], [0] * 512),
        ("<|8192|>,{tokens},<|8193|>", [8192, *IDS, 8193], [1] * 514),
        ("[<|8192|>],{tokens}", [8192, *IDS], [0] + [1] * 512),
        ("<|bos|>,[{tokens}],{more},[<|eos|>]", [8192, *IDS, *MORE, 8193], [1] + [0] * 512 + [1, 1, 0]),
        ("<|0|>,{more}", [0, *MORE], [1, 1, 1]),
    ],
)
def test_fields(names, ids, mask):
    got_ids, got_mask = processor(names)(RECORD)
    np.testing.assert_array_equal(got_ids, ids)
    np.testing.assert_array_equal(got_mask, mask)
    assert got_ids.dtype == np.int32 and got_mask.dtype == np.float32


def test_add_bos_and_eos():
    ids, mask = processor("{more}", add_bos_token=True, add_eos_token=True)(RECORD)
    np.testing.assert_array_equal(ids, [8192, *MORE, 8193])
    np.testing.assert_array_equal(mask, [0, 1, 1, 1])


def test_special_ids_are_those_of_the_model():
    settings = record_fields.FieldSettings(fields="<|bos|>,{tokens},<|eos|>", add_bos_token=True)
    processor = record_fields.make_processor(settings, 16484, bos=16384, eos=16385)
    ids, _ = processor({"tokens": records.encode_tokens(np.array([16383, 5]))})
    assert ids.tolist() == [16384, 16384, 16383, 5, 16385]


def test_text_fields_are_joined_after_the_prepended_text():
    record = {"a": "one three", "b": "fourteen", **RECORD}
    ids, mask = processor("a+b,[b],{more}", Words(), subfield_separator="xx", prepend_text="no ")(record)
    np.testing.assert_array_equal(ids, [2, 3, 5 + 2 + 8, 8, *MORE])
    np.testing.assert_array_equal(mask, [1, 1, 1, 0, 1, 1])
    ids, _ = processor("b", Words(), add_bos_token=True, add_eos_token=True, prepend_text="go")(record)
    np.testing.assert_array_equal(ids, [98, 10, 99])


def test_record_with_its_own_field_list():
    own = processor(fields_from_example="layout", add_eos_token=True)
    ids, mask = own({"layout": "[{more}],<|7|>", **RECORD})
    np.testing.assert_array_equal(ids, [*MORE, 7, 8193])
    np.testing.assert_array_equal(mask, [0, 0, 1, 1])
    with pytest.raises(records.RecordError, match=r"cannot read '\{more' in '\{more'"):
        own({"layout": "{more", **RECORD})


@pytest.mark.parametrize("dtype", record_fields.FIELD_DTYPES)
def test_item_types(dtype):
    record = {"tokens": base64.b64encode(IDS.astype(f"<{dtype}").tobytes()).decode()}
    ids, _ = processor("{tokens}", base64_token_dtype=dtype)(record)
    np.testing.assert_array_equal(ids, IDS)
    assert ids.dtype == np.int32


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, r"^fields: '' names no field: give for instance '\{tokens\}'"),
        ({"fields_flag": ", ,"}, "names no field"),
        ({"fields_flag": "<|dog|>"}, r"cannot read '<\|dog\|>'.*choose <\|bos\|>, <\|eos\|> or an id"),
        ({"fields_flag": "{tokens"}, r"cannot read '\{tokens'.*choose \{key\}, <\|id\|>, \[x\] or text fields a\+b"),
        ({"fields_flag": "a+"}, r"cannot read 'a\+'"),
        ({"fields_flag": "{tokens},<|8292|>"}, r"id 8292 is outside the vocabulary 0\.\.8291"),
        ({"fields_flag": "<|bos|>,{tokens}", "vocab_size": 512}, r"id 8192 is outside the vocabulary 0\.\.511"),
        (
            {"fields_flag": "tokens"},
            r"'tokens' is a text field and needs a text tokenizer .* \{tokens\}",
        ),
        ({"fields_flag": "{tokens}", "prepend_text": "x"}, "prepend_text='x': the first of '{tokens}' is not text"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        processor(**settings)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{tokens", r"not JSON \("),
        ("[1]", "not a JSON object but a list"),
        ('{"token": "", "x": 1}', r"lacks the field 'tokens' \(fields here: token, x\)"),
        ("{}", r"lacks the field 'tokens' \(fields here: none\)"),
        ('{"tokens": 5}', "field 'tokens' is of type int, not base64 text"),
        ('{"tokens": "AAA"}', r"field 'tokens' is not base64 \("),
        ('{"tokens": "?AAA"}', r"field 'tokens' is not base64 \("),
        ('{"tokens": "AAAAAAA="}', r"field 'tokens' has 5 bytes, not a multiple of 4 \(item type int32\)"),
        ('{"tokens": "AAAAAAAgAAA="}', r"id 8192 is outside the vocabulary 0\.\.8191"),
        ('{"tokens": "/////w=="}', r"id -1 is outside the vocabulary 0\.\.8191"),
    ],
)
def test_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"tokens": "AQAAAA=="}\n\n' + line + "\n")
    with pytest.raises(UserError, match=f"^{path}:3: {message}"):
        list(records.read_records(str(path), 8192))
