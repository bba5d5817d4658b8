"""--compilation_cache_dir, and that no process starts its first step before all have compiled."""

import contextlib
import os

import jax
import pytest
from tiny_run import MODEL_METRICS, TINY, metrics, train

from EasyLM.errors import UserError
from EasyLM.training import run
from EasyLM.training.compilation import use_compilation_cache


@contextlib.contextmanager
def counted_events():
    """Yields the names of JAX's events in this block."""
    names = []
    jax.monitoring.register_event_listener(lambda name, **_: names.append(name))
    yield names


@pytest.mark.slow
def test_the_second_run_reads_what_the_first_one_compiled(tmp_path, without_the_cache):
    settings = {"total_steps": 3, "compilation_cache_dir": str(tmp_path / "cache")}
    first = metrics(train(tmp_path / "first", **settings), *MODEL_METRICS)
    assert [name for name in os.listdir(tmp_path / "cache") if name.startswith("jit_train_step-")]
    with counted_events() as names:
        second = metrics(train(tmp_path / "second", **settings), *MODEL_METRICS)
    assert "/jax/compilation_cache/cache_hits" in names and "/jax/compilation_cache/cache_misses" not in names
    assert first == second


@pytest.mark.slow
def test_all_processes_wait_for_each_other_between_compilation_and_first_step(tmp_path, monkeypatch):
    """A process that reads its step from the cache would otherwise wait in a collective, which times out."""
    calls = []

    def noted(name, function):
        monkeypatch.setattr(run, name, lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs))

    noted("compile_step", lambda *_: None)
    noted("compile_evaluation", lambda *_: None)
    noted("on_first_process_first", lambda function: function())
    noted("fit", lambda state, *_, **__: (state, True))
    held_out = {name.replace("train_", "eval_"): value for name, value in TINY.items() if name.startswith("train_")}
    train(tmp_path, eval_steps=1, **held_out)
    assert calls[calls.index("compile_step") :][:4] == [
        "compile_step",
        "compile_evaluation",
        "on_first_process_first",
        "fit",
    ]


def test_a_cache_that_cannot_be_written_is_refused(tmp_path, monkeypatch, without_the_cache):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^cannot be written \(Not a directory\)$"):
        use_compilation_cache(str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match=r"^cannot be written \(permission denied\)$"):
        use_compilation_cache(str(tmp_path / "cache"))
    with pytest.raises(UserError, match="unknown protocol no://"):
        use_compilation_cache("no://cache")
    assert jax.config.jax_compilation_cache_dir is None


def test_no_cache_by_default(without_the_cache):
    use_compilation_cache("")
    assert jax.config.jax_compilation_cache_dir is None
