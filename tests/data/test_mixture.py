"""Mixtures: proportions, order, epochs of each part, resume."""

import fractions
import json

import numpy as np
import pytest
from data_kit import assert_rows, base64_line, dataset

from EasyLM.errors import UserError
from EasyLM.training import batches


@pytest.fixture
def parts(tmp_path):
    """Three parts, the second a glob of two files. The ids of part i are 100 * i to 100 * i + 99."""
    for name, part, lengths in (("a", 0, [900]), ("b1", 1, [300, 41]), ("b2", 1, [7, 120]), ("c", 2, [64] * 10)):
        lines = [base64_line(part * 100 + np.arange(n) % 100) for n in lengths]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return ",".join(str(tmp_path / name) for name in ("a.jsonl", "b*.jsonl", "c.jsonl"))


@pytest.mark.parametrize("seed", [-1, 0, 7])
@pytest.mark.parametrize("weights", ["1,1,1", "2,1,0", "0.7,0.2,0.1", "0.001,0.5,0.499", "1/3,2/3,5"])
def test_proportions_hold_in_every_window(parts, weights, seed):
    source = dataset(parts, 16, weights=weights, shuffle_seed=seed)
    row_sources = source.sources_of(0, 20000)
    shares = np.array([float(fractions.Fraction(weight)) for weight in weights.split(",")])
    shares /= shares.sum()
    before = np.stack([np.cumsum(row_sources == part) for part in range(3)], axis=1)
    for length in (1, 3, 10, 100, 517, 5000):
        counts = before[length:] - before[:-length]
        # Each end of the window may add an error of one row, and more for a part of a large share.
        assert (np.abs(counts - length * shares) <= 2 * (1 + 3 * shares)).all()


@pytest.mark.parametrize("seed", [-1, 3])
def test_rows_of_each_part_are_in_its_own_order(parts, seed):
    """The rows of each part are those of the part alone, in the same order."""
    source = dataset(parts, 16, weights="3,2,1", shuffle_seed=seed)
    got, row_sources = source.rows(0, 600), source.sources_of(0, 600)
    for part, paths in enumerate(parts.split(",")):
        alone = dataset(paths, 16, shuffle_seed=-1 if seed < 0 else seed + (part << 32))
        expected = alone.rows(0, 600)
        selected = {name: array[row_sources == part] for name, array in got.items()}
        assert_rows(selected, *(array[: (row_sources == part).sum()] for array in expected.values()))
    assert (got["input_tokens"] // 100 == row_sources[:, None]).all()


def test_order_of_sources_depends_on_the_seed(parts):
    row_sources = [dataset(parts, 16, weights="3,2,1", shuffle_seed=seed).sources_of(0, 3000) for seed in (-1, 3, 3, 4)]
    assert (row_sources[1] == row_sources[2]).all()
    assert (row_sources[0] != row_sources[1]).any() and (row_sources[1] != row_sources[3]).any()
    first, second = np.reshape([order[:1032] for order in row_sources], (4, 2, 516))[:2].swapaxes(1, 0)
    np.testing.assert_array_equal(first[0], second[0])  # regular: every block of 516 rows is the same
    assert (first[1] != second[1]).any()  # random: every block has another order


def test_resume_at_any_row(parts):
    whole = dataset(parts, 16, weights="5,2,1", shuffle_seed=1)
    expected = whole.rows(0, 1200)
    for start, count in ((0, 1), (511, 3), (700, 500), (1199, 1)):
        state = json.loads(json.dumps(batches.dataset_state(whole, start)))
        again = dataset(parts, 16, weights="5,2,1", shuffle_seed=1)
        assert batches.rows_consumed(state, again) == start
        assert_rows(again.rows(start, count), *(array[start : start + count] for array in expected.values()))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weights": "5,1,1"}, "weights changed"),
        ({"shuffle_seed": 2}, "shuffle_seed, sources changed"),
        ({"seq_length": 32}, "sources changed"),
        ({"weights": ""}, "files, processing changed"),
    ],
)
def test_resume_from_another_mixture_is_refused(parts, changes, message):
    settings = {"seq_length": 16, "weights": "5,2,1", "shuffle_seed": 1}
    state = batches.dataset_state(dataset(parts, **settings), 6)
    with pytest.raises(UserError, match=message):
        batches.rows_consumed(state, dataset(parts, **(settings | changes)))


def test_masks_and_metrics(parts):
    source = dataset(parts, 16, fields="[<|300|>],{tokens}", weights="1,1,2")
    assert set(np.unique(source.rows(0, 100)["loss_masks"])) == {0, 1}
    metrics = source.metrics(400)
    assert metrics["dataset_total_tokens"] == 6400
    sizes = [901, 472, 650]
    for part, (rows, size) in enumerate(zip((100, 100, 200), sizes)):
        assert metrics[f"dataset_epoch_{part}"] == rows * 16 / size


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"weights": "1,2"}, r"--train_dataset.json_dataset.weights=1,2: 2 numbers for 3 inputs \(a glob is one"),
        ({"weights": "1,2,x"}, "weights=1,2,x: not a comma list of numbers"),
        ({"weights": "1,2,1/0"}, "weights=1,2,1/0: not a comma list of numbers"),
        ({"weights": "0,0,0"}, "none may be negative, and not all may be 0"),
        ({"weights": "1,1,0.1234567"}, "exact proportions need .* rows; give fewer digits"),
        ({"weights": "1,1,1", "start_seek_loc": 3}, "start_seek_loc=3: has no effect with .*weights"),
    ],
)
def test_wrong_settings(parts, settings, message):
    with pytest.raises(UserError, match=message):
        dataset(parts, **settings)
