"""Export to and import from Hugging Face preserve every array."""

import json
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_kit import assert_equal, random_params
from convert_kit import export, import_, tiny_state

from EasyLM import checkpoints
from EasyLM.models.llama import hf_layout, llama_config
from EasyLM.models.llama.llama_config import PRESETS

SPECIAL_IDS = {"bos_token_id": 8192, "eos_token_id": 8193, "pad_token_id": 8192}


@pytest.mark.parametrize("as_stream", [True, False])
def test_export_and_import_round_trip_exactly(golden, tmp_path, as_stream):
    export(tiny_state(golden), tmp_path / "hf")
    import_(tmp_path / "hf", tmp_path / "back" / "params", streaming=as_stream)
    path = tmp_path / "back" / "params"
    params = checkpoints.load(tiny_state(golden))
    assert_equal(checkpoints.load(f"{'params' if as_stream else 'flax_params'}::{path}"), params)
    assert_equal(checkpoints.load(f"huggingface::{tmp_path}/hf", params, hf_layout.CHECKPOINT_FORMATS), params)
    if not as_stream:
        assert path.read_bytes() == (golden / "lvm_tiny" / "flax_params.msgpack").read_bytes()
    metadata = checkpoints.load_metadata(checkpoints.sidecar_path(str(path), "metadata"))
    assert metadata["llama_config"]["hidden_size"] == 64 and metadata["llama_config"]["num_hidden_layers"] == 2
    export(f"{'params' if as_stream else 'flax_params'}::{path}", tmp_path / "again")  # by the metadata beside it
    for name in set(os.listdir(tmp_path / "hf")) - {"README.md"}:  # which says where the parameters come from
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name


@pytest.mark.parametrize(
    "change", [{"num_key_value_heads": None}, {"num_key_value_heads": ...}, {"hidden_act": "swish"}]
)
def test_other_spellings_of_the_same_architecture_are_read(golden, tmp_path, change):
    directory = pathlib.Path(export(tiny_state(golden), tmp_path / "hf"))
    config = json.loads((directory / "config.json").read_text())
    assert config["num_key_value_heads"] == config["num_attention_heads"] == 4
    config = {name: value for name, value in (config | change).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))
    import_(directory, tmp_path / "params")
    assert_equal(checkpoints.load(f"params::{tmp_path}/params"), checkpoints.load(tiny_state(golden)))
    model, _ = hf_layout.read_model(str(directory))
    assert model.kv_heads == model.num_attention_heads == 4


def test_heads_are_permuted_from_interleaved_pairs_to_halves():
    D, H, K = 6, 3, 4
    kernel_DE = np.arange(D * H * K).reshape(D, H * K)
    tensor_ED = hf_layout.to_hf("model.layers.0.self_attn.q_proj.weight", kernel_DE, K)
    for head in range(H):
        for i in range(K // 2):
            for part in range(2):
                np.testing.assert_array_equal(
                    tensor_ED[head * K + part * (K // 2) + i], kernel_DE[:, head * K + 2 * i + part]
                )
    back = hf_layout.from_hf("model.layers.0.self_attn.q_proj.weight", tensor_ED, K)
    np.testing.assert_array_equal(back, kernel_DE)


@pytest.mark.parametrize("float_dtype", ["", "bf16", "fp16", "fp32"])
def test_export_keeps_the_type_of_the_checkpoint_by_default(golden, tmp_path, float_dtype):
    source = f"params::{golden}/lvm_tiny/streaming_params_bf16"
    (tmp_path / "in").mkdir()
    for name in ("streaming_params_bf16", "final/metadata.pkl"):
        os.link(golden / "lvm_tiny" / name, tmp_path / "in" / os.path.basename(name))
    source = f"params::{tmp_path}/in/streaming_params_bf16"
    export(source, tmp_path / "hf", float_dtype=float_dtype)
    wanted = checkpoints.FLOAT_DTYPES[float_dtype or "bf16"]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == wanted.name
    expected = jax.tree.map(lambda x: x.astype(wanted), checkpoints.load(source))
    assert_equal(checkpoints.load(f"huggingface::{tmp_path}/hf", None, hf_layout.CHECKPOINT_FORMATS), expected)


@pytest.mark.parametrize(
    "kind",
    [
        "safetensors",
        "shards",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("bin", "bf16 bin", "legacy bin")),
    ],
)
def test_every_weight_file_format_is_read_without_torch(golden, tmp_path, monkeypatch, kind):
    params = checkpoints.load(tiny_state(golden))
    settings = {"shards": {"max_shard_mb": 0.1}, "bf16 bin": {"float_dtype": "bf16"}}.get(kind, {})
    directory = export(tiny_state(golden), tmp_path / "hf", **settings)
    if kind == "shards":
        names = [name for name in os.listdir(directory) if name.endswith(".safetensors")]
        sizes = [os.path.getsize(os.path.join(directory, name)) for name in names]
        assert len(names) > 5 and sorted(sizes)[-3] < 105_000  # the embedding and the head are larger on their own
        assert f"model-00001-of-{len(names):05d}.safetensors" in names
    if "bin" in kind:
        torch = pytest.importorskip("torch")
        import safetensors.torch

        state = safetensors.torch.load_file(os.path.join(directory, "model.safetensors"))
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # of older versions of transformers
        zipped = kind != "legacy bin"  # torch before 1.6 wrote no zip archives
        torch.save(state, os.path.join(directory, "pytorch_model.bin"), _use_new_zipfile_serialization=zipped)
        os.remove(os.path.join(directory, "model.safetensors"))
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it raises
    if kind == "bf16 bin":
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    import_(directory, tmp_path / "back" / "params")
    assert_equal(checkpoints.load(f"params::{tmp_path}/back/params"), params)


def test_a_single_file_has_precedence_over_the_index_of_earlier_shards(golden, tmp_path):
    """As in transformers."""
    directory = pathlib.Path(export(tiny_state(golden), tmp_path / "hf"))
    stale = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(stale))
    import_(directory, tmp_path / "params")
    assert_equal(checkpoints.load(f"params::{tmp_path}/params"), checkpoints.load(tiny_state(golden)))


def test_special_ids_are_never_image_codes(golden, tmp_path):
    """And sampling is from all codes: transformers samples from the 50 likeliest where nothing is said."""
    random_params(tmp_path / "run", PRESETS["vqlm_debug"])
    export(f"params::{tmp_path}/run/streaming_params", tmp_path / "hf", model_size="vqlm_debug")
    export(tiny_state(golden), tmp_path / "tiny")  # its 512 ids have no special ones
    for name in ("config.json", "generation_config.json"):
        values, tiny = (json.loads((tmp_path / model / name).read_text()) for model in ("hf", "tiny"))
        assert SPECIAL_IDS.items() <= values.items()
        assert dict.fromkeys(SPECIAL_IDS).items() <= tiny.items()
    assert tiny == dict.fromkeys(SPECIAL_IDS) | {"do_sample": True, "top_k": 0}
    assert values == SPECIAL_IDS | {"do_sample": True, "top_k": 0, "suppress_tokens": list(range(8192, 8292))}


def test_the_size_of_the_codebook_is_exported(golden, tmp_path):
    model = llama_config.updated(PRESETS["vqlm_debug"], "{'codebook_size': 16384}")
    values = hf_layout.hf_config(model, np.dtype(np.float32))
    assert {name: values[name] for name in SPECIAL_IDS} == dict(zip(SPECIAL_IDS, (16384, 16385, 16384), strict=True))
    assert llama_config.config_from_dict(values, "config.json") == model
    assert "codebook_size" not in hf_layout.hf_config(llama_config.LLaMAConfig(), np.dtype(np.float32))


def test_export_into_the_run_directory_itself(golden, tmp_path):
    os.link(golden / "lvm_tiny" / "final" / "streaming_train_state", tmp_path / "streaming_train_state")
    os.link(golden / "lvm_tiny" / "final" / "metadata.pkl", tmp_path / "metadata.pkl")
    export(f"trainstate_params::{tmp_path}/streaming_train_state", tmp_path)
    written = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert set(os.listdir(tmp_path)) == written | {"streaming_train_state", "metadata.pkl"}
