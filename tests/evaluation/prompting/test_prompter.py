"""Compares the prompter with a slow reference without a cache: one full forward pass per image."""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama_kit import stacked
from prompting_kit import tiny_checkpoint, tiny_logits, tiny_params, tiny_prompter
from tokenizer_kit import run_main

from EasyLM import checkpoints
from EasyLM.errors import UserError
from EasyLM.models.llama import convert_easylm_to_hf, llama_config, llama_model
from EasyLM.parallel import make_mesh
from evaluation.prompting import GenerationSettings, Prompter, load_model

CODES, TOKENS = 32, 64
GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "lvm_tiny"
PROMPTS = [np.random.default_rng(i).integers(0, CODES, (images, TOKENS)) for i, images in enumerate((1, 4))]


@pytest.fixture(scope="module")
def prompter(tmp_path_factory):
    return tiny_prompter(tmp_path_factory.mktemp("vqgan"))


def most_likely(context_PN, image_N):
    """Returns the most likely token at each position of an image, by a full forward pass over its context."""
    logits_TV = tiny_logits(np.concatenate([context_PN.reshape(-1), image_N]))
    return logits_TV[-TOKENS - 1 : -1, :CODES].argmax(-1)


@pytest.mark.parametrize(
    "mesh_dim, window",
    [("1,1,1", 3), ("2,2,2", 16), ("1,8,1", 16)],
)
@pytest.mark.slow
def test_the_context_window_moves(prompter, tmp_path, mesh_dim, window):
    if mesh_dim != "1,1,1":
        prompter = tiny_prompter(tmp_path, mesh_dim)
    settings = GenerationSettings(num_new_images=3, num_candidates=2, context_images=window, temperature=0.0)
    samples = prompter.generate(PROMPTS, settings)
    assert samples.shape == (len(PROMPTS), 2, 3, TOKENS) and samples.dtype == np.int32
    context_images = min(window, 6) - 1  # the model's longest sequence holds 6
    assert len({sample.tobytes() for sample in samples[:, 0].reshape(-1, TOKENS)}) > 3
    for prompt_PN, samples_CFN in zip(PROMPTS, samples, strict=True):
        for sample_FN in samples_CFN:
            for f, image_N in enumerate(sample_FN):
                context_PN = np.concatenate([prompt_PN, sample_FN[:f]])[-context_images:]
                np.testing.assert_array_equal(image_N, most_likely(context_PN, image_N))


@pytest.mark.slow
def test_a_tokenizer_of_another_size_is_refused(prompter):
    """Also if neither the checkpoint nor its data names the tokenizer."""
    config = llama_config.updated(prompter.config, "{'codebook_size': 64}")
    message = "the tokenizer has 32 codes, but the model was trained with a tokenizer of 64 codes"
    with pytest.raises(UserError, match=message):
        Prompter(prompter.codec, config, None, prompter.mesh)


@pytest.mark.slow
def test_samples_do_not_depend_on_the_batch(prompter):
    settings = GenerationSettings(num_new_images=2, num_candidates=2, context_images=3, seed=4)
    together = prompter.generate(PROMPTS, settings)
    for number in (0, 1):
        np.testing.assert_array_equal(prompter.generate([PROMPTS[number]], settings)[0], together[number])
    assert not np.array_equal(together[0, 0], together[0, 1])
    assert together.min() >= 0 and together.max() < CODES
    reseeded = prompter.generate(PROMPTS, settings, seeds=[4, 5])
    np.testing.assert_array_equal(reseeded[0], together[0])
    assert not np.array_equal(reseeded[1], together[1])


def test_log_likelihoods_equal_those_of_single_rows(prompter):
    targets = [np.random.default_rng(9).integers(0, CODES, (1, TOKENS))] * len(PROMPTS)
    actual_BT = prompter.log_likelihoods(PROMPTS, targets)
    for prompt_PN, target_FN, actual_T in zip(PROMPTS, targets, actual_BT, strict=True):
        row_T = np.concatenate([prompt_PN.reshape(-1), target_FN.reshape(-1)])
        log_p_TV = np.asarray(jax.nn.log_softmax(tiny_logits(row_T)))
        expected_T = np.take_along_axis(log_p_TV[:-1], row_T[1:, None], -1)[-TOKENS:, 0]
        np.testing.assert_allclose(actual_T, expected_T, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prompts", [[np.zeros((0, TOKENS), int)], []])
def test_empty_prompts_are_refused(prompter, prompts):
    with pytest.raises(UserError, match="empty prompt"):
        prompter.generate(prompts, GenerationSettings())


@pytest.mark.parametrize("prompts", [PROMPTS[1], [PROMPTS[1].reshape(-1)], [PROMPTS[1][:, :32]]])
def test_prompts_of_another_shape_are_refused(prompter, prompts):
    """Such as one prompt in place of a list: its images would be taken for prompts of single tokens."""
    message = r"^tokens of shape \(.*\): give a list of arrays \(images, 64\)$"
    with pytest.raises(UserError, match=message):
        prompter.generate(prompts, GenerationSettings())
    with pytest.raises(UserError, match=message):
        prompter.score(PROMPTS[:1], prompts[:1])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"context_frames": 1}, "context_frames=1: must be at least 2"),
        ({"n_new_frames": 0}, "n_new_frames=0: must be at least 1"),
        ({"n_candidates": 0}, "n_candidates=0: must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"seed": 2**31}, "seed=2147483648"),
    ],
)
def test_errors_name_settings_as_flags_and_requests_do(values, message):
    with pytest.raises(UserError, match=message):
        GenerationSettings.from_user(values)


def test_settings_are_read_by_the_names_of_flags_and_requests():
    values = {"n_new_frames": 2, "n_candidates": 3, "context_frames": 4, "top_p": 0.5, "max_examples": 7}
    expected = GenerationSettings(num_new_images=2, num_candidates=3, context_images=4, top_p=0.5)
    assert GenerationSettings.from_user(values) == expected


@pytest.mark.slow
def test_kernels_have_the_compute_type(tmp_path):
    model_flags = tiny_checkpoint(tmp_path)
    mesh = make_mesh("1,1,1", jax.devices()[:1])
    config, params = load_model(model_flags["checkpoint"], model_flags["load_llama_config"], mesh, jnp.bfloat16)
    head, transformer = params["params"]["lm_head"], params["params"]["transformer"]
    assert head["kernel"].dtype == transformer["h"]["0"]["attention"]["wq"]["kernel"].dtype == jnp.bfloat16
    assert transformer["wte"]["embedding"].dtype == transformer["ln_f"]["kernel"].dtype == jnp.float32
    apply = jax.jit(lambda params: llama_model.apply(config, params, PROMPTS[0], dtype=jnp.bfloat16))
    np.testing.assert_array_equal(*(apply(p).astype(np.float32) for p in (stacked(params), tiny_params())))


SPECS = {
    "trainstate": "trainstate::{tiny}/final/streaming_train_state",
    "trainstate_params": "trainstate_params::{tiny}/final/streaming_train_state",
    "params": "params::{tiny}/streaming_params_bf16",
    "flax_params": "flax_params::{tiny}/flax_params.msgpack",
    "orbax": "orbax::{converted}/orbax",
    "huggingface": "huggingface::{converted}/hf",
    "directory": "{converted}/hf",
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The golden model as an Orbax and as a Hugging Face directory."""
    import orbax.checkpoint as ocp

    folder, spec = tmp_path_factory.mktemp("converted"), SPECS["trainstate_params"].format(tiny=GOLDEN)
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder / "orbax", checkpoints.load(spec))
    run_main(convert_easylm_to_hf, load_checkpoint=spec, output_dir=str(folder / "hf"))
    return folder


@pytest.mark.parametrize("prefix", SPECS)
def test_every_checkpoint_format_loads_the_same_model(converted, tmp_path, prefix):
    """Formats with metadata load without `load_llama_config`."""
    metadata = llama_config.recorded_config("trainstate", f"{GOLDEN}/final/streaming_train_state")
    (tmp_path / "model.json").write_text(json.dumps(dataclasses.asdict(metadata)))
    has_metadata = prefix.startswith("trainstate") or "hf" in SPECS[prefix]
    load_llama_config = "" if has_metadata else f"json::{tmp_path}/model.json"
    mesh = make_mesh("1,1,1", jax.devices()[:1])
    config, params = load_model(SPECS[prefix].format(tiny=GOLDEN, converted=converted), load_llama_config, mesh)
    expected, params = checkpoints.load(SPECS["trainstate_params"].format(tiny=GOLDEN)), stacked(params)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for loaded_leaf, leaf in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        leaf = leaf.astype(jnp.bfloat16).astype(np.float32) if prefix == "params" else leaf  # that file is in bf16
        np.testing.assert_array_equal(loaded_leaf, leaf)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "rms_norm_eps", "max_sequence_length")  # fmt: skip
    assert [getattr(config, name) for name in sizes] == [getattr(metadata, name) for name in sizes]


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            "{0}/file",
            "--checkpoint={0}/file: must be PREFIX::PATH, with one of the prefixes trainstate, trainstate_params,",
        ),
        ("weights::{0}/file", "--checkpoint=weights::{0}/file: prefix='weights': choose one of 'trainstate', "),
        ("params::{0}/none", "--checkpoint=params::{0}/none: there is no {0}/none"),
        ("params::{0}", "--checkpoint=params::{0}: {0} is not a file, as params:: needs"),
        ("{0}/none", "--checkpoint={0}/none: there is no {0}/none"),
        ("{0}", "--checkpoint={0}: no config.json in it"),
    ],
)
def test_invalid_checkpoints_are_named_before_their_metadata_is_read(tmp_path, spec, message):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UserError, match=re.escape(message.format(tmp_path))):
        load_model(spec.format(tmp_path), "", make_mesh("1,-1,1"))


def test_the_directory_of_a_run_is_told_its_checkpoint(golden):
    run = golden / "lvm_tiny" / "final"
    state = f"trainstate::{run}/streaming_train_state or trainstate_params::{run}/streaming_train_state"
    message = f"--checkpoint={run}: no config.json in it: .*; it holds a train state: load it as {state}$"
    with pytest.raises(UserError, match=message):
        load_model(str(run), "", make_mesh("1,-1,1"))
