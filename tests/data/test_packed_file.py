"""A packed file instead of its JSONL files: the same rows, and a run resumes from either."""

import pathlib

import pytest
from data_kit import assert_rows, base64_line, dataset

from EasyLM.data import packed_file, records
from EasyLM.errors import UserError
from EasyLM.training import batches


@pytest.fixture
def packed_files(two_files, tmp_path):
    """(JSONL paths, packed path): one packed file of both JSONL files, with the other keys of the records."""
    paths = [str(two_files / name) for name in ("b.jsonl", "a.jsonl")]
    sources = [(path, records.read_records(path, 512)) for path in paths]
    totals = packed_file.write(str(tmp_path / "both.packed"), sources, keep_others=True)
    assert totals["sentences"] == 600
    return ",".join(paths), str(tmp_path / "both.packed")


@pytest.mark.parametrize("seed", [-1, 4])
@pytest.mark.parametrize("fields", [",{tokens},", "[{tokens}]", "<|300|>,[{tokens}],[<|301|>],<|302|>"])
def test_rows_equal_those_of_jsonl(packed_files, fields, seed):
    plain, packed = (dataset(path, 33, fields=fields, shuffle_seed=seed) for path in packed_files)
    assert (packed.num_tokens, packed.fingerprint) == (plain.num_tokens, plain.fingerprint)
    for start in range(0, 2 * plain.rows_per_epoch, 7):
        assert_rows(packed.rows(start, 7), *plain.rows(start, 7).values())
        if seed < 0:
            examples = [source.metrics(start)["dataset_example_index"] for source in (plain, packed)]
            assert examples[0] == examples[1]
    assert batches.rows_consumed(batches.dataset_state(plain, 5), packed) == 5


@pytest.mark.parametrize("weights", ["", "2,1"])
def test_packed_and_jsonl_files_combine(packed_files, two_files, tmp_path, weights):
    jsonl, alone = two_files / "a.jsonl", tmp_path / "a.packed"
    packed_file.write(str(alone), [(str(jsonl), records.read_records(str(jsonl), 512))], keep_others=False)
    first, second = (dataset(f"{path},{packed_files[1]}", 20, weights=weights) for path in (jsonl, alone))
    assert first.fingerprint == second.fingerprint
    assert_rows(second.rows(3, 90), *first.rows(3, 90).values())


def test_bytes_read_are_those_of_the_rows(packed_files):
    source = dataset(packed_files[1], 33)
    source.rows(5, 2)
    assert source.bytes_read == 2 * 67


def test_invalid_packed_files(packed_files, tmp_path):
    data = pathlib.Path(packed_files[1]).read_bytes()
    bad = tmp_path / "bad.packed"
    renamed = [data.replace(name, b"x" * len(name), 1) for name in (b"largest_id", b"columns", b"ends", b"<u2")]
    for contents in (b"", b"{}", b"[]", base64_line([1]).encode(), data[:4096], data[:-100], data[100:], *renamed):
        bad.write_bytes(contents)
        with pytest.raises(UserError, match=r"bad.packed: is truncated, or not of the format"):
            dataset(bad)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"fields": "{other}"}, r"both.packed: a packed file has one field, \{tokens\}"),
        ({"fields": "{tokens},{other}"}, "a packed file has one field"),
        ({"vocab_size": 300}, r"both.packed: id 511 is outside the vocabulary 0\.\.299"),
        ({"start_seek_loc": 5}, "start_seek_loc=5: .*both.packed is packed"),
    ],
)
def test_wrong_settings(packed_files, settings, message):
    with pytest.raises(UserError, match=message):
        dataset(packed_files[1], **settings)
