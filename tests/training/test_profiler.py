"""--profile_steps: which steps are traced, where the trace is, and what cannot end a run."""

import logging
import pathlib

import jax
import jax.numpy as jnp
import pytest
from tiny_run import finish, start_two

from EasyLM.errors import UserError
from EasyLM.training.profiler import Profiler, profiled_steps


@jax.jit
def add(state, batch):
    return state + batch, {"loss": state.sum()}


def run(directory, steps: range, first: int, end: int) -> jax.Array:
    """Runs the steps first..end-1 and closes the profiler, as a run does."""
    profiler = Profiler(steps, str(directory), first)
    step, state = profiler.traced(add), jnp.zeros(4)
    for _ in range(first, end):
        state, _ = step(state, jnp.ones(4))
    profiler.close()
    return state


def named_steps(file: pathlib.Path) -> list[int]:
    """The numbers of the steps that a trace names, in order of time."""
    data = jax.profiler.ProfileData.from_serialized_xspace(file.read_bytes())
    events = [event for plane in data.planes for line in plane.lines for event in line.events if event.name == "train"]
    return [dict(event.stats)["step_num"] for event in sorted(events, key=lambda event: event.start_ns)]


def traces(directory) -> list[pathlib.Path]:
    return sorted(pathlib.Path(directory).glob("plugins/profile/*/*.xplane.pb"))


def test_the_trace_names_the_steps_of_the_range_alone(tmp_path):
    run(tmp_path, range(2, 4), first=0, end=6)
    (trace,) = traces(tmp_path / "profile")
    assert named_steps(trace) == [2, 3]


@pytest.mark.parametrize(
    ("first", "end", "expected"),
    [(3, 6, [3]), (1, 3, [2]), (4, 6, None)],
    ids=["resumed within the range", "ended within the range", "resumed after the range"],
)
def test_a_part_of_the_range(tmp_path, first, end, expected):
    run(tmp_path, range(2, 4), first, end)
    steps = [named_steps(trace) for trace in traces(tmp_path / "profile")]
    assert steps == ([] if expected is None else [expected])


def test_a_remote_run_directory(tmp_path):
    """JAX writes to local files; the trace is copied."""
    run(f"file://{tmp_path}/bucket", range(1), first=0, end=2)
    (trace,) = traces(tmp_path / "bucket" / "profile")
    assert named_steps(trace) == [0]


@pytest.mark.parametrize("function", ["start_trace", "stop_trace"])
def test_a_trace_that_fails_does_not_end_the_run(tmp_path, monkeypatch, caplog, function):
    def fail(*_):
        raise RuntimeError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(jax.profiler, function, fail)
        with caplog.at_level(logging.WARNING):
            state = run(tmp_path, range(1, 2), first=0, end=4)
    if function == "stop_trace":
        jax.profiler.stop_trace()  # for the other tests: a process has one trace at a time
    assert state.tolist() == [4.0] * 4
    assert [record.message.endswith("the run continues: no space left") for record in caplog.records] == [True]


@pytest.mark.parametrize("value", ["3", "3:3", "5:2", "-1:3", "a:b", "1:11", "1:2:3", ":3", "3:"])
def test_a_range_that_is_none_is_refused(value):
    with pytest.raises(UserError, match=rf"^--profile_steps={value}: must be FIRST:END .*<= --total_steps=10;"):
        profiled_steps(value, total_steps=10)


def test_a_range_may_end_with_the_run():
    assert profiled_steps("8:10", total_steps=10) == range(8, 10)
    assert not profiled_steps("", total_steps=10)


@pytest.mark.slow
def test_each_process_has_a_trace_of_its_own(tmp_path, port):
    finish(*start_two(tmp_path, port, total_steps=4, mesh_dim="1,2,2", profile_steps="1:3"))
    for folder in ("profile", "profile_1"):
        (trace,) = traces(tmp_path / "run" / folder)
        assert named_steps(trace) == [1, 2]
