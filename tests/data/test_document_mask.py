"""Rows with a document mask: the sentence of each token, and no target in another sentence."""

import json

import numpy as np
import pytest
from data_kit import base64_line, dataset

from EasyLM import flags
from EasyLM.data import make_dataset, packed_file, records
from EasyLM.data.dataset import DATASET_FLAGS, no_batch
from EasyLM.errors import UserError
from EasyLM.training import batches

LENGTHS = (3, 0, 5, 2, 1, 0)


@pytest.fixture
def files(tmp_path):
    """(JSONL, packed): sentences of LENGTHS tokens. The ids of sentence i are 10 i, 10 i + 1, ..."""
    jsonl, packed = tmp_path / "short.jsonl", tmp_path / "short.packed"
    jsonl.write_text("\n".join(base64_line(10 * i + np.arange(n)) for i, n in enumerate(LENGTHS)))
    packed_file.write(str(packed), [(str(jsonl), records.read_records(str(jsonl), 512))], keep_others=False)
    return jsonl, packed


def equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


@pytest.mark.parametrize("number", [0, 1], ids=["jsonl", "packed"])
def test_segments_are_the_sentences(files, number):
    rows = dataset(files[number], 6, document_mask=True).rows(0, 3)
    np.testing.assert_array_equal(
        rows["input_tokens"], [[0, 1, 2, 20, 21, 22], [23, 24, 30, 31, 40, 0], [1, 2, 20, 21, 22, 23]]
    )
    np.testing.assert_array_equal(rows["segment_ids"], [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 3], [0, 0, 1, 1, 1, 1]])
    np.testing.assert_array_equal(rows["loss_masks"], [[1, 1, 0, 1, 1, 1], [1, 0, 1, 0, 0, 1], [1, 0, 1, 1, 1, 1]])
    assert [array.dtype for array in rows.values()] == [np.int32, np.int32, np.float32, np.int32]


def test_literals_belong_to_their_sentence(files):
    for path in files:
        rows = dataset(path, 8, fields="[<|300|>],{tokens},<|301|>", document_mask=True).rows(0, 1)
        np.testing.assert_array_equal(rows["input_tokens"], [[300, 0, 1, 2, 301, 300, 301, 300]])
        np.testing.assert_array_equal(rows["segment_ids"], [[0, 0, 0, 0, 0, 1, 1, 2]])
        np.testing.assert_array_equal(rows["loss_masks"], [[1, 1, 1, 1, 0, 1, 0, 1]])


@pytest.mark.parametrize("settings", [{}, {"shuffle_seed": 3}, {"weights": "2,1"}], ids=str)
def test_rows_do_not_depend_on_the_batch_or_the_file(files, two_files, settings):
    """Rows of many sentences, over two epochs, read at once and one by one, from JSONL and packed files."""
    paths = [f"{files[number]},{two_files}/a.jsonl" for number in (0, 1)]
    jsonl, packed = (dataset(path, 33, document_mask=True, **settings) for path in paths)
    together = jsonl.rows(0, 130)
    assert together["segment_ids"].max() > 5 and 0 < together["loss_masks"].mean() < 1
    equal(packed.rows(0, 130), together)
    for row in range(0, 130, 13):
        equal(packed.rows(row, 1), {name: array[row : row + 1] for name, array in together.items()})
    plain = dataset(paths[0], 33, **settings).rows(0, 130)
    for name in ("input_tokens", "target_tokens"):
        np.testing.assert_array_equal(together[name], plain[name])


def test_masked_targets_stay_masked(files):
    plain, masked = (dataset(files[0], 6, fields="[<|300|>],{tokens}", document_mask=mask) for mask in (False, True))
    for row in range(4):
        weights = plain.rows(row, 1)["loss_masks"], masked.rows(row, 1)["loss_masks"]
        assert (weights[1] <= weights[0]).all()


def test_examples_of_text(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("ab", "c", "def")))

    class Letters:
        vocab_size, bos_token_id, eos_token_id = 200, 0, 1

        def encode(self, text):
            return [ord(letter) for letter in text]

        def fingerprint(self):
            return {"letters": True}

    config = flags.defaults(DATASET_FLAGS)
    config.text_processor.fields = "text"
    config.json_dataset.update(path=str(tmp_path / "text.jsonl"), seq_length=5, batch_size=1, document_mask=True)
    rows = make_dataset(config, Letters(), 200).rows(0, 2)
    np.testing.assert_array_equal(rows["segment_ids"], [[0, 0, 1, 2, 2], [0, 1, 1, 2, 3]])
    np.testing.assert_array_equal(rows["loss_masks"], [[1, 0, 0, 1, 1], [0, 1, 0, 0, 1]])


def test_a_run_continues_only_with_the_same_mask(files):
    with_mask, without = (dataset(files[0], 6, document_mask=mask) for mask in (True, False))
    assert batches.rows_consumed(batches.dataset_state(with_mask, 4), dataset(files[1], 6, document_mask=True)) == 4
    for saved, current in ((with_mask, without), (without, with_mask)):
        with pytest.raises(UserError, match="document_mask changed"):
            batches.rows_consumed(batches.dataset_state(saved, 4), current)


def test_a_batch_for_compilation_has_the_same_arrays(files):
    config = flags.defaults(DATASET_FLAGS)
    config.json_dataset.update(path=str(files[0]), seq_length=6, document_mask=True)
    config.text_processor.fields = "{tokens}"
    planned, rows = no_batch(config), make_dataset(config, None, 512).rows(0, 1)
    assert {name: (x.shape[1], x.dtype) for name, x in planned.items()} == {
        name: (x.shape[1], x.dtype) for name, x in rows.items()
    }
