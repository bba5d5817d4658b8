"""Export to and import from Hugging Face: the same numbers, the same answers, and one clear line for a bad request."""

import dataclasses
import errno
import json
import os

import deepen_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_kit import random_params
from ml_collections import ConfigDict

from EasyLM import checkpoints, flags
from EasyLM.checkpoints import streaming
from EasyLM.errors import UserError
from EasyLM.models.llama import convert_easylm_to_hf, convert_hf_to_easylm, hf_files, hf_layout, llama_model
from EasyLM.models.llama.llama_config import PRESETS

SPECIAL_IDS = {"bos_token_id": 8192, "eos_token_id": 8193, "pad_token_id": 8192}


def run(tool, **values):
    config = flags.defaults(tool.FLAGS)
    config.update(values)
    flags.validate(tool.FLAGS, config)
    tool.main(config)


def export(load_checkpoint, output_dir, **values) -> str:
    run(convert_easylm_to_hf, load_checkpoint=str(load_checkpoint), output_dir=str(output_dir), **values)
    return str(output_dir)


def import_(hf_model, output_file, **values):
    run(convert_hf_to_easylm, hf_model=str(hf_model), output_file=str(output_file), **values)


def tiny_state(golden):
    return f"trainstate_params::{golden}/lvm_tiny/final/streaming_train_state"


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def torch_model(directory):
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM.from_pretrained(directory, dtype="float32").eval()


def torch_logits(directory, tokens_BT):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return torch_model(directory)(torch.tensor(np.asarray(tokens_BT), dtype=torch.long)).logits.numpy()


# ---- The same numbers


@pytest.mark.parametrize("as_stream", [True, False])
def test_export_and_import_give_back_identical_arrays(golden, tmp_path, as_stream):
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
    for name in os.listdir(tmp_path / "hf"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name


def test_heads_are_permuted_from_interleaved_pairs_to_halves():
    D, H, K = 6, 3, 4
    kernel_DE = np.arange(D * H * K).reshape(D, H * K)
    tensor_ED = hf_layout.to_hf("model.layers.0.self_attn.q_proj.weight", kernel_DE, H)
    for head in range(H):
        for i in range(K // 2):
            for part in range(2):
                np.testing.assert_array_equal(
                    tensor_ED[head * K + part * (K // 2) + i], kernel_DE[:, head * K + 2 * i + part]
                )
    back = hf_layout.from_hf("model.layers.0.self_attn.q_proj.weight", tensor_ED, H)
    np.testing.assert_array_equal(back, kernel_DE)


@pytest.mark.slow
@pytest.mark.parametrize("max_shard_bytes", [hf_files.MAX_SHARD_BYTES, 100_000])
def test_logits_of_lvm_tiny_equal_the_golden_ones(golden, tmp_path, monkeypatch, max_shard_bytes):
    monkeypatch.setattr(hf_files, "MAX_SHARD_BYTES", max_shard_bytes)
    reference = np.load(golden / "lvm_tiny" / "golden.npz")
    logits_BTV = torch_logits(export(tiny_state(golden), tmp_path / "hf"), reference["input_tokens"])
    np.testing.assert_allclose(logits_BTV, reference["logits"], atol=2e-5, rtol=0)


@pytest.mark.slow
def test_a_tied_head_stays_tied(tmp_path):
    model = dataclasses.replace(
        PRESETS["vqlm_debug"], vocab_size=300, hidden_size=32, intermediate_size=48, tie_word_embeddings=True
    )
    params = random_params(tmp_path / "run", model)
    directory = export(f"params::{tmp_path}/run/streaming_params", tmp_path / "hf")
    tokens_BT = np.random.default_rng(0).integers(0, 300, (2, 9))
    expected = llama_model.apply(model, params, jnp.asarray(tokens_BT))
    assert expected.std() > 0.8
    np.testing.assert_allclose(torch_logits(directory, tokens_BT), expected, atol=2e-5, rtol=0)
    torch_model(directory).save_pretrained(tmp_path / "theirs")
    import_(tmp_path / "theirs", tmp_path / "back" / "params")
    assert_equal(checkpoints.load(f"params::{tmp_path}/back/params", params), params)


@pytest.mark.parametrize("float_dtype", ["", "bf16", "fp16", "fp32"])
def test_export_keeps_the_checkpoints_type_unless_told(golden, tmp_path, float_dtype):
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
    "kind", ["safetensors", "shards", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("bin", "bf16 bin"))]
)
def test_every_kind_of_weight_file_is_read(golden, tmp_path, monkeypatch, kind):
    params = checkpoints.load(tiny_state(golden))
    if kind == "shards":
        monkeypatch.setattr(hf_files, "MAX_SHARD_BYTES", 100_000)
    directory = export(tiny_state(golden), tmp_path / "hf", float_dtype="bf16" if kind == "bf16 bin" else "")
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
        torch.save(state, os.path.join(directory, "pytorch_model.bin"))
        os.remove(os.path.join(directory, "model.safetensors"))
    if kind == "bf16 bin":
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    import_(directory, tmp_path / "back" / "params")
    assert_equal(checkpoints.load(f"params::{tmp_path}/back/params"), params)


# ---- The same answers


def test_special_ids_are_never_image_codes(golden, tmp_path):
    """And sampling is from all ids: transformers samples from the 50 likeliest where nothing is said."""
    random_params(tmp_path / "run", PRESETS["vqlm_debug"])
    export(f"params::{tmp_path}/run/streaming_params", tmp_path / "hf", model_size="vqlm_debug")
    export(tiny_state(golden), tmp_path / "tiny")  # its 512 ids have no special ones
    for name in ("config.json", "generation_config.json"):
        values, tiny = (json.loads((tmp_path / model / name).read_text()) for model in ("hf", "tiny"))
        assert SPECIAL_IDS.items() <= values.items()
        assert dict.fromkeys(SPECIAL_IDS).items() <= tiny.items()
    assert values | tiny == dict.fromkeys(SPECIAL_IDS) | {"do_sample": False, "top_k": 0}


@pytest.mark.slow
def test_transformers_reads_our_settings(tmp_path):
    transformers = pytest.importorskip("transformers")
    random_params(tmp_path / "run", PRESETS["vqlm_debug"])
    directory = export(f"params::{tmp_path}/run/streaming_params", tmp_path / "hf")
    for kind in (transformers.GenerationConfig, transformers.LlamaConfig):
        config = kind.from_pretrained(directory)
        assert {name: getattr(config, name) for name in SPECIAL_IDS} == SPECIAL_IDS
    assert (config.head_dim, config.rms_norm_eps, config.max_position_embeddings) == (32, 1e-6, 4096)
    assert config.rope_parameters["rope_theta"] == 10000 and str(config.dtype).endswith("float32")


@pytest.mark.slow
def test_greedy_decoding_agrees_over_256_tokens(golden, tmp_path):
    torch = pytest.importorskip("torch")
    model = hf_layout.read_model(export(tiny_state(golden), tmp_path / "hf"))[0]
    params = checkpoints.load(tiny_state(golden))
    prompt = np.load(golden / "lvm_tiny" / "golden.npz")["input_tokens"][:1, :100]
    theirs = torch_model(str(tmp_path / "hf")).generate(torch.tensor(prompt).long(), max_new_tokens=256)[0].numpy()

    @jax.jit
    def next_token(tokens_BT, length):
        return llama_model.apply(model, params, tokens_BT)[0, length - 1].argmax()

    tokens_BT = np.zeros((1, 356), np.int32)
    tokens_BT[:, :100] = prompt
    for length in range(100, 356):
        tokens_BT[0, length] = next_token(tokens_BT, length)
    np.testing.assert_array_equal(theirs, tokens_BT[0])


@pytest.mark.slow
def test_a_deepened_model_answers_as_before(tmp_path):
    """Until it is trained; and every new layer can be: gradients reach its outputs."""
    params = random_params(tmp_path / "run", PRESETS["vqlm_debug"])
    directory = export(f"params::{tmp_path}/run/streaming_params", tmp_path / "hf")
    deepen_model.main(ConfigDict({"hf_model": directory, "output_dir": str(tmp_path / "deep")}))
    model, entries = hf_layout.read_model(str(tmp_path / "deep"))
    assert model.num_hidden_layers == 4 and len(entries) > 0
    deep = checkpoints.load(
        f"huggingface::{tmp_path}/deep", hf_layout.parameter_shapes(model), hf_layout.CHECKPOINT_FORMATS
    )
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 8192, (2, 9)))
    before = llama_model.apply(PRESETS["vqlm_debug"], params, tokens_BT)
    np.testing.assert_allclose(llama_model.apply(model, deep, tokens_BT), before, atol=1e-5, rtol=0)
    gradient = jax.grad(lambda params: llama_model.apply(model, params, tokens_BT).std())(deep)
    for wo_IO in gradient["params"]["transformer"]["h"]["attention"]["wo"]["kernel"]:
        assert np.abs(wo_IO).max() > 1e-6


@pytest.mark.slow
def test_logits_of_vqlm_100m(tmp_path):
    model = PRESETS["vqlm_100m"]
    params = random_params(tmp_path / "run", model)
    directory = export(f"params::{tmp_path}/run/streaming_params", tmp_path / "hf", model_size="vqlm_100m")
    tokens_BT = np.random.default_rng(0).integers(0, 8292, (1, 256))
    ours = jax.jit(lambda params, tokens: llama_model.apply(model, params, tokens))(params, jnp.asarray(tokens_BT))
    assert ours.std() > 0.8
    np.testing.assert_allclose(torch_logits(directory, tokens_BT), ours, atol=1e-4, rtol=0)


# ---- Bad requests


def test_bad_exports_are_refused_and_leave_nothing(golden, tmp_path, monkeypatch):
    out, state = tmp_path / "out", golden / "lvm_tiny" / "final" / "streaming_train_state"
    bf16 = f"params::{golden}/lvm_tiny/streaming_params_bf16"
    for values, said in (
        ({"load_checkpoint": ""}, "--load_checkpoint is missing"),
        ({"output_dir": ""}, "--output_dir is missing"),
        ({"load_checkpoint": "params::missing", "model_size": "vqlm_7b"}, "there is no missing"),
        ({"load_checkpoint": bf16}, "--model_size is empty, and there is no metadata.json beside .*vqlm_7b"),
        ({"load_checkpoint": bf16, "model_size": "7b"}, "--model_size='7b': choose one of 'vqlm_debug'"),
        (
            {"load_checkpoint": bf16, "model_size": "vqlm_debug"},
            r"lm_head/kernel has shape \(64, 512\), expected \(128, 8292\)",
        ),
        ({"load_checkpoint": f"trainstate::{state}"}, "only parameters are exported: use trainstate_params::"),
    ):
        with pytest.raises(UserError, match=said):
            run(convert_easylm_to_hf, **{"load_checkpoint": tiny_state(golden), "output_dir": str(out)} | values)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_as_if_the_disk_were_full)
        with pytest.raises(UserError, match=rf"--output_dir={out}: cannot be written \(No space left on device\)"):
            export(tiny_state(golden), out)
    assert os.listdir(tmp_path) == []
    export(tiny_state(golden), out)
    with pytest.raises(UserError, match=rf"--output_dir={out}: already holds a model \(config.json\)"):
        export(tiny_state(golden), out)


def fail_as_if_the_disk_were_full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_export_into_the_run_directory_itself(golden, tmp_path):
    os.link(golden / "lvm_tiny" / "final" / "streaming_train_state", tmp_path / "streaming_train_state")
    os.link(golden / "lvm_tiny" / "final" / "metadata.pkl", tmp_path / "metadata.pkl")
    export(f"trainstate_params::{tmp_path}/streaming_train_state", tmp_path)
    expected = {"config.json", "generation_config.json", "model.safetensors", "streaming_train_state", "metadata.pkl"}
    assert set(os.listdir(tmp_path)) == expected


def test_bad_imports_are_refused_and_leave_nothing(golden, tmp_path, monkeypatch):
    directory = export(tiny_state(golden), tmp_path / "hf")
    weights, config = tmp_path / "hf" / "model.safetensors", tmp_path / "hf" / "config.json"
    good_weights, good_config = weights.read_bytes(), json.loads(config.read_text())
    with pytest.raises(UserError, match="no Hugging Face model"):
        import_(tmp_path, tmp_path / "out" / "params")
    for change, said in (
        ({"model_type": "mistral"}, "only plain LLaMA is supported, not 'mistral'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2: must be 4"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': only 'silu'"),
        ({"num_hidden_layers": 3}, r"missing \['model.layers.2.input_layernorm.weight'"),
        ({"num_hidden_layers": 1}, r"unknown \['model.layers.1.input_layernorm.weight'"),
        ({"intermediate_size": 64}, r"feed_forward/w1/kernel has shape \(64, 128\), expected \(64, 64\)"),
    ):
        config.write_text(json.dumps(good_config | change))
        with pytest.raises(UserError, match=said):
            import_(directory, tmp_path / "out" / "params")
    config.write_text(json.dumps(good_config))
    for data in (b"", b"x" * 100, good_weights[:500], good_weights[:-1]):
        weights.write_bytes(data)
        with pytest.raises(UserError, match=f"{weights}: not a complete safetensors file"):
            import_(directory, tmp_path / "out" / "params")
    weights.write_bytes(good_weights)
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "write_entry", fail_as_if_the_disk_were_full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
            import_(directory, tmp_path / "out" / "params")
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []
    import_(directory, tmp_path / "out" / "params")
    for name in ("params", "others"):  # `others` would take the metadata of `params`
        with pytest.raises(UserError, match=r"exists; name a file in a directory of its own"):
            import_(directory, tmp_path / "out" / name)


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.slow
def test_a_pickle_that_runs_code_is_not_imported(golden, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    directory = export(tiny_state(golden), tmp_path / "hf")
    os.remove(os.path.join(directory, "model.safetensors"))
    with pytest.raises(UserError, match="no weights: neither"):
        import_(directory, tmp_path / "out" / "params")
    torch.save({"a": Evil()}, os.path.join(directory, "pytorch_model.bin"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not a readable torch weights file"):
        import_(directory, tmp_path / "out" / "params")
    assert not os.path.exists("hacked")
