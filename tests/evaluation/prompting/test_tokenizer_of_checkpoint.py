"""The tokenizer of a checkpoint: the one that it names, and never the shipped one by default for another checkpoint."""

import json
import logging

import pytest
from convert_kit import export, import_, tiny_state
from tiny_run import GOLDEN, train
from tokenizer_kit import tiny_vqgan

from EasyLM.errors import UserError
from EasyLM.models.llama import llama_train
from EasyLM.models.llama.checkpoint_record import recorded_tokenizer
from EasyLM.training.start import StartFiles, StartPoint
from evaluation.prompting.checkpoint import load_codec
from tokenizer.vqgan import PRETRAINED, Codec

OTHER = "0123456789abcdef"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_vqgan(tmp_path_factory.mktemp("vqgan"))


@pytest.fixture(scope="module")
def shipped() -> str:
    return Codec(PRETRAINED).digest


@pytest.fixture(params=["huggingface", "params"])
def checkpoint(request, golden, tmp_path):
    """Returns a function that writes a checkpoint which names a tokenizer, or none, and returns its spec."""
    directory = tmp_path / "hf"

    def write(tokenizer: str | None) -> str:
        export(tiny_state(golden), directory)
        config = directory / "config.json"
        names = {} if tokenizer is None else {"tokenizer": tokenizer}
        config.write_text(json.dumps(json.loads(config.read_text()) | names))
        if request.param == "huggingface":
            return str(directory)
        import_(directory, tmp_path / "file" / "params")
        return f"params::{tmp_path}/file/params"

    return write


@pytest.mark.slow
def test_the_named_tokenizer_is_taken(checkpoint, tiny):
    spec = checkpoint(Codec(tiny).digest)
    assert load_codec(spec, "", tiny).digest == Codec(tiny).digest
    with pytest.raises(
        UserError, match=rf"--vqgan={PRETRAINED}: wrong tokenizer: --checkpoint={spec} was trained with"
    ):
        load_codec(spec, "", PRETRAINED)
    with pytest.raises(UserError, match=rf"--vqgan is missing: --checkpoint={spec} was trained with the tokenizer"):
        load_codec(spec, "", "")


def test_the_shipped_tokenizer_is_the_default_of_its_own_models(checkpoint, shipped):
    assert load_codec(checkpoint(shipped), "", "").digest == shipped
    assert load_codec("evaluation/demo_model", "", "").digest == shipped


def test_a_checkpoint_without_a_name_needs_the_flag(checkpoint, tiny):
    """As those of the LVM release, and of version 0.1.0."""
    spec = checkpoint(None)
    with pytest.raises(UserError, match=rf"--vqgan is missing: --checkpoint={spec} does not name the tokenizer"):
        load_codec(spec, "", "")
    assert load_codec(spec, "", tiny).config == Codec(tiny).config


@pytest.mark.parametrize("name", [3, ["a"], "", "x" * 1000, None])
def test_other_values_of_the_key_are_not_names(checkpoint, tmp_path, name):
    checkpoint(None)
    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer": name}))
    assert recorded_tokenizer("huggingface", str(tmp_path / "hf")) is None


def start(**metadata) -> StartPoint:
    files = StartFiles("trainstate::x/streaming_train_state", metadata="x/metadata.json") if metadata else StartFiles()
    return StartPoint(files, [], None, metadata, "run")


def test_training_names_the_tokenizer_of_its_data(caplog):
    with caplog.at_level(logging.WARNING):
        assert llama_train._tokenizer_metadata(start(), {"train_dataset": OTHER}) == {"tokenizer": OTHER}
        assert llama_train._tokenizer_metadata(start(), {"train_dataset": None}) == {}
        assert llama_train._tokenizer_metadata(start(tokenizer="a"), {"train_dataset": None}) == {"tokenizer": "a"}
        assert llama_train._tokenizer_metadata(start(step=3), {"train_dataset": "a"}) == {"tokenizer": "a"}
        assert not caplog.text
        names = {"train_dataset": OTHER, "eval_dataset": None}
        assert llama_train._tokenizer_metadata(start(tokenizer="a"), names) == {"tokenizer": OTHER}
    assert f"the data has tokens of the tokenizer {OTHER}, but trainstate::x" in caplog.text
    with pytest.raises(UserError, match=r"--eval_dataset: tokens of the tokenizer b, but those of --train_dataset are"):
        llama_train._tokenizer_metadata(start(), {"train_dataset": "a", "eval_dataset": "b"})


@pytest.mark.slow
def test_the_name_goes_from_the_records_to_the_export(golden, tmp_path):
    """And is compared there; a run from parameters alone takes it from them."""
    lines = [json.loads(line) | {"tokenizer": OTHER} for line in (GOLDEN / "dataset.jsonl").read_text().splitlines()]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"train_dataset__json_dataset__path": str(tmp_path / "data.jsonl"), "total_steps": 1, "save_model_freq": 1}
    run = train(tmp_path, **data)
    assert json.loads((run / "metadata.json").read_text())["tokenizer"] == OTHER
    directory = export(f"trainstate_params::{run}/streaming_train_state", tmp_path / "hf")
    assert recorded_tokenizer("huggingface", directory) == OTHER
    with pytest.raises(UserError, match=f"was trained with the tokenizer {OTHER}"):
        load_codec(directory, "", PRETRAINED)
    again = train(
        tmp_path,
        load_checkpoint=f"huggingface::{directory}",
        logger__experiment_id="again",
        total_steps=1,
        save_model_freq=1,
    )
    assert json.loads((again / "metadata.json").read_text())["tokenizer"] == OTHER
