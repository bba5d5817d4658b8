"""Records name their tokenizer. Tokens of two tokenizers are refused, with both places. Records without a name pass."""

import pytest
from data_kit import dataset

from EasyLM.data import line_index, packed_file, records
from EasyLM.data.tokenizer_names import tokenizer_of
from EasyLM.errors import UserError

A, B = "aaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb"


def write(path, *names) -> str:
    """Writes a sentence for each name; None: without a name."""
    others = [{} if name is None else {"tokenizer": name} for name in names]
    path.write_bytes(b"".join(records.record_line([number] * 40, **keys) for number, keys in enumerate(others)))
    return str(path)


def pack(path, keep_others=True) -> str:
    packed = str(path).removesuffix(".jsonl") + ".packed"
    packed_file.write(packed, [(str(path), records.read_records(str(path), 512))], keep_others)
    return packed


@pytest.mark.parametrize(
    ("names", "expected"),
    [([A, A, A], A), ([None, None], None), ([None, A, A], A), ([A, None, 3, ["b"], "", "x" * 5000, A], A)],
)
@pytest.mark.parametrize("fields", [",{tokens},", "[{tokens}],{tokens}"])
def test_the_name_of_a_file(tmp_path, names, expected, fields):
    """Also where lines are parsed one by one. Only short texts are names."""
    assert dataset(write(tmp_path / "a.jsonl", *names), 10, fields=fields).tokenizer == expected


@pytest.mark.parametrize("range_bytes", [1 << 20, 300])
@pytest.mark.parametrize("processes", [1, 2])
def test_two_tokenizers_in_one_file_are_refused(tmp_path, monkeypatch, range_bytes, processes):
    monkeypatch.setattr(line_index, "RANGE_BYTES", range_bytes)
    path = write(tmp_path / "a.jsonl", None, A, A, A, A, None, A, B, B, A)
    with pytest.raises(UserError, match=rf"{path}:8: tokens of the tokenizer {B}, but those of {path}:2 are of {A}"):
        dataset(path, 10, tokenizer_processes=processes)
    with pytest.raises(UserError, match=rf"{path}:8: tokens"):
        dataset(path, 10, skip_bad_lines=True)  # another tokenizer is not a bad line


@pytest.mark.parametrize("weights", ["", "1,1"])
@pytest.mark.parametrize("packed", [False, True])
def test_files_of_two_tokenizers_are_refused(tmp_path, packed, weights):
    first, second, unnamed = (write(tmp_path / f"{name}.jsonl", name) for name in (A, B, None))
    if packed:
        first, second, unnamed = (pack(path) for path in (first, second, unnamed))
    with pytest.raises(UserError, match=f"tokens of the tokenizer {B}, but those of .* are of {A}"):
        dataset(f"{first},{second}", 10, weights=weights)
    assert dataset(f"{unnamed},{second}", 10, weights=weights).tokenizer == B


@pytest.mark.parametrize("keep_others", [True, False])
def test_a_packed_file_keeps_the_name(tmp_path, keep_others):
    packed = pack(write(tmp_path / "a.jsonl", A, A), keep_others)
    assert dataset(packed, 10).tokenizer == A
    assert [tokenizer_of(record) for _, record in packed_file.read(packed, 512)] == [A, A]


def test_a_packed_file_does_not_name_sentences_without_a_name(tmp_path):
    packed = pack(write(tmp_path / "a.jsonl", None, A))
    assert dataset(packed, 10).tokenizer is None
    assert [tokenizer_of(record) for _, record in packed_file.read(packed, 512)] == [None, A]


def test_two_tokenizers_are_not_packed_together(tmp_path):
    path = write(tmp_path / "a.jsonl", A, A, B)
    with pytest.raises(UserError, match=f"{path}, sentence 2: tokens of the tokenizer {B}, but .*e 0 are of {A}"):
        pack(path)
    assert not (tmp_path / "a.packed").exists()
