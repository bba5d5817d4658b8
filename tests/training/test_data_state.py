"""The data state: the row at which a run continues exactly, and the states that are refused."""

import json
import os
import shutil

import pytest
from data_kit import assert_rows, copy_golden, dataset

from EasyLM.errors import UserError
from EasyLM.storage import digests
from EasyLM.training import batches


@pytest.fixture
def sentences(golden, tmp_path):
    """A copy of the golden dataset."""
    return copy_golden(golden, tmp_path)


@pytest.mark.parametrize("shuffle_seed", [-1, 5])
def test_resume_at_any_row(sentences, shuffle_seed):
    whole = dataset(sentences, 1000, shuffle_seed=shuffle_seed)
    expected = whole.rows(0, 80)  # three epochs
    for row in range(0, 79, 6):
        state = json.loads(json.dumps(batches.dataset_state(whole, row)))
        again = dataset(sentences, 1000, shuffle_seed=shuffle_seed)
        start = batches.rows_consumed(state, again)
        assert start == row
        assert_rows(again.rows(start, 80 - row), *(array[row:] for array in expected.values()))


def test_files_may_be_moved(sentences):
    state = batches.dataset_state(dataset(sentences), 5)
    moved = sentences.parent / "elsewhere.jsonl"
    shutil.move(sentences, moved)
    assert batches.rows_consumed(state, dataset(moved)) == 5


def test_resume_with_another_seq_length(sentences):
    state = batches.dataset_state(dataset(sentences, 128), 6)
    assert batches.rows_consumed(state, dataset(sentences, 256)) == 3
    with pytest.raises(UserError, match=r"after token 768, in rows of 128; no row of seq_length=100"):
        batches.rows_consumed(state, dataset(sentences, 100))
    shuffled = batches.dataset_state(dataset(sentences, 128, shuffle_seed=1), 6)
    with pytest.raises(UserError, match="no row of seq_length=256, shuffle_seed=1"):
        batches.rows_consumed(shuffled, dataset(sentences, 256, shuffle_seed=1))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shuffle_seed": 2}, "shuffle_seed changed"),
        ({"fields": "<|3|>,{tokens}"}, "processing changed"),
        ({"start_seek_loc": 5300}, "first_token changed"),
    ],
)
def test_another_stream_is_refused(sentences, changes, message):
    state = batches.dataset_state(dataset(sentences), 6)
    if "start_seek_loc" in changes:
        changes = {"start_seek_loc": sentences.read_bytes().index(b"\n") + 1}
    with pytest.raises(UserError, match=message):
        batches.rows_consumed(state, dataset(sentences, **changes))


def test_other_data_is_refused(sentences):
    state = batches.dataset_state(dataset(sentences), 6)
    first, second, *others = sentences.read_text().splitlines(keepends=True)
    sentences.write_text("".join([second, first, *others]))
    os.utime(sentences, ns=(1, 1))  # the clock of files may not have ticked since they were copied
    with pytest.raises(UserError, match="files changed"):
        batches.rows_consumed(state, dataset(sentences))


@pytest.mark.parametrize("large", [False, True])
def test_lines_reordered_in_the_middle_are_noticed(sentences, large, monkeypatch):
    """The size and both ends of the file stay the same. A large file is sampled."""
    lines = sentences.read_text().splitlines(keepends=True) * 2
    sentences.write_text("".join(lines))
    if large:
        monkeypatch.setattr(digests, "SAMPLES", 8)
        monkeypatch.setattr(digests, "SAMPLE_BYTES", 4096)
    state = batches.dataset_state(dataset(sentences), 6)
    assert sum(map(len, lines[:40])) > digests.END_BYTES < sum(map(len, lines[-40:]))
    sentences.write_text("".join([*lines[:40], *lines[40:-40][::-1], *lines[-40:]]))
    os.utime(sentences, ns=(1, 1))
    with pytest.raises(UserError, match="files changed"):
        batches.rows_consumed(state, dataset(sentences))


def test_states_of_version_0_1_0_continue(sentences):
    """Their digests cover only the ends of the files."""
    state = batches.dataset_state(dataset(sentences), 6)
    (file,) = state["source"]["files"]
    file["content"] = file["content"][:16]
    assert batches.rows_consumed(state, dataset(sentences)) == 6
    file["content"] = "0" * 16
    with pytest.raises(UserError, match="files changed"):
        batches.rows_consumed(state, dataset(sentences))


def test_release_states(sentences):
    source = dataset(sentences)
    state = {"config": {"seq_length": 128, "tokens_count_at_start": 0}, "index": 7, "total_tokens": 7680}
    assert batches.rows_consumed(state, source) == 60
    state["config"]["tokens_count_at_start"] = 128
    assert batches.rows_consumed(state, source) == 59
    assert batches.rows_consumed({"total_tokens": 256}, source) == 2
    with pytest.raises(UserError, match=r"after token 100, .* no row of seq_length=128"):
        batches.rows_consumed({"total_tokens": 100}, source)
    with pytest.raises(UserError, match="shuffle_seed=4"):
        batches.rows_consumed(state, dataset(sentences, shuffle_seed=4))
