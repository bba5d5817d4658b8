"""The trainer against the 30 recorded steps of the LVM release, through its own files."""

import json
import shutil

import numpy as np
import pytest
from tiny_run import GOLDEN, metrics, train

RECORDED = {row["step"]: row for row in map(json.loads, (GOLDEN / "metrics.jsonl").read_text().splitlines())}


@pytest.mark.parametrize(
    "first, settings",
    [
        (0, {"load_checkpoint": f"trainstate::{GOLDEN}/init/streaming_train_state"}),
        (
            15,
            {
                "load_checkpoint": f"trainstate::{GOLDEN}/step15/streaming_train_state",
                "load_dataset_state": f"{GOLDEN}/step15/dataset.pkl",
                "load_metadata": f"{GOLDEN}/step15/metadata.pkl",
            },
        ),
    ],
)
def test_follows_the_release(tmp_path, first, settings):
    follow(tmp_path, first, settings)


@pytest.mark.slow
def test_continues_a_run_of_the_release_in_its_directory(tmp_path):
    shutil.copytree(GOLDEN / "step15", tmp_path / "run")
    follow(tmp_path, 15, {"save_model_freq": 15})
    for path in (GOLDEN / "step15").iterdir():
        assert (tmp_path / "run" / "checkpoints" / "kept_00000015" / path.name).read_bytes() == path.read_bytes()


def follow(tmp_path, first, settings):
    """Trains up to step 30 and compares each step."""
    logged = metrics(train(tmp_path, **settings), "loss", "gradient_norm", "param_norm", "accuracy", "learning_rate")
    assert sorted(logged) == list(range(first, 30))
    for step, (loss, gradient_norm, param_norm, accuracy, learning_rate) in logged.items():
        expected = RECORDED[step]
        np.testing.assert_allclose(loss, expected["loss"], atol=5e-5, rtol=0)
        np.testing.assert_allclose(gradient_norm, expected["gradient_norm"], atol=5e-5, rtol=0)
        np.testing.assert_allclose(param_norm, expected["param_norm"], atol=5e-5, rtol=0)
        np.testing.assert_allclose(accuracy, expected["accuracy"], atol=1 / 512 + 1e-6, rtol=0)
        if step > first:  # the release logs the rate of the next step; here it is the rate that the update used
            np.testing.assert_allclose(learning_rate, RECORDED[step - 1]["learning_rate"], rtol=1e-5)
