"""Rows of a stream, in order and shuffled, compared with those of a plain loop."""

import base64
import json
import types

import numpy as np
import pytest
from data_kit import assert_rows, base64_line, dataset, plain_rows, plain_stream

from EasyLM.data import token_rows


@pytest.mark.parametrize("seq_length, count", [(1, 5), (7, 40), (128, 4), (1000, 9)])
def test_reference_packing(sentences, seq_length, count):
    source, stream = dataset(sentences, seq_length), plain_stream(sentences)
    assert source.num_tokens == len(stream) == 25896
    assert source.rows_per_epoch == -(-len(stream) // seq_length)
    last = source.rows_per_epoch - count // 2 - 1
    for start in (0, 3, last, 10**9):  # from `last`, rows wrap around the end of the file
        assert_rows(source.rows(start, count), *plain_rows(stream, seq_length, start, count))


def test_row_longer_than_the_data(tmp_path):
    (tmp_path / "short.jsonl").write_text(base64_line([5, 6, 7]))
    assert_rows(
        dataset(tmp_path / "short.jsonl", 8).rows(1, 2),
        [[7, 5, 6, 7, 5, 6, 7, 5], [6, 7, 5, 6, 7, 5, 6, 7]],
        [[5, 6, 7, 5, 6, 7, 5, 6], [7, 5, 6, 7, 5, 6, 7, 5]],
    )


def test_always_start_with_bos(sentences):
    source = dataset(sentences, vocab_size=8292, always_start_with_bos=True)
    inputs, targets = plain_rows(plain_stream(sentences), 128, 2, 3)
    inputs = inputs.copy()
    inputs[:, 0] = 8192
    assert_rows(source.rows(2, 3), inputs, targets)


def test_start_seek_loc_and_counters(sentences):
    lines = sentences.read_bytes().splitlines(keepends=True)
    source = dataset(
        sentences, start_seek_loc=len(lines[0] + lines[1]), example_index_at_start=50, tokens_count_at_start=7000
    )
    stream = plain_stream(sentences)
    ends = np.cumsum([len(base64.b64decode(json.loads(line)["tokens"])) // 4 for line in lines])
    begin = ends[1]
    assert_rows(source.rows(0, 300), *plain_rows(stream, 128, 0, 300, begin))
    assert source.metrics(10)["dataset_total_tokens"] == 7000 + 10 * 128
    for consumed, expected in (
        (0, 50),
        (100, 50 - 2 + np.searchsorted(ends, begin + 100 * 128, side="right")),
        (200, np.searchsorted(ends, begin + 200 * 128 - len(stream), side="right")),  # the second epoch counts from 0
    ):
        assert source.metrics(consumed)["dataset_example_index"] == expected


def test_throughput_window(sentences, monkeypatch):
    clock = iter([0.0, 10.0, 11.0, 12.0])
    monkeypatch.setattr(token_rows, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    source = dataset(sentences, throughput_average_window_size=2)  # 2 batches of 4 rows of 128 tokens
    metrics = [source.metrics(consumed) for consumed in (0, 4, 8, 12)]
    assert metrics[-1]["dataset_average_tps"] == 8 * 128 / 2
    assert metrics[-1]["dataset_accumulated_tps"] == 12 * 128 / 12


@pytest.mark.parametrize("seq_length", [25896, 5000, 100])
def test_epoch_is_a_permutation_of_all_rows(sentences, seq_length):
    source, stream = dataset(sentences, seq_length, shuffle_seed=3), plain_stream(sentences)
    epoch = source.rows_per_epoch
    inputs, targets = plain_rows(stream, seq_length, 0, epoch)
    orders = []
    for number in range(3):
        order = [source.shuffled(row) for row in range(number * epoch, (number + 1) * epoch)]
        assert sorted(order) == list(range(epoch))
        assert_rows(source.rows(number * epoch, epoch), inputs[order], targets[order])
        orders.append(order)
    assert epoch < 6 or (orders[0] != orders[1] != orders[2] and orders[0] != sorted(orders[0]))


def test_order_depends_on_the_seed(sentences):
    first, again, other = (dataset(sentences, shuffle_seed=seed).rows(0, 60) for seed in (3, 3, 4))
    assert_rows(first, *(again[name] for name in ("input_tokens", "target_tokens")))
    assert (first["input_tokens"] != other["input_tokens"]).any(axis=1).mean() > 0.9


def test_loss_masks_are_shuffled_with_their_rows(sentences):
    fields = "[<|300|>],{tokens}"
    plain = dataset(sentences, 50, fields=fields).rows(0, 520)
    source = dataset(sentences, 50, fields=fields, shuffle_seed=0)
    got, order = source.rows(0, 100), [source.shuffled(row) for row in range(100)]
    assert_rows(got, *(plain[name][order] for name in plain))
    assert got["loss_masks"].min() == 0
