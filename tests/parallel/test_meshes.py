"""Losses do not depend on the mesh or the number of processes, and each process reads only its own rows."""

import functools
import json
import pathlib

import jax
import pytest
from tiny_run import MODEL_METRICS, assert_close, finish, metrics, start, start_two, train

from EasyLM.parallel import make_mesh

BATCH_OF_8 = {"train_dataset__json_dataset__batch_size": 8, "total_steps": 10}


def run_on(directory, mesh_dim, accumulate):
    settings = {**BATCH_OF_8, "mesh_dim": mesh_dim, "optimizer__accumulate_gradient_steps": accumulate}
    return metrics(train(directory, **settings), *MODEL_METRICS)


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    """The metrics of a run on one device, by the steps of an update."""
    one_device = make_mesh("1,1,1", jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("EasyLM.models.llama.llama_train.make_mesh", lambda text: one_device)
        return {steps: run_on(tmp_path_factory.mktemp("one_device"), "1,1,1", steps) for steps in (1, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("mesh_dim", ["8,1,1", "1,8,1", "2,2,2", "1,2,4"])
def test_every_mesh_gives_the_same_losses(tmp_path, on_one_device, mesh_dim, accumulate):
    assert_close(run_on(tmp_path, mesh_dim, accumulate), on_one_device[accumulate], 1e-4)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Returns the run of one process with 4 devices, by the steps of an update, and what it printed."""

    @functools.cache
    def run(accumulate: int) -> tuple[pathlib.Path, str]:
        folder = tmp_path_factory.mktemp("one_process")
        return folder / "run", finish(start(folder, devices=4, mesh_dim="1,4,1", **saved_by(accumulate)))

    return run


def saved_by(accumulate: int) -> dict:
    settings = {**BATCH_OF_8, "save_model_freq": 5, "log_all_worker": True}
    return settings | {"optimizer__accumulate_gradient_steps": accumulate}


@pytest.mark.slow
@pytest.mark.parametrize("mesh_dim, accumulate, rows", [
    ("2,2,1", 1, 4),
    ("1,4,1", 1, 4),
    ("2,2,1", 3, 4),
    ("1,2,2", 3, 4),
    ("dp:1,fsdp:1,mp:1,sp:4", 1, 8),  # each has a part of all rows
])  # fmt: skip
def test_two_processes_give_the_same_losses_and_read_only_their_rows(
    one_process, tmp_path, port, mesh_dim, accumulate, rows
):
    one, printed = one_process(accumulate)
    finish(*start_two(tmp_path, port, mesh_dim=mesh_dim, **saved_by(accumulate)))
    two = tmp_path / "run"
    assert_close(metrics(two, *MODEL_METRICS), metrics(one, *MODEL_METRICS), 1e-4)
    assert (two / "streaming_train_state").stat().st_size == (one / "streaming_train_state").stat().st_size, printed
    for path, read in ((one / "metrics.jsonl", 8), (two / "metrics.jsonl", rows), (two / "metrics_1.jsonl", rows)):
        least, most = bytes_of_batches(read)
        assert least <= last_metric(path, "dataset_bytes_read") <= most


def bytes_of_batches(rows: int) -> tuple[float, float]:
    """Returns bounds of the bytes of the golden data that a process reads for `rows` rows of each of 10 batches.

    Upper bound: 2 more batches are prefetched, a third is being made, and one row is read for its shapes. A group of 16
    characters of base64 holds 3 ids and is read whole. Between lines of >= 768 ids, 25 more characters are read.
    """
    ids = rows * 128 + 1
    cuts = -(-ids // 768)  # line ends within a batch
    most = ids * 16 / 3 + 2 * 16 + cuts * (25 + 4)
    return 10 * ids * 16 / 3, 13 * most + 129 * 16 / 3 + 2 * 16


def last_metric(path: pathlib.Path, name: str) -> float:
    return json.loads(path.read_text().splitlines()[-1])[name]
