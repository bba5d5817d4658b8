"""The same run on any mesh and on several processes gives the same losses; each process reads only its own rows."""

import pathlib
import socket

import jax
import pytest
from tiny_run import MODEL_FIGURES, assert_close, finish, metrics, start, train

from EasyLM import sharding

BATCH_OF_8 = {"train_dataset__json_dataset__batch_size": 8, "total_steps": 10}


def run_on(tmp_path, monkeypatch, mesh_dim, **settings):
    if mesh_dim == "1,1,1":
        make_mesh = sharding.make_mesh
        monkeypatch.setattr(sharding, "make_mesh", lambda text: make_mesh(text, jax.devices()[:1]))
    return metrics(train(tmp_path / mesh_dim, mesh_dim=mesh_dim, **BATCH_OF_8, **settings), *MODEL_FIGURES)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("mesh_dim", ["8,1,1", "1,8,1", "2,2,2", "1,2,4"])
def test_every_mesh_gives_the_same_losses(tmp_path, monkeypatch, mesh_dim, accumulate):
    settings = {"optimizer__accumulate_gradient_steps": accumulate}
    figures = run_on(tmp_path, monkeypatch, mesh_dim, **settings)
    assert_close(figures, run_on(tmp_path, monkeypatch, "1,1,1", **settings), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mesh_dim", ["2,2,1", "1,4,1", "1,2,2"])
def test_two_processes_give_the_same_losses_and_read_only_their_rows(tmp_path, mesh_dim):
    settings = {**BATCH_OF_8, "mesh_dim": mesh_dim, "save_model_freq": 5, "log_all_worker": True}
    alone = finish(start(tmp_path / "one", devices=4, **settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    distributed = {
        "jax_distributed.initialize_jax_distributed": True,
        "jax_distributed.coordinator_address": address,
        "jax_distributed.num_processes": 2,
    }
    processes = [
        start(tmp_path / "two", devices=2, **settings, **distributed, **{"jax_distributed.process_id": index})
        for index in range(2)
    ]
    for process in processes:
        finish(process)
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    assert_close(metrics(two, *MODEL_FIGURES), metrics(one, *MODEL_FIGURES), 1e-4)
    assert (two / "streaming_train_state").stat().st_size == (one / "streaming_train_state").stat().st_size, alone
    # A row of 128 tokens lies in at most 2 lines of at most 1500 tokens; half the rows are half the bytes.
    whole = last_figure(one / "metrics.jsonl", "dataset_bytes_read")
    for name in ("metrics.jsonl", "metrics_1.jsonl"):
        assert last_figure(two / name, "dataset_bytes_read") < 0.7 * whole


def last_figure(path: pathlib.Path, name: str) -> float:
    import json

    return json.loads(path.read_text().splitlines()[-1])[name]
