"""Conversion of checkpoints between streaming files and Orbax, and their types."""

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from checkpoint_kit import file_content
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from EasyLM import checkpoints, flags
from EasyLM.checkpoints import conversion, sidecar_path
from EasyLM.errors import UnavailableError, UserError
from EasyLM.models.llama import convert_checkpoint

STATE = "streaming_train_state"


def convert(source, output, **values) -> None:
    config = flags.defaults(convert_checkpoint.FLAGS)
    config.update({"load_checkpoint": str(source), "output": str(output), **values})
    flags.validate(convert_checkpoint.FLAGS, config)
    convert_checkpoint.main(config)


@pytest.fixture
def run(golden, tmp_path):
    """A checkpoint of the LVM release, with its sidecars."""
    return shutil.copytree(golden / "lvm_tiny" / "step15", tmp_path / "run")


@pytest.mark.slow
def test_there_and_back_gives_the_same_bytes(run, tmp_path, capsys):
    convert(f"trainstate::{run}/{STATE}", tmp_path / "orbax")
    assert capsys.readouterr().out == f"converted; load it as trainstate::{tmp_path}/orbax/orbax_train_state\n"
    for source in (f"orbax::{tmp_path}/orbax", f"trainstate::{tmp_path}/orbax/orbax_train_state"):
        convert(source, tmp_path / "back")
        assert capsys.readouterr().out == f"converted; load it as trainstate::{tmp_path}/back/{STATE}\n"
        assert (tmp_path / "back" / STATE).read_bytes() == (run / STATE).read_bytes()
        for name in ("metadata", "dataset"):
            paths = [sidecar_path(f"{folder}/{STATE}", name) for folder in (tmp_path / "back", run)]
            content, original = (json.dumps({**checkpoints.load_metadata(path), "save": {}}) for path in paths)
            assert json.loads(content) == json.loads(original)  # that of the release is a pickle, with tuples
        shutil.rmtree(tmp_path / "back")


@pytest.mark.slow
def test_parameters_are_cast_and_the_optimizer_s_state_is_not(run, tmp_path):
    expected = file_content(run / STATE)
    convert(f"trainstate::{run}/{STATE}", tmp_path / "cast", dtype="bf16", format="streaming")
    convert(f"trainstate::{run}/{STATE}", tmp_path / "orbax", dtype="bf16")
    convert(f"orbax::{tmp_path}/orbax", tmp_path / "back")
    for name in ("cast", "back"):
        content = file_content(tmp_path / name / STATE)
        assert list(content) == list(expected)
        for key, array in expected.items():
            wanted = array.astype(ml_dtypes.bfloat16) if key[0] == "params" else array
            assert content[key].dtype == wanted.dtype and content[key].tobytes() == wanted.tobytes()


@pytest.mark.slow
def test_parameters_alone(run, tmp_path, capsys):
    """The release's file of parameters, through Orbax, in float32."""
    convert(f"trainstate_params::{run}/{STATE}", tmp_path / "params")
    assert capsys.readouterr().out == f"converted; load it as orbax::{tmp_path}/params/orbax_params\n"
    convert(f"orbax::{tmp_path}/params", tmp_path / "back")
    content = file_content(tmp_path / "back" / "streaming_params")
    expected = {key[2:]: array for key, array in file_content(run / STATE).items() if key[0] == "params"}
    assert list(content) == list(expected)
    assert all(np.array_equal(content[key], array) for key, array in expected.items())
    table = checkpoints.sidecar_path(f"{tmp_path}/back/streaming_params", "checksums")
    assert os.path.dirname(table) == f"{tmp_path}/back"


def test_the_output_is_on_disk_before_it_has_its_name(run, tmp_path, monkeypatch):
    """The user may delete the original then."""
    flushed, fsync, rename = set(), os.fsync, os.rename

    def record(descriptor):
        flushed.add(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def rename_last(source, target):
        assert {STATE, "checksums.json", "metadata.json", "dataset.json", os.path.basename(source)} <= flushed
        flushed.clear()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "rename", rename_last)
    convert(f"trainstate::{run}/{STATE}", tmp_path / "out" / "cast", format="streaming")
    assert flushed == {"out"}


def test_an_error_of_orbax_is_one_line(run, tmp_path, monkeypatch):
    def fail(*arguments):
        raise ValueError("NOT_FOUND: Error writing\nat d/0a")

    monkeypatch.setattr(conversion, "orbax_arguments", fail)
    with pytest.raises(UserError) as caught:
        convert(f"trainstate::{run}/{STATE}", tmp_path / "new")
    reason = "Orbax: ValueError: NOT_FOUND: Error writing"
    assert str(caught.value) == f"--output={tmp_path}/new: cannot be written ({reason})"
    assert os.listdir(tmp_path) == ["run"]


def test_an_outage_of_the_store_is_one_line(run, tmp_path, monkeypatch):
    url = f"memory:/{tmp_path}/run/{STATE}"
    MemoryFileSystem().pipe_file(url, (run / STATE).read_bytes())

    def fail(*arguments):
        raise type("HttpError", (Exception,), {})("503")  # clients of stores have types of their own

    monkeypatch.setattr(MemoryFile, "read", fail)
    with pytest.raises(UnavailableError, match=rf"^{url}: not reachable \(HttpError: 503\)$"):
        convert(f"trainstate::{url}", tmp_path / "new")


def test_bad_requests_are_one_line(run, tmp_path):
    (tmp_path / "full").mkdir()
    for source, output, message in (
        (f"trainstate::{run}/{STATE}", tmp_path / "full", "--output=.*/full: exists; name a new directory"),
        (f"trainstate::{run}/{STATE}", "gs://b/x", "--output=gs://b/x: must be a local path"),
        (f"trainstate::{run}", tmp_path / "new", r"run is not a file, as trainstate:: needs"),
        (f"huggingface::{run}", tmp_path / "new", "choose one of 'trainstate', "),
    ):
        with pytest.raises(UserError, match=message):
            convert(source, output)
    assert sorted(os.listdir(tmp_path)) == ["full", "run"]
