"""Explicit model settings that differ from those that a checkpoint records are refused, with the differences."""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_kit import export
from hub_cache import cache_repository, offline_cache
from prompting_kit import CONFIG, tiny_checkpoint
from tiny_run import GOLDEN, train

from EasyLM import flags
from EasyLM.errors import UserError
from EasyLM.models.llama import convert_easylm_to_hf, llama_config, llama_train, training_task
from EasyLM.models.llama.llama_config import PRESETS
from EasyLM.parallel import make_mesh
from evaluation.prompting import load_model

OTHER = {"num_attention_heads": 8, "rope_theta": 500000.0}  # of the same shapes


@pytest.fixture
def recorded(tmp_path):
    """A checkpoint that records OTHER settings, and the flags that name it without them."""
    values = tiny_checkpoint(tmp_path)
    settings = dataclasses.asdict(CONFIG) | OTHER
    (tmp_path / "metadata.json").write_text(json.dumps({"step": 1, "llama_config": settings}))
    return values


def differences(given=CONFIG) -> str:
    return re.escape(", ".join(f"{name}={getattr(given, name)} (saved: {value})" for name, value in OTHER.items()))


def test_export_refuses_another_preset(recorded, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "vqlm_debug", CONFIG)
    with pytest.raises(UserError, match=rf"--model_size=vqlm_debug: .*/params was trained.*: {differences()}; leave"):
        export(recorded["checkpoint"], tmp_path / "hf", model_size="vqlm_debug")
    assert not (tmp_path / "hf").exists()


def test_export_takes_what_the_preset_leaves_open_from_the_record(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "vqlm_debug", dataclasses.replace(CONFIG, max_sequence_length=4096))
    monkeypatch.setattr(convert_easylm_to_hf, "PRESETS", PRESETS)
    checkpoint = tiny_checkpoint(tmp_path)["checkpoint"]
    (tmp_path / "metadata.json").write_text(json.dumps({"llama_config": dataclasses.asdict(CONFIG)}))
    export(checkpoint, tmp_path / "hf", model_size="vqlm_debug")
    exported = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert exported["max_position_embeddings"] == CONFIG.max_sequence_length != 4096


def test_evaluation_refuses_other_settings(recorded):
    mesh = make_mesh("1,1,1", jax.devices()[:1])
    with pytest.raises(UserError, match=rf"--load_llama_config=json::.*: {differences()}; leave the flag empty"):
        load_model(recorded["checkpoint"], recorded["load_llama_config"], mesh)
    assert load_model(recorded["checkpoint"], "", mesh)[0].num_attention_heads == OTHER["num_attention_heads"]


def test_evaluation_of_a_hugging_face_directory_refuses_other_settings(recorded, tmp_path):
    export(recorded["checkpoint"], tmp_path / "hf")
    mesh = make_mesh("1,1,1", jax.devices()[:1])
    for spec in (f"{tmp_path}/hf", f"huggingface::{tmp_path}/hf"):
        with pytest.raises(UserError, match=rf"--load_llama_config=json::.*/hf was trained.*: {differences()}; leave"):
            load_model(spec, recorded["load_llama_config"], mesh)


def test_settings_that_only_change_the_computation_may_differ(recorded, tmp_path):
    changed = dataclasses.asdict(CONFIG) | OTHER | {"resid_pdrop": 0.5, "scan_attention": True, "remat_block": ""}
    (tmp_path / "other.json").write_text(json.dumps(changed))
    mesh = make_mesh("1,1,1", jax.devices()[:1])
    assert load_model(recorded["checkpoint"], f"json::{tmp_path}/other.json", mesh)[0].resid_pdrop == 0.5


def test_training_takes_the_settings_of_the_checkpoint_that_it_starts_from(recorded, tmp_path, monkeypatch):
    models = []

    def open_run(settings, model_settings, formats):
        models.append(model_settings.values)
        raise UserError("far enough")

    monkeypatch.setattr(llama_train, "open_run", open_run)
    export(recorded["checkpoint"], tmp_path / "hf")
    for spec in (recorded["checkpoint"], f"huggingface::{tmp_path}/hf"):
        settings = {"load_checkpoint": spec, "load_llama_config": "", "update_llama_config": "", "mesh_dim": "1,-1,1"}
        data = {"train_dataset.json_dataset.seq_length": 16, "train_dataset.json_dataset.batch_size": 8}
        with pytest.raises(UserError, match="far enough"):
            train(tmp_path, **settings, **data, **{"llama.resid_pdrop": 0.5})
        assert models[-1]["num_attention_heads"] == OTHER["num_attention_heads"]
        assert models[-1]["hidden_size"] == CONFIG.hidden_size
        assert models[-1]["resid_pdrop"] == 0.5, "a flag overrides them"


@pytest.mark.parametrize("layout", ["file", "shards", pytest.param("bin shards", marks=pytest.mark.slow)])
def test_a_model_on_the_hub_is_loaded_by_its_name(recorded, tmp_path, monkeypatch, layout):
    folder = tmp_path / "repository" / "small"
    sharded = {} if layout == "file" else {"max_shard_mb": 0.002, "float_dtype": "bf16"}
    export(recorded["checkpoint"], folder, **sharded)
    assert layout == "file" or len([*folder.glob("model-*.safetensors")]) > 1
    if layout == "bin shards":
        as_torch_shards(folder)
    for shard in [*folder.glob("*-00001-of-*")]:  # a file that the index does not name
        (folder / shard.name.replace("00001", "00000")).write_bytes(shard.read_bytes())
    cache_repository(offline_cache(tmp_path, monkeypatch), "Owner/model", folder.parent)
    config, params = load_model("Owner/model/small", "", make_mesh("1,1,1", jax.devices()[:1]))
    assert config.num_attention_heads == OTHER["num_attention_heads"]
    expected = load_model(recorded["checkpoint"], "", make_mesh("1,1,1", jax.devices()[:1]))[1]
    if sharded:
        expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def as_torch_shards(folder: pathlib.Path) -> None:
    """Replaces the shards of a model by files of torch with an index, as the LVM release has them."""
    torch = pytest.importorskip("torch")
    import safetensors.torch

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for path in folder.glob("model-*.safetensors"):
        torch.save(safetensors.torch.load_file(path), folder / f"pytorch_{path.stem}.bin")
        path.unlink()
    files = {name: f"pytorch_{file.removesuffix('.safetensors')}.bin" for name, file in index["weight_map"].items()}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "model.safetensors.index.json").unlink()


def test_a_streaming_file_on_the_hub_has_its_settings_and_checksums_beside_it(recorded, tmp_path, monkeypatch):
    """The cache holds links to files of other names."""
    source = pathlib.Path(recorded["checkpoint"].partition("::")[2])
    table = {"algorithm": "crc32", "file": "streaming_params", "bytes": source.stat().st_size, "arrays": {}}
    metadata, checksums = (source.parent / "metadata.json").read_bytes(), json.dumps(table).encode()
    files = {"streaming_params": source.read_bytes(), "metadata.json": metadata, "checksums.json": checksums}
    repository = {f"run/{name}": data for name, data in files.items()}
    snapshot = cache_repository(offline_cache(tmp_path, monkeypatch), "Owner/model", repository)
    spec = "params::Owner/model/run/streaming_params"
    config = flags.parse(training_task.TRAIN_FLAGS, ["llama_train", f"--load_checkpoint={spec}"])
    assert training_task.read_model(config).num_attention_heads == OTHER["num_attention_heads"]
    with pytest.raises(UserError, match=r"the array \S+ is unexpected: the file is damaged \(.*run/checksums.json"):
        load_model(spec, "", make_mesh("1,1,1", jax.devices()[:1]))
    (snapshot / "run" / "checksums.json").unlink()
    assert load_model(spec, "", make_mesh("1,1,1", jax.devices()[:1]))[0].rope_theta == OTHER["rope_theta"]
    exported = pathlib.Path(export(spec, tmp_path / "hf"))
    assert json.loads((exported / "config.json").read_text())["rope_theta"] == OTHER["rope_theta"]


@pytest.mark.parametrize(
    ("setting", "value"), [("num_attention_heads", 2), ("tie_word_embeddings", True), ("num_hidden_layers", 1)]
)
def test_fine_tuning_refuses_settings_that_the_parameters_cannot_have(tmp_path, setting, value):
    spec = f"trainstate_params::{GOLDEN}/final/streaming_train_state"
    with pytest.raises(
        UserError, match=rf"--load_checkpoint={spec}: its parameters need .*: {setting}={value} \(saved"
    ):
        train(tmp_path, load_checkpoint=spec, **{f"llama.{setting}": value})


def test_the_compared_settings_are_all_that_change_the_function():
    """A new setting must be sorted into one of the groups."""
    computation = llama_config.RESUMABLE_SETTINGS
    training = {"resid_pdrop", "embd_pdrop", "attn_pdrop", "fcm_min_ratio", "fcm_max_ratio", "z_loss_weight"}
    training |= {"initializer_range"}
    sorted_ = {*llama_config.TRAINED_SETTINGS, *computation, *training, "max_sequence_length"}
    assert sorted_ == set(llama_config.FLAG_OF_FIELD)
