"""Grouped queries, Llama 3's rope scaling and normalized queries and keys: their definitions, decoding, conversion."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_kit import assert_equal, random_params
from convert_kit import export, import_, torch_logits
from llama_kit import TINY, changed

from EasyLM import checkpoints
from EasyLM.errors import UserError
from EasyLM.models.generate import generate
from EasyLM.models.llama import costs, hf_layout, llama_config, llama_model
from EasyLM.models.llama.llama_decode import LLaMADecoder
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.models.llama.rope_scaling import RopeScaling
from EasyLM.parallel import make_mesh, shardings

SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
GROUPED = changed(num_key_value_heads=2)
LLAMA3 = changed(num_key_value_heads=2, rope_scaling=SCALING, rope_theta=100.0, tie_word_embeddings=True)
QWEN3 = changed(num_key_value_heads=1, qk_norm=True, rope_theta=1e6)
ALL = dataclasses.replace(LLAMA3, qk_norm=True)
TOKENS_BT = np.random.default_rng(0).integers(0, 512, (2, 60))


def logits_of(config, params, tokens_BT=TOKENS_BT, mesh=None):
    return np.asarray(jax.jit(lambda *x: llama_model.apply(config, *x, mesh=mesh))(params, tokens_BT))


@pytest.mark.slow
def test_grouped_queries_equal_repeated_keys_and_values(tmp_path):
    params = random_params(tmp_path, GROUPED)
    attention = params["params"]["transformer"]["h"]["attention"]
    assert attention["wk"]["kernel"].shape == (2, 64, 32)
    expected = logits_of(GROUPED, params)
    for name in ("wk", "wv"):
        by_head_LDGK = attention[name]["kernel"].reshape(2, 64, 2, 16)
        attention[name]["kernel"] = np.repeat(by_head_LDGK, 2, axis=2).reshape(2, 64, 64)
    np.testing.assert_allclose(logits_of(TINY, params), expected, atol=2e-5, rtol=0)


def test_rope_scaling_follows_its_definition():
    """Of transformers' `llama3`, by cases: short waves stay, long ones stretch, those between are interpolated."""
    periods_k = np.float64(100.0) ** (np.arange(0, 64, 2) / 64)
    expected_k, cases = [], set()
    for period in periods_k:
        wave = 2 * np.pi * period
        if wave < 32 / 4:
            expected_k.append(period)
            cases.add("short")
        elif wave > 32 / 1:
            expected_k.append(8 * period)
            cases.add("long")
        else:
            smooth = (32 / wave - 1) / (4 - 1)
            expected_k.append(1 / ((1 - smooth) / period / 8 + smooth / period))
            cases.add("between")
    assert len(cases) == 3
    np.testing.assert_allclose(1 / SCALING.scaled(jnp.float32(1 / periods_k)), expected_k, rtol=1e-5)


@pytest.mark.slow
def test_logits_depend_on_the_rope_scaling(tmp_path):
    params = random_params(tmp_path, LLAMA3)
    unscaled = dataclasses.replace(LLAMA3, rope_scaling=None)
    assert np.abs(logits_of(LLAMA3, params) - logits_of(unscaled, params)).max() > 0.01


@pytest.mark.slow
def test_qk_norm_removes_the_scale_of_queries_and_keys(tmp_path):
    params = random_params(tmp_path, QWEN3)
    expected = logits_of(QWEN3, params)
    attention = params["params"]["transformer"]["h"]["attention"]
    for name in ("wq", "wk"):
        attention[name]["kernel"] = 3 * attention[name]["kernel"]
    np.testing.assert_allclose(logits_of(QWEN3, params), expected, atol=1e-4, rtol=0)
    attention["q_norm"]["kernel"] = 3 * attention["q_norm"]["kernel"]
    assert np.abs(logits_of(QWEN3, params) - expected).max() > 0.01


@pytest.mark.slow
def test_decoding_equals_the_forward_pass_with_a_smaller_cache(tmp_path):
    params = random_params(tmp_path, ALL)
    decoder, prompts_BP, length = LLaMADecoder(ALL), TOKENS_BT[:, :30], 12
    _, prompt_cache = jax.eval_shape(lambda *x: decoder.prefill(*x, None, 512), params, prompts_BP)
    own_cache = jax.eval_shape(lambda: decoder.empty_cache(2, 3, 16))
    for layer in range(2):
        assert [x.shape for x in prompt_cache["layers"][layer]] == [(2, 2, 30, 16)] * 2
        assert [x.shape for x in own_cache[layer]] == [(2, 2, 3, 16, 16)] * 2
    new_BCN = generate(decoder, params, prompts_BP, num_new_tokens=length, num_candidates=2, temperature=0.0)
    for candidate in range(2):
        new_BN = new_BCN[:, candidate]
        logits_BTV = logits_of(ALL, params, np.concatenate([prompts_BP, new_BN], axis=1))
        np.testing.assert_array_equal(new_BN, logits_BTV[:, 29:-1].argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize("mesh_dim", ["1,1,4", "1,2,4"])
def test_heads_that_the_mesh_does_not_divide(tmp_path, mesh_dim):
    """Two heads of keys on mp=4: each device gets the keys of its own queries."""
    params = random_params(tmp_path, ALL)
    mesh = make_mesh(mesh_dim, jax.devices()[: 4 if mesh_dim == "1,1,4" else 8])
    placed = jax.device_put(params, shardings(mesh, PARTITION_RULES, params))
    tokens_BT = np.concatenate([TOKENS_BT] * 2)
    expected = logits_of(ALL, params, tokens_BT)
    np.testing.assert_allclose(logits_of(ALL, placed, tokens_BT, mesh), expected, atol=2e-5, rtol=0)
    how = {"num_new_tokens": 20, "num_candidates": 2, "temperature": 0.0}
    one = generate(LLaMADecoder(ALL), params, TOKENS_BT[:, :20], **how)
    np.testing.assert_array_equal(generate(LLaMADecoder(ALL, mesh=mesh), placed, TOKENS_BT[:, :20], **how), one)


@pytest.mark.parametrize("config", [GROUPED, LLAMA3, QWEN3, ALL], ids=["grouped", "llama3", "qwen3", "all"])
def test_costs_count_the_parameters(config):
    shapes = jax.tree.leaves(hf_layout.parameter_shapes(config))
    assert costs.num_parameters(config) == sum(x.size for x in shapes)
    in_products = sum(x.size for x in shapes if x.ndim == 3) + 64 * 512  # kernels of the layers, and the head
    assert costs.num_matmul_parameters(config) == in_products
    attention = 6 * 2 * 60 * 64  # grouping does not change the scores of the queries
    assert costs.flops_per_token(config, 60) == 6 * in_products + attention


@pytest.mark.parametrize("config", [LLAMA3, QWEN3], ids=["llama3", "qwen3"])
def test_export_and_import_preserve_settings_and_arrays(tmp_path, config):
    params = random_params(tmp_path / "run", config)
    directory = export(f"params::{tmp_path}/run/streaming_params", tmp_path / "hf")
    loaded = checkpoints.load(f"huggingface::{directory}", params, hf_layout.CHECKPOINT_FORMATS)
    assert_equal(loaded, params)
    recorded = llama_config.recorded_config("huggingface", directory)
    for name in llama_config.TRAINED_SETTINGS:
        assert getattr(recorded, name) == getattr(config, name), name
    import_(directory, tmp_path / "back" / "params")
    metadata = json.loads((tmp_path / "back" / "metadata.json").read_text())
    assert llama_config.config_from_dict(metadata, "metadata.json").rope_scaling == config.rope_scaling


@pytest.mark.slow
@pytest.mark.parametrize("config", [GROUPED, LLAMA3, QWEN3], ids=["grouped", "llama3", "qwen3"])
def test_logits_of_exported_models_equal_transformers(tmp_path, config):
    params = random_params(tmp_path / "run", config)
    directory = export(f"params::{tmp_path}/run/streaming_params", tmp_path / "hf")
    expected = logits_of(config, params)
    assert expected.std() > 0.8
    np.testing.assert_allclose(torch_logits(directory, TOKENS_BT), expected, atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_imported_models_equal_transformers(tmp_path, kind, tied):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    rope = {"rope_theta": 500.0}
    if kind == "Llama":
        rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 32}
    config = getattr(transformers, f"{kind}Config")(
        **sizes,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
        rope_parameters=rope,
        initializer_range=0.15,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "theirs")
    import_(tmp_path / "theirs", tmp_path / "ours" / "params")
    ours = llama_config.load_config(f"json::{tmp_path}/ours/metadata.json")
    params = checkpoints.load(f"params::{tmp_path}/ours/params", hf_layout.parameter_shapes(ours))
    tokens_BT = TOKENS_BT % 300
    expected = torch_logits(tmp_path / "theirs", tokens_BT)
    assert expected.std() > 0.8
    np.testing.assert_allclose(logits_of(ours, params, tokens_BT), expected, atol=2e-5, rtol=0)


PLAIN = {"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96}
PLAIN |= {"num_hidden_layers": 2, "num_attention_heads": 4}


def test_positions_and_rope_that_are_null_have_the_defaults():
    nulls = dict.fromkeys(("max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters"))
    config = llama_config.config_from_dict(PLAIN | nulls, "config.json")
    assert (config.max_sequence_length, config.rope_theta, config.rope_scaling) == (4096, 10000.0, None)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mixtral", "num_local_experts": 8},
        {"num_experts": 4},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"quantization_config": {"quant_method": "fp8"}},
        {"sliding_window": 4096},
        {"model_type": "qwen3", "head_dim": 16, "use_sliding_window": True},
        {"model_type": "qwen3", "head_dim": 16, "layer_types": ["full_attention", "sliding_attention"]},
        {"model_type": "qwen3", "head_dim": 128},
        {"head_dim": 32},
        {"partial_rotary_factor": 0.5},
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}},
        {"rope_scaling": {"type": "linear", "factor": 8.0}},
    ],
    ids=str,
)
def test_other_architectures_are_refused_by_the_name_of_the_field(change):
    with pytest.raises(UserError) as error:
        llama_config.config_from_dict(PLAIN | change, "config.json")
    rope = change.get("rope_scaling", {})
    fields = {"rope_type": rope.get("rope_type", rope.get("type"))} if rope else change
    for name, value in fields.items():
        if value not in ("qwen3", 16):  # what the change needs beside the refused field
            assert f"{name}={value!r}" in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("dict(num_key_value_heads=3)", "llama.num_key_value_heads=3: must be a divisor of num_attention_heads=4"),
        ("dict(num_key_value_heads=-1)", "llama.num_key_value_heads=-1: must be at least 0"),
        ("dict(rope_scaling={'rope_type': 'yarn'})", "llama.rope_scaling: rope_type='yarn': choose one of"),
        ("dict(rope_scaling={'rope_type': 'llama3'})", "llama.rope_scaling: lacks the key 'factor'"),
        ("dict(rope_scaling={'rope_type': 'llama3', 'factor': 0.5})", "llama.rope_scaling: factor=0.5: must be at"),
        ("dict(rope_scaling={'rope_type': 'llama3', 'factor': '8'})", "llama.rope_scaling: factor='8': must be a"),
        ("dict(rope_scaling={'rope_type': 'llama3', 'faktor': 8})", "llama.rope_scaling: unknown key faktor; choose"),
        (
            "dict(rope_scaling={'rope_type': 'llama3', 'factor': 8, 'low_freq_factor': 4})",
            "llama.rope_scaling: low_freq_factor=4: must be below high_freq_factor=4.0",
        ),
        ("dict(rope_scaling=8)", "llama.rope_scaling: must be a dict, not 8"),
    ],
)
def test_invalid_settings_are_named(text, message):
    with pytest.raises(UserError) as error:
        llama_config.updated(TINY, text)
    assert message in str(error.value)


def test_rope_scaling_is_a_flag():
    text = "{'rope_type': 'llama3', 'factor': 8.0, 'original_max_position_embeddings': 32}"
    given = dict.fromkeys(llama_config.FLAG_OF_FIELD) | {"rope_scaling": text}
    assert llama_config.build_config("vqlm_debug", given, "").rope_scaling == SCALING


def test_all_heads_is_one_setting():
    assert changed(num_key_value_heads=4) == TINY == changed(num_key_value_heads=0)
