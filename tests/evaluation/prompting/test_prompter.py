"""Prompting against a slow reference that reads everything anew for each picture."""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prompting_kit import tiny_checkpoint, tiny_logits, tiny_params, tiny_prompter
from tokenizer_kit import run_main

from EasyLM import checkpoints
from EasyLM.errors import UserError
from EasyLM.models.llama import convert_easylm_to_hf, llama_config, llama_model
from EasyLM.parallel import make_mesh
from evaluation.prompting.checkpoint import load_model

CODES, TOKENS = 32, 64
GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "lvm_tiny"
PROMPTS = [np.random.default_rng(i).integers(0, CODES, (pictures, TOKENS)) for i, pictures in enumerate((1, 4))]


@pytest.fixture(scope="module")
def prompter(tmp_path_factory):
    return tiny_prompter(tmp_path_factory.mktemp("vqgan"))


def most_likely(seen_PN, picture_N):
    """What the full forward over the pictures that are seen finds most likely at each place of the next."""
    logits_TV = tiny_logits(np.concatenate([seen_PN.reshape(-1), picture_N]))
    return logits_TV[-TOKENS - 1 : -1, :CODES].argmax(-1)


@pytest.mark.parametrize(
    "mesh_dim, window",
    [("1,1,1", 3), ("2,2,2", 16), ("1,8,1", 16)],
)
@pytest.mark.slow
def test_a_window_moves_over_the_pictures(prompter, tmp_path, mesh_dim, window):
    if mesh_dim != "1,1,1":
        prompter = tiny_prompter(tmp_path, mesh_dim)
    answers = prompter.answer(PROMPTS, new_pictures=3, candidates=2, context_pictures=window, temperature=0.0)
    assert answers.shape == (len(PROMPTS), 2, 3, TOKENS) and answers.dtype == np.int32
    seen_pictures = min(window, 6) - 1  # the model's longest sequence holds 6
    assert len({answer.tobytes() for answer in answers[:, 0].reshape(-1, TOKENS)}) > 3
    for prompt_PN, answers_CFN in zip(PROMPTS, answers, strict=True):
        for answer_FN in answers_CFN:
            for f, picture_N in enumerate(answer_FN):
                seen_PN = np.concatenate([prompt_PN, answer_FN[:f]])[-seen_pictures:]
                np.testing.assert_array_equal(picture_N, most_likely(seen_PN, picture_N))


@pytest.mark.slow
def test_what_is_drawn_does_not_depend_on_the_batch(prompter):
    draw = functools.partial(prompter.answer, new_pictures=2, candidates=2, context_pictures=3, seed=4)
    together = draw(PROMPTS)
    for number in (0, 1):
        np.testing.assert_array_equal(draw([PROMPTS[number]])[0], together[number])
    assert not np.array_equal(together[0, 0], together[0, 1])
    assert not np.array_equal(draw([PROMPTS[1]], seed=5)[0], together[1])
    assert together.min() >= 0 and together.max() < CODES


def test_likelihoods_are_those_of_single_rows(prompter):
    targets = [np.random.default_rng(9).integers(0, CODES, (1, TOKENS))] * len(PROMPTS)
    got_BT = prompter.log_likelihoods(PROMPTS, targets)
    for prompt_PN, target_FN, got_T in zip(PROMPTS, targets, got_BT, strict=True):
        row_T = np.concatenate([prompt_PN.reshape(-1), target_FN.reshape(-1)])
        log_p_TV = np.asarray(jax.nn.log_softmax(tiny_logits(row_T)))
        expected_T = np.take_along_axis(log_p_TV[:-1], row_T[1:, None], -1)[-TOKENS:, 0]
        np.testing.assert_allclose(got_T, expected_T, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"context_pictures": 1}, "context_frames=1: must be at least 2"),
        ({"new_pictures": 0}, "n_new_frames=0"),
        ({"prompts": [np.zeros((0, TOKENS), int)]}, "a prompt without pictures"),
        ({"prompts": []}, "a prompt without pictures"),
        ({"temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_says_what_is_wrong(prompter, given, said):
    with pytest.raises(UserError, match=said):
        prompter.answer(**{"prompts": PROMPTS} | given)


def test_kernels_are_loaded_in_the_type_of_the_computation(tmp_path):
    flags_of = tiny_checkpoint(tmp_path)
    mesh = make_mesh("1,1,1", jax.devices()[:1])
    config, params = load_model(flags_of["checkpoint"], flags_of["load_llama_config"], mesh, jnp.bfloat16)
    head, transformer = params["params"]["lm_head"], params["params"]["transformer"]
    assert head["kernel"].dtype == transformer["h"]["attention"]["wq"]["kernel"].dtype == jnp.bfloat16
    assert transformer["wte"]["embedding"].dtype == transformer["ln_f"]["kernel"].dtype == jnp.float32
    apply = jax.jit(lambda params: llama_model.apply(config, params, PROMPTS[0], dtype=jnp.bfloat16))
    np.testing.assert_array_equal(*(apply(p).astype(np.float32) for p in (params, tiny_params())))


SPECS = {
    "trainstate": "trainstate::{tiny}/final/streaming_train_state",
    "trainstate_params": "trainstate_params::{tiny}/final/streaming_train_state",
    "params": "params::{tiny}/streaming_params_bf16",
    "flax_params": "flax_params::{tiny}/flax_params.msgpack",
    "orbax": "orbax::{made}/orbax",
    "huggingface": "huggingface::{made}/hf",
    "directory": "{made}/hf",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The golden model as an Orbax and as a Hugging Face directory."""
    import orbax.checkpoint as ocp

    folder, spec = tmp_path_factory.mktemp("made"), SPECS["trainstate_params"].format(tiny=GOLDEN)
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder / "orbax", checkpoints.load(spec))
    run_main(convert_easylm_to_hf, load_checkpoint=spec, output_dir=str(folder / "hf"))
    return folder


@pytest.mark.parametrize("prefix", SPECS)
def test_every_kind_of_checkpoint_is_the_same_model(made, tmp_path, prefix):
    """Those that say themselves what model they are of without `load_llama_config`."""
    metadata = llama_config.config_beside(f"{GOLDEN}/final/streaming_train_state")
    (tmp_path / "model.json").write_text(json.dumps(dataclasses.asdict(metadata)))
    alone = prefix.startswith("trainstate") or "hf" in SPECS[prefix]
    given = "" if alone else f"json::{tmp_path}/model.json"
    mesh = make_mesh("1,1,1", jax.devices()[:1])
    config, params = load_model(SPECS[prefix].format(tiny=GOLDEN, made=made), given, mesh)
    expected = checkpoints.load(SPECS["trainstate_params"].format(tiny=GOLDEN))
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for found, wanted in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        wanted = wanted.astype(jnp.bfloat16).astype(np.float32) if prefix == "params" else wanted  # as the file has it
        np.testing.assert_array_equal(found, wanted)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "rms_norm_eps", "max_sequence_length")  # fmt: skip
    assert [getattr(config, name) for name in sizes] == [getattr(metadata, name) for name in sizes]


@pytest.mark.parametrize(
    "spec, said",
    [
        (
            "{0}/file",
            "--checkpoint={0}/file: must be PREFIX::PATH, with one of the prefixes trainstate, trainstate_params,",
        ),
        ("weights::{0}/file", "--checkpoint=weights::{0}/file: prefix='weights': choose one of 'trainstate', "),
        ("params::{0}/none", "--checkpoint=params::{0}/none: there is no {0}/none"),
        ("params::{0}", "--checkpoint=params::{0}: {0} is not a file, as params:: needs"),
        ("{0}/none", "--checkpoint={0}/none: there is no {0}/none"),
        ("{0}", "--checkpoint={0}: no config.json there"),
    ],
)
def test_a_checkpoint_that_is_none_is_named_before_its_settings_are_looked_for(tmp_path, spec, said):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UserError, match=re.escape(said.format(tmp_path))):
        load_model(spec.format(tmp_path), "", make_mesh("1,-1,1"))
