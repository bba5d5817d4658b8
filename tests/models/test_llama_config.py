"""Settings of a LLaMA: presets, costs, flags, files, validation."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from llama_kit import TINY, changed

from EasyLM.errors import UserError
from EasyLM.models.llama import costs, llama_config, llama_model


@pytest.mark.parametrize(
    "name, millions",
    [
        ("vqlm_debug", 2.5),
        ("vqlm_100m", 117),
        ("vqlm_300m", 291),
        ("vqlm_600m", 648),
        ("vqlm_1b", 1150),
        ("vqlm_3b", 3280),
        ("vqlm_7b", 6540),
        ("vqlm_13b", 12800),
        ("vqlm_20b", 20700),
        ("vqlm_30b", 32200),
    ],
)
def test_number_of_parameters_of_presets(name, millions):
    config = llama_config.load_config(name)
    shapes = jax.eval_shape(lambda: llama_model.init_params(config, jax.random.key(0)))
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert count == costs.num_parameters(config)
    assert count == pytest.approx(millions * 1e6, rel=0.02 if millions < 10 else 0.005)
    assert config.vocab_size == 8292 and config.max_sequence_length == 4096


def test_flops_per_token():
    """6 a parameter that multiplies the token, and three times the causal half of two T x T products."""
    config = llama_config.load_config("vqlm_7b")
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 8292
    assert costs.flops_per_token(config, 4096) == 6 * weights + 3 * 32 * (2 * 2 * 4096 * 4096 // 2)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{'remat_block': 'dots'}", "llama.remat_block='dots': choose one of 'auto', '', 'everything_saveable'"),
        (
            "{'hidden_size': 100, 'num_attention_heads': 8}",
            "llama.num_attention_heads=8: must be a divisor of hidden_size",
        ),
        ("{'hidden_size': 60}", "llama.hidden_size=60: must be an even multiple of num_attention_heads=4"),
        ("{'attn_pdrop': 1.0}", "llama.attn_pdrop=1.0: must be at least 0 and below 1"),
        ("{'fcm_min_ratio': 0.5}", "llama.fcm_min_ratio=0.5: must be at most fcm_max_ratio=0.0"),
        ("{'eos_token_id': 1}", "llama.eos_token_id=1: must be at least 8192: smaller ids are image codes"),
        (
            "{'codebook_size': 16384, 'vocab_size': 8292}",
            "llama.vocab_size=8292: must be at least codebook_size=16384",
        ),
        (
            "{'codebook_size': 16384, 'bos_token_id': 8192}",
            "llama.bos_token_id=8192: must be at least 16384: smaller ids",
        ),
        ("{'codebook_size': 65537}", "llama.codebook_size=65537: must be 0..65536"),
        ("{'codebook_size': '16384'}", "llama.codebook_size='16384': must be of type int"),
        ("{'hidden_size': '64'}", "llama.hidden_size='64': must be of type int"),
        ("{'rope_theta': 1%s}" % ("0" * 400), "llama.rope_theta=1000"),
        ("{'hidden_sise': 64}", "unknown setting hidden_sise; choose from vocab_size, hidden_size"),
        ("__import__('os').getcwd()", "not a Python dict literal"),
    ],
)
def test_invalid_settings_are_named(text, message):
    with pytest.raises(UserError) as error:
        llama_config.updated(TINY, text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"initializer_range": 2**32 - 1},
        {"rope_theta": 2**40, "rms_norm_eps": 2**33},
        {"rope_scaling": {"rope_type": "llama3", "factor": 2**34, "original_max_position_embeddings": 2**35}},
    ],
)
def test_integers_are_numbers_of_any_size(changes):
    """JAX takes a Python int for an int32."""
    config = dataclasses.replace(TINY, **changes)

    def logits():
        params = llama_model.init_params(config, jax.random.key(0))
        return llama_model.apply(config, params, jnp.zeros((1, 4), jnp.int32))

    assert jax.eval_shape(logits).shape == (1, 4, config.vocab_size)  # traced: that is where the ints are taken


def test_update_overrides_flags_override_preset():
    given = dict.fromkeys(llama_config.FLAG_OF_FIELD) | {"num_hidden_layers": 3, "rope_theta": 5.0}
    config = llama_config.build_config("vqlm_debug", given, "dict(rope_theta=7.0)")
    assert (config.hidden_size, config.num_hidden_layers, config.rope_theta) == (128, 3, 7.0)


def test_special_ids_and_vocabulary_follow_the_codebook(tmp_path):
    def ids(config):
        return config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id

    assert ids(llama_config.LLaMAConfig()) == (8292, 8192, 8193, 8192)
    config = llama_config.build_config("vqlm_debug", {"codebook_size": 16384, "hidden_size": None}, "")
    assert ids(config) == (16484, 16384, 16385, 16384)
    assert ids(llama_config.updated(config, "{'codebook_size': 1024}")) == (1124, 1024, 1025, 1024)
    assert ids(llama_config.updated(config, "{'hidden_size': 64}")) == (16484, 16384, 16385, 16384)
    assert ids(llama_config.updated(config, "{'codebook_size': 16384, 'vocab_size': 16400}"))[0] == 16400
    # Settings in a file are as they were recorded.
    path = tmp_path / "model.json"
    path.write_text(json.dumps(dataclasses.asdict(config) | {"eos_token_id": 16390}))
    assert ids(llama_config.load_config(f"json::{path}")) == (16484, 16384, 16390, 16384)


def test_settings_from_files(golden, tmp_path):
    assert llama_config.load_config(f"pickle::{golden}/lvm_tiny/final/metadata.pkl") == TINY
    hugging_face = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
    hugging_face |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 77, "bos_token_id": 1}
    hugging_face |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "torch_dtype": "float32"}
    for content, expected in (
        ({"llama_config": dataclasses.asdict(TINY), "step": 3}, TINY),
        (dataclasses.asdict(TINY), TINY),
        (hugging_face, changed(max_sequence_length=77, rope_theta=5.0)),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert llama_config.load_config(f"json::{tmp_path}/config.json") == expected


def test_unknown_preset_lists_the_choices():
    with pytest.raises(UserError, match=r"^--load_llama_config='vqlm_8b': choose one of 'vqlm_debug', 'vqlm_100m'"):
        llama_config.load_config("vqlm_8b")
