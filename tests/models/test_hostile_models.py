"""Damaged or hostile files of a Hugging Face model end in one line that names the file, and allocate nothing large."""

import json
import pathlib
import re
import struct

import pytest
from convert_kit import export, import_, tiny_state
from safetensors.numpy import load_file, save_file

from EasyLM.errors import UserError
from EasyLM.models.llama import hf_files, llama_config


@pytest.fixture
def model(golden, tmp_path) -> pathlib.Path:
    return pathlib.Path(export(tiny_state(golden), tmp_path / "hf"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers=1000000000: must be above 0 and at most 10000"),
        ({"hidden_size": 2**40}, "hidden_size=1099511627776: must be"),
        ({"vocab_size": 2**31}, "vocab_size=2147483648: must be"),
        ({"num_attention_heads": 0, "num_key_value_heads": 0}, "num_attention_heads=0: must be above 0"),
        ({"hidden_size": "64"}, "hidden_size='64': must be of type int"),
        ({"num_hidden_layers": None}, "num_hidden_layers=None: must be of type int"),
        ({"model_type": []}, "model_type must be a text, not a list"),
        ({"rope_scaling": "x"}, "rope_scaling must be an object or null, not a text"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object or null, not a list"),
        ({"rms_norm_eps": {}}, "rms_norm_eps={}: must be of type float"),
        ({"": 1, "num_hidden_layers": []}, r"num_hidden_layers=\[\]: must be of type int"),
    ],
)
def test_a_damaged_config_is_refused(model, tmp_path, changes, message):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=f"^{re.escape(str(model / 'config.json'))}: .*{message}"):
        import_(model, tmp_path / "out" / "params")


def test_a_head_beside_the_embedding_that_it_shares_has_to_equal_it(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match=f"^{model}: config.json has tie_word_embeddings=true, but lm_head.weight diff"):
        import_(model, tmp_path / "out" / "params")
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, model / "model.safetensors")
    import_(model, tmp_path / "out" / "params")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "", "nul", '{"a": 1, "a": 2}'])
def test_a_config_that_is_no_object_is_refused(model, tmp_path, text):
    (model / "config.json").write_text(text)
    for load in (
        lambda: import_(model, tmp_path / "out" / "params"),
        lambda: llama_config.load_config(f"json::{model}/config.json"),
    ):
        with pytest.raises(UserError, match=re.escape(f"{model}/config.json: ")):
            load()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "lacks the key 'weight_map'"),
        ({"weight_map": ["a"]}, "weight_map must be an object"),
        ({"weight_map": {"a": 3}}, "weight_map.a must be a text"),
        ({"weight_map": {"a": "../other/model.safetensors"}}, "is not the name of a file in this directory"),
        ({"weight_map": {"a": "/etc/passwd"}}, "'/etc/passwd' is not the name of a file"),
    ],
)
def test_a_damaged_index_is_refused(model, index, message):
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"{re.escape(str(model))}/model.safetensors.index.json: .*{message}"):
        hf_files.read_weights(str(model))


@pytest.mark.parametrize(
    "header",
    [
        "[" * 50_000,
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        '{"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1e99]}}',
        '{"a": {"dtype": "F32", "shape": "22", "data_offsets": [0, 8]}}',
        '{"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        '{"a": []}',
        "3",
    ],
)
def test_a_damaged_safetensors_header_is_refused(tmp_path, header):
    data = struct.pack("<Q", len(header)) + header.encode() + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(
        UserError, match=f"{re.escape(str(tmp_path))}/model.safetensors: not a complete safetensors file"
    ):
        hf_files.read_weights(str(tmp_path))
