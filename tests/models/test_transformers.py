"""Exported models in transformers: the same logits, the same tokens, the same settings."""

import dataclasses
import logging
import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import prompting_kit
import pytest
from checkpoint_kit import assert_equal, random_params
from convert_kit import export, import_, tiny_state, torch_logits, torch_model
from tokenizer_kit import TINY, tiny_vqgan, write_image

from EasyLM import checkpoints
from EasyLM.models.llama import hf_files, hf_layout, llama_config, llama_model
from EasyLM.models.llama.llama_config import PRESETS

SPECIAL_IDS = {"bos_token_id": 8192, "eos_token_id": 8193, "pad_token_id": 8192}


@pytest.mark.slow
@pytest.mark.parametrize("max_shard_mb", [hf_files.MAX_SHARD_MB, 0.1])
def test_logits_of_exported_lvm_tiny_equal_the_release(golden, tmp_path, max_shard_mb):
    reference = np.load(golden / "lvm_tiny" / "golden.npz")
    logits_BTV = torch_logits(
        export(tiny_state(golden), tmp_path / "hf", max_shard_mb=max_shard_mb), reference["input_tokens"]
    )
    np.testing.assert_allclose(logits_BTV, reference["logits"], atol=2e-5, rtol=0)


@pytest.mark.slow
def test_tied_head_round_trip(tmp_path):
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


@pytest.mark.slow
def test_transformers_reads_exported_settings(tmp_path):
    transformers = pytest.importorskip("transformers")
    random_params(tmp_path / "run", PRESETS["vqlm_debug"])
    directory = export(f"params::{tmp_path}/run/streaming_params", tmp_path / "hf")
    for kind in (transformers.GenerationConfig, transformers.LlamaConfig):
        config = kind.from_pretrained(directory)
        assert {name: getattr(config, name) for name in SPECIAL_IDS} == SPECIAL_IDS
    assert (config.head_dim, config.rms_norm_eps, config.max_position_embeddings) == (32, 1e-6, 4096)
    assert config.rope_parameters["rope_theta"] == 10000 and str(config.dtype).endswith("float32")


@pytest.mark.slow
def test_the_generation_config_gives_no_warnings_and_codes_only(tmp_path, monkeypatch, caplog):
    """By the program of docs/serve_elsewhere.md. Also if greedy decoding is asked for, which ignores top_k."""
    pytest.importorskip("transformers")
    document = (pathlib.Path(__file__).parents[2] / "docs/serve_elsewhere.md").read_text()
    program = re.search(r"```python\n(.*?)```", document, re.DOTALL)[1]
    config = llama_config.updated(prompting_kit.CONFIG, f"{{'codebook_size': {TINY.num_embeddings}}}")
    assert config.vocab_size == TINY.num_embeddings + 100, "most ids are no codes"
    random_params(tmp_path / "run", config)
    export(f"params::{tmp_path}/run/streaming_params", tmp_path / "HF_DIR")
    tiny_vqgan(tmp_path / "VQGAN_DIR")
    for seed, name in enumerate(("a.png", "a_depth.png", "b.png")):
        write_image(tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # of objects of earlier tests, which are collected here
        exec(program, names)
        model, prompt = names["model"], names["prompt"]
        greedy = model.generate(prompt, attention_mask=prompt * 0 + 1, max_new_tokens=64, do_sample=False)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    for tokens in (names["tokens"], greedy):
        assert tokens.shape == (1, 4 * 64) and int(tokens.max()) < TINY.num_embeddings
    assert len(set(names["tokens"][0, 3 * 64 :].tolist())) > 4
    assert (tmp_path / "answer.png").exists() and model.generation_config.top_k == 0


@pytest.mark.slow
def test_greedy_decoding_equals_transformers_for_256_tokens(golden, tmp_path):
    torch = pytest.importorskip("torch")
    model = hf_layout.read_model(export(tiny_state(golden), tmp_path / "hf"))[0]
    params = checkpoints.load(tiny_state(golden))
    prompt = np.load(golden / "lvm_tiny" / "golden.npz")["input_tokens"][:1, :100]
    theirs = (
        torch_model(str(tmp_path / "hf"))
        .generate(torch.tensor(prompt).long(), max_new_tokens=256, do_sample=False)[0]
        .numpy()
    )

    @jax.jit
    def next_token(tokens_BT, length):
        return llama_model.apply(model, params, tokens_BT)[0, length - 1].argmax()

    tokens_BT = np.zeros((1, 356), np.int32)
    tokens_BT[:, :100] = prompt
    for length in range(100, 356):
        tokens_BT[0, length] = next_token(tokens_BT, length)
    np.testing.assert_array_equal(theirs, tokens_BT[0])


@pytest.mark.slow
def test_logits_of_exported_vqlm_100m(tmp_path):
    model = PRESETS["vqlm_100m"]
    params = random_params(tmp_path / "run", model)
    directory = export(f"params::{tmp_path}/run/streaming_params", tmp_path / "hf", model_size="vqlm_100m")
    tokens_BT = np.random.default_rng(0).integers(0, 8292, (1, 256))
    ours = jax.jit(lambda params, tokens: llama_model.apply(model, params, tokens))(params, jnp.asarray(tokens_BT))
    assert ours.std() > 0.8
    np.testing.assert_allclose(torch_logits(directory, tokens_BT), ours, atol=1e-4, rtol=0)
