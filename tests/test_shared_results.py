"""Arrays of worker processes that are left in shared memory."""

import functools
import os

import numpy as np
import pytest
from worker_functions import rows_of

from EasyLM import shared_results
from EasyLM.errors import UserError
from EasyLM.process_pool import Workers, result
from EasyLM.shared_results import SharedResults

SHAPE = (5, 3)


@pytest.fixture(scope="module")
def workers():
    with Workers(2) as workers:
        yield workers


def rows(numbers):
    return np.stack([np.full(SHAPE, number, np.uint8) for number in numbers])


def taken(pending):
    return np.stack([row.copy() for row in pending.result()])


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("count", [0, 3, 6, 100])
def test_results_are_those_of_the_calls(workers, processes, count):
    """For any number of places, taken in another order than submitted, and again after they are free."""
    with (
        Workers(1) as in_this_process,
        SharedResults(workers if processes > 1 else in_this_process, rows_of, SHAPE, count) as shared,
    ):
        for _ in range(3):
            groups = [[1], [2, 3, 4], [5, 6], [7]]
            pending = [shared.submit(group) for group in groups]
            for i in (2, 0, 3, 1):
                np.testing.assert_array_equal(taken(pending[i]), rows(groups[i]))


def test_the_pipe_carries_no_array(workers, monkeypatch):
    sent = []
    take = SharedResults._take
    monkeypatch.setattr(SharedResults, "_take", lambda *args: sent.append(args[1]) or take(*args))
    with SharedResults(workers, rows_of, SHAPE, 2) as shared:
        np.testing.assert_array_equal(taken(shared.submit([1, 2])), rows([1, 2]))
    assert sent == [None]


def test_a_failed_call_frees_its_places(workers):
    with SharedResults(workers, rows_of, SHAPE, 2) as shared:
        for _ in range(3):
            with pytest.raises(UserError, match="no row 255"):
                shared.submit([255, 1]).result()
        assert sorted(shared._free) == [0, 1]


@pytest.mark.parametrize("count", [0, 2])
def test_a_row_that_is_left_out_is_an_error(workers, count):
    """Its place holds a row of an earlier call."""
    with SharedResults(workers, rows_of, SHAPE, count) as shared:
        taken(shared.submit([1, 2]))
        with pytest.raises(AssertionError, match=r"no rows of \[1\]"):
            shared.submit([3, 254]).result()


def test_places_are_free_when_all_rows_are_taken(workers):
    with SharedResults(workers, rows_of, SHAPE, 2) as shared:
        first = shared.submit([1, 2]).result()
        assert next(first).tolist() == rows([1])[0].tolist() and not shared._free
        np.testing.assert_array_equal(taken(shared.submit([3, 4])), rows([3, 4]))  # by the pipe
        assert next(first).tolist() == rows([2])[0].tolist() and not shared._free
        assert next(first, None) is None and sorted(shared._free) == [0, 1]


def test_a_worker_that_dies_is_replaced(tmp_path):
    with (
        Workers(2) as workers,
        SharedResults(workers, functools.partial(rows_of, flag=str(tmp_path / "flag")), SHAPE, 2) as shared,
    ):
        np.testing.assert_array_equal([*result(shared.submit([1, 2]), "x")], rows([1, 2]))
    assert (tmp_path / "flag").exists()


def test_memory_that_workers_cannot_open_is_replaced_by_the_pipe(tmp_path):
    returned = shared_results._leave_rows(rows_of, [1, 2], SHAPE, str(tmp_path / "none"), 1, [0, 1])
    np.testing.assert_array_equal(returned, rows([1, 2]))


def test_a_late_call_leaves_the_memory_of_the_next_context_alone(workers, monkeypatch):
    """A build of parts can give up a part and begin the next one, while workers still read images of the first."""
    calls = []
    submit = workers.submit
    monkeypatch.setattr(workers, "submit", lambda *call: calls.append(call) or submit(*call))
    with SharedResults(workers, rows_of, SHAPE, 2) as shared:
        taken(shared.submit([1, 2]))
        first = shared._file
    with SharedResults(workers, rows_of, SHAPE, 2) as shared:
        assert shared._file == first, "the same file descriptor"
        pending = shared.submit([3, 4])
        pending._sent.result()
        for _ in range(4):  # of workers that map the first memory or the second one
            late = submit(*calls[0]).result()
            assert late is None or late.tolist() == rows([1, 2]).tolist()
        np.testing.assert_array_equal(taken(pending), rows([3, 4]))
        with pytest.raises(FileNotFoundError):
            shared_results._worker_memory(*calls[0][4:6], SHAPE)


def test_the_memory_is_given_back(workers):
    before = len(os.listdir("/proc/self/fd"))
    with SharedResults(workers, rows_of, SHAPE, 2) as shared:
        taken(shared.submit([1, 2]))
        assert len(os.listdir("/proc/self/fd")) == before + 2  # the file and its mapping
    assert len(os.listdir("/proc/self/fd")) == before
