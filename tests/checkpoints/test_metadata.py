"""Metadata and the position in the data beside a checkpoint."""

import json
import re

import jax
import pytest

from EasyLM import checkpoints
from EasyLM.checkpoints.metadata import with_digest
from EasyLM.errors import UserError


def test_values_that_differ_from_those_saved_are_refused(tmp_path):
    path = tmp_path / "dataset.json"
    saved = with_digest({"rows_consumed": 8, "source": {"tokens": float("nan"), "files": ("a",)}})
    path.write_text(json.dumps(saved))
    assert checkpoints.load_dataset_state(str(path))["rows_consumed"] == 8
    for damaged in ({"rows_consumed": 9}, {"digest": None}):
        path.write_text(json.dumps(saved | damaged))
        with pytest.raises(UserError, match=f"^{path}: .*not those that were saved.*delete the key 'digest'"):
            checkpoints.load_dataset_state(str(path))
    path.write_text(json.dumps({"rows_consumed": 9, "source": {}, "digmst": "0a39eb5b8df67cfb"}))
    with pytest.raises(UserError, match=f"^{path}: ends with a digest under the key 'digmst' instead of 'digest'"):
        checkpoints.load_dataset_state(str(path))
    state = {"rows_consumed": 9, "source": {}}
    for whole in (state, state | {"note": "after the outage"}):  # as long as a digest
        path.write_text(json.dumps(whole))
        assert checkpoints.load_dataset_state(str(path)) == whole


@pytest.mark.parametrize(
    "state, message",
    [
        ({"rows_consumed": 32}, "lacks the key 'source', which describes the data"),
        ({"rows_consumed": 32, "source": []}, "source must be an object, not a list"),
        ({"rows_consumed": 32, "source": {"seq_length": "16"}}, "source.seq_length must be an integer, not a text"),
        ({"rows_consumed": 32, "source": {"seq_length": 0}}, "source.seq_length=0: must be at least 1"),
        (
            {"total_tokens": 8, "config": {"tokens_count_at_start": 9}},
            "config.tokens_count_at_start=9: must be 0..8, the total_tokens",
        ),
        (
            {"total_tokens": 8, "config": {"tokens_count_at_start": -1}},
            "config.tokens_count_at_start=-1: must be 0..8, the total_tokens",
        ),
        ({"total_tokens": 8, "config": {"tokens_count_at_start": None}}, "must be an integer, not null"),
    ],
)
def test_a_position_that_no_run_can_have_is_refused(tmp_path, state, message):
    """Files without a digest, such as those of earlier versions."""
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match=f"^{path}: .*{re.escape(message)}"):
        checkpoints.load_dataset_state(str(path))


def test_metadata(tmp_path, golden):
    metadata = checkpoints.make_metadata(7, {"seed": 1}, llama_config={"hidden_size": 4}, mesh={"dp": 2})
    assert metadata["step"] == 7 and metadata["llama_config"] == {"hidden_size": 4} and metadata["mesh"] == {"dp": 2}
    assert metadata["versions"]["jax"] == jax.__version__ and len(metadata["git_revision"]) >= 40
    path = tmp_path / "metadata.json"
    path.write_text(json.dumps(metadata))
    assert checkpoints.load_metadata(str(path)) == metadata
    path.write_text('{"step": ')
    with pytest.raises(UserError, match=rf"{path}: not JSON"):
        checkpoints.load_metadata(str(path))
    released = str(golden / "lvm_tiny" / "step15" / "streaming_train_state")
    assert checkpoints.load_metadata(checkpoints.sidecar_path(released, "metadata"))["step"] == 15
    assert checkpoints.load_dataset_state(checkpoints.sidecar_path(released, "dataset"))["total_tokens"] == 7680
    assert checkpoints.sidecar_path(str(golden / "lvm_tiny" / "streaming_params_bf16"), "metadata") is None
