"""Cached generation against the model's own full forward pass."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_kit import random_params
from scipy import stats

from EasyLM import flags
from EasyLM.checkpoints import load
from EasyLM.errors import UserError
from EasyLM.models.generate import _decode, generate, left_padded
from EasyLM.models.llama import convert_easylm_to_hf, llama_model
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.models.llama.llama_decode import LLaMADecoder, score
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.models.sampling import Sampling
from EasyLM.parallel import make_mesh, shardings

CONFIG = LLaMAConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
DECODER = LLaMADecoder(CONFIG)
ALLOWED = 500


@pytest.fixture(scope="module")
def params():
    init = jax.jit(llama_model.init_params, static_argnums=0)
    scales = {1: 1, 2: 5, 3: 3}  # as it is, all tokens are about as likely
    return jax.tree.map(lambda x: scales[x.ndim] * x, init(CONFIG, jax.random.key(1)))


@functools.partial(jax.jit, static_argnums=2)
def logits_of(params, tokens_BT, config=CONFIG):
    return llama_model.apply(config, params, tokens_BT)


def prompts_of(*lengths):
    return [np.random.default_rng(length).integers(0, 512, length) for length in lengths]


def most_likely(params, prompt_P, new_N):
    """The most likely token at each position of `new_N`, by the full forward pass."""
    logits_TV = np.asarray(logits_of(params, np.concatenate([prompt_P, new_N])[None]))[0]
    return logits_TV[len(prompt_P) - 1 : -1, :ALLOWED].argmax(-1)


greedy = functools.partial(generate, temperature=0.0, allowed_ids=ALLOWED)
drawn = functools.partial(generate, num_new_tokens=20, num_candidates=2, allowed_ids=ALLOWED, seed=3)


@pytest.mark.slow
def test_greedy_while_the_cache_grows(golden, monkeypatch):
    monkeypatch.setattr("EasyLM.models.generate.INITIAL_SLOTS", 16)
    shapes = jax.eval_shape(lambda: llama_model.init_params(CONFIG, jax.random.key(0)))
    params = load(f"trainstate_params::{golden}/lvm_tiny/final/streaming_train_state", shapes)
    prompt_P = np.load(golden / "lvm_tiny/golden.npz")["input_tokens"][0, :24]
    reports = []
    new_N = greedy(DECODER, params, prompt_P[None], num_new_tokens=42, progress=reports.append)[0, 0]
    assert new_N.shape == (42,) and new_N.dtype == np.int32 and len(set(new_N.tolist())) > 3
    np.testing.assert_array_equal(new_N, most_likely(params, prompt_P, new_N))
    assert [report.shape for report in reports] == [(1, 1, n) for n in (16, 32, 42)]
    for report in reports:
        np.testing.assert_array_equal(report[0, 0], new_N[: report.shape[-1]])


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_cached_logits_equal_the_full_forward(params, dtype):
    decoder = LLaMADecoder(CONFIG, dtype)
    tokens_BT = np.stack(prompts_of(24, 24))
    tokens_BT[1] = tokens_BT[1, ::-1]
    expected_BTV = np.asarray(logits_of(params, tokens_BT))
    tolerance = 1e-4
    if dtype == jnp.bfloat16:  # as near to float32 as without a cache
        uncached_BTV = llama_model.apply(CONFIG, params, tokens_BT, dtype=dtype).astype(jnp.float32)
        tolerance = 1.5 * np.abs(uncached_BTV - expected_BTV).max()
    weights = jax.jit(decoder.prepare, static_argnums=1)(params, 512)
    logits_BV, prompt_cache = jax.jit(decoder.prefill, static_argnums=3)(params, tokens_BT[:, :16], None, 512)
    np.testing.assert_allclose(logits_BV.astype(np.float32), expected_BTV[:, 15], atol=tolerance, rtol=0)
    cache = decoder.empty_cache(2, 1, 8)
    step = jax.jit(decoder.step)
    for slot in range(8):
        logits_BCV, cache = step(weights, prompt_cache, cache, tokens_BT[:, 16 + slot, None], slot)
        got_BV = logits_BCV[:, 0].astype(np.float32)
        np.testing.assert_allclose(got_BV, expected_BTV[:, 16 + slot], atol=tolerance, rtol=0)


@pytest.mark.slow
def test_tokens_are_independent_of_padding_and_batch(params):
    rows = prompts_of(9, 24)
    prompts_BP, mask_BP = left_padded(rows)
    together = drawn(DECODER, params, prompts_BP, prompt_mask_BP=mask_BP, num_candidates=3)
    for row, new_CN in zip(rows, together, strict=True):
        np.testing.assert_array_equal(new_CN[:2], drawn(DECODER, params, row[None])[0])
    assert not np.array_equal(together[0, 0], together[0, 1]) and not np.array_equal(together[0, 0], together[1, 0])
    assert not np.array_equal(drawn(DECODER, params, rows[0][None], seed=4)[0], together[0, :2])


def kept_probabilities(logits_V, top_k=0, top_p=1.0):
    """The distribution that is sampled, by its definition: ids in order of probability."""
    likeliest = sorted(range(len(logits_V)), key=lambda v: -logits_V[v])
    if top_k:
        likeliest = likeliest[:top_k]
    p_V = np.zeros(len(logits_V))
    p_V[likeliest] = np.exp(logits_V[likeliest] - logits_V.max())
    p_V /= p_V.sum()
    kept_V = np.zeros(len(logits_V))
    for v in likeliest:
        if kept_V.sum() < top_p:
            kept_V[v] = p_V[v]
    return kept_V / kept_V.sum()


slow = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    "position, limits",
    [
        (1, {"top_k": 7, "top_p": 0.8}),
        *(pytest.param(*case, marks=slow) for case in [(0, {}), (1, {}), (0, {"top_k": 5}), (0, {"top_p": 0.7})]),
    ],
)
def test_sampled_frequencies_follow_the_model(params, position, limits):
    """A chi-square test of the first token, and of the second given the first; other ids are never sampled."""
    (prompt_P,) = prompts_of(12)
    temperature, allowed = 0.7, 12
    tokens_CN = generate(
        DECODER,
        params,
        prompt_P[None],
        num_new_tokens=2,
        num_candidates=4000,
        temperature=temperature,
        allowed_ids=allowed,
        seed=5,
        **limits,
    )[0]
    if position == 1:
        commonest = np.bincount(tokens_CN[:, 0]).argmax()
        tokens_CN, prompt_P = tokens_CN[tokens_CN[:, 0] == commonest], np.append(prompt_P, commonest)
    logits_V = np.asarray(logits_of(params, prompt_P[None])[0, -1, :allowed], np.float64)
    expected_V = kept_probabilities(logits_V / temperature, **limits)
    counts_V = np.bincount(tokens_CN[:, position], minlength=allowed)
    assert len(counts_V) == allowed and counts_V.sum() > 300
    assert not counts_V[expected_V == 0].any() and (not limits or (expected_V == 0).any())
    kept_V = expected_V > 0
    assert stats.chisquare(counts_V[kept_V], expected_V[kept_V] * counts_V.sum()).pvalue > 0.001


@slow
@pytest.mark.parametrize("mesh_dim, rows", [("2,2,2", 4), ("2,2,2", 1), ("8,1,1", 8), ("1,4,2", 3), ("1,1,8", 2)])
def test_greedy_on_a_mesh_equals_one_device(params, mesh_dim, rows):
    mesh = make_mesh(mesh_dim)
    placed = jax.device_put(params, shardings(mesh, PARTITION_RULES, params))
    prompts_BP = np.stack([prompts_of(8 * (rows + 1))[0][8 * row :][:8] for row in range(rows)])
    decoder = dataclasses.replace(DECODER, mesh=mesh)
    new = greedy(decoder, placed, prompts_BP, num_new_tokens=20, num_candidates=2)
    for prompt_P, new_CN in zip(prompts_BP, new, strict=True):
        for new_N in new_CN:
            np.testing.assert_array_equal(new_N, most_likely(params, prompt_P, new_N))


@pytest.mark.slow
def test_sampling_on_a_mesh_equals_one_device(params):
    prompts_BP = np.stack([prompts_of(40)[0][8 * row :][:8] for row in range(4)])
    one = drawn(DECODER, params, prompts_BP)
    for mesh_dim in ("8,1,1", "1,4,2"):
        mesh = make_mesh(mesh_dim)
        placed = jax.device_put(params, shardings(mesh, PARTITION_RULES, params))
        np.testing.assert_array_equal(drawn(dataclasses.replace(DECODER, mesh=mesh), placed, prompts_BP), one)


def test_candidates_share_the_prompts_cache(params):
    read = []

    class Spy(LLaMADecoder):
        def prefill(self, params, prompts_BP, mask_BP, allowed_ids):
            logits_BV, cache = super().prefill(params, prompts_BP, mask_BP, allowed_ids)
            read.append([k_BHPK.shape for k_BHPK, _ in cache["layers"]])
            return logits_BV, cache

    new = generate(Spy(CONFIG), params, np.stack(prompts_of(8)), num_new_tokens=1, num_candidates=5)
    assert new.shape == (1, 5, 1) and read == [[(1, 4, 8, 16)] * 2]


@pytest.mark.slow
def test_greedy_tokens_equal_transformers_for_300_tokens(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    params = random_params(
        tmp_path / "run", CONFIG
    )  # of a trained model the likeliest tokens soon go round in a circle
    config = flags.defaults(convert_easylm_to_hf.FLAGS)
    config.update(load_checkpoint=f"params::{tmp_path}/run/streaming_params", output_dir=str(tmp_path / "hf"))
    convert_easylm_to_hf.main(config)
    prompts_BP = np.stack(prompts_of(24, 24))
    prompts_BP[1] = prompts_BP[1, ::-1]
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype="float32").eval()
    rows = theirs.generate(torch.tensor(prompts_BP, dtype=torch.long), do_sample=False, max_new_tokens=300)[:, 24:]
    assert all(len(set(row[200:].tolist())) > 50 for row in rows)
    ours = generate(DECODER, params, prompts_BP, num_new_tokens=300, temperature=0.0, allowed_ids=10**6)
    np.testing.assert_array_equal(ours[:, 0], rows.numpy())


def lowered_loop(rows, candidates, slots=32):
    """Returns the loop over 8 tokens after prompts of 8 tokens, lowered, and the shape of a candidates' cache."""
    params = jax.eval_shape(lambda: llama_model.init_params(CONFIG, jax.random.key(0)))
    weights = jax.eval_shape(lambda params: DECODER.prepare(params, ALLOWED), params)
    prompt = jax.ShapeDtypeStruct((rows, 8), jnp.int32)
    _, prompt_cache = jax.eval_shape(lambda *x: DECODER.prefill(*x, None, ALLOWED), params, prompt)
    cache = jax.eval_shape(lambda: DECODER.empty_cache(rows, candidates, slots))
    tokens = jax.ShapeDtypeStruct((rows, candidates, slots), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (rows, candidates)))
    lowered = _decode.lower(DECODER, weights, prompt_cache, cache, tokens, 1, 9, Sampling(1.0), keys)
    return lowered, cache[0][0].shape


def test_step_updates_the_cache_in_place():
    """The compiled loop copies no cache: copies would dominate the time of a step."""
    lowered, shape_BHCSK = lowered_loop(rows=1, candidates=3)
    text, shape = lowered.compile().as_text(), ",".join(map(str, shape_BHCSK))
    assert f"f32[{shape}]" in text
    assert not re.search(rf"f32\[{shape}\]\S* copy\(", text)


def test_products_of_a_step_have_no_axis_of_size_one():
    """XLA's CPU backend is slower with the axis of queries that share a key, if there is one query."""
    products = [
        line for line in lowered_loop(rows=2, candidates=3)[0].as_text().splitlines() if "stablehlo.dot_general" in line
    ]
    assert len(products) == CONFIG.num_hidden_layers * (7 + 4) + 1  # kernels, attention, head
    assert not [line for line in products if re.search(r"[<x]1x", line)]


@pytest.mark.slow
def test_tied_head(params):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    transformer = params["params"]["transformer"]
    embedding_VD = transformer["wte"]["embedding"].at[ALLOWED:].multiply(50.0)  # forbidden ids are the most likely ones
    params = {"params": {"transformer": {**transformer, "wte": {"embedding": embedding_VD}}}}
    (prompt_P,) = prompts_of(8)
    new_N = greedy(LLaMADecoder(config), params, prompt_P[None], num_new_tokens=8)[0, 0]
    logits_TV = np.asarray(logits_of(params, np.concatenate([prompt_P, new_N])[None], config))[0]
    np.testing.assert_array_equal(new_N, logits_TV[7:-1, :ALLOWED].argmax(-1))
    assert (logits_TV[7:-1].argmax(-1) >= ALLOWED).all()


@pytest.mark.parametrize("from_position, mesh_dim", [(1, None), (13, None), (23, "2,2,2")])
def test_scores_of_tokens(params, monkeypatch, from_position, mesh_dim):
    # Chunks of 5 tokens; the last one is padded.
    monkeypatch.setattr("EasyLM.models.llama.llama_decode.LOGITS_TOKENS", 10)
    tokens_BT = np.stack(prompts_of(24, 24))
    tokens_BT[1] = tokens_BT[1, ::-1]
    log_p_BTV = jax.nn.log_softmax(logits_of(params, tokens_BT), axis=-1)
    tokens_BT[0, -1] = log_p_BTV[0, -2].argmax()
    expected_BT = np.take_along_axis(np.asarray(log_p_BTV)[:, :-1], tokens_BT[:, 1:, None], -1)[..., 0]
    mesh = make_mesh(mesh_dim) if mesh_dim else None
    log_p_BT, is_most_likely_BT = score(CONFIG, params, tokens_BT, from_position, mesh=mesh)
    assert log_p_BT.dtype == np.float32
    np.testing.assert_allclose(log_p_BT, expected_BT[:, from_position - 1 :], atol=2e-5, rtol=0)
    expected_BT = np.asarray(log_p_BTV)[:, :-1].argmax(-1) == tokens_BT[:, 1:]
    np.testing.assert_array_equal(is_most_likely_BT, expected_BT[:, from_position - 1 :])
    assert is_most_likely_BT[0, -1]


@pytest.mark.slow
def test_scores_of_padded_rows(params):
    rows = prompts_of(9, 24)
    tokens_BT, mask_BT = left_padded(rows)
    got_BT, _ = score(CONFIG, params, tokens_BT, 20, mask_BT=mask_BT)
    for row, got_T in zip(rows, got_BT, strict=True):
        alone_BT, _ = score(CONFIG, params, row[None], len(row) - 4)
        np.testing.assert_allclose(got_T, alone_BT[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1e-38}, r"temperature=1e-38: must be 0 \(the most likely token\), or .* at least 1e-06"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -1}, "top_k=-1"),
        ({"num_new_tokens": 0}, "num_new_tokens=0"),
        ({"num_new_tokens": 4090}, "max_sequence_length=4096"),
        ({"num_candidates": 0}, "num_candidates=0"),
        ({"allowed_ids": 0}, "allowed_ids=0"),
        ({"prompts_BP": np.zeros((1, 0), int)}, "shape \\(1, 0\\)"),
        ({"prompts_BP": np.zeros((1, 8))}, "float64"),
        ({"prompts_BP": np.full((1, 8), 512)}, "token id 512"),
        ({"prompts_BP": np.full((1, 8), -1)}, "token id -1"),
        ({"prompt_mask_BP": np.ones((1, 7), int)}, "shape \\(1, 7\\)"),
        ({"prompt_mask_BP": np.array([[1] * 7 + [0]])}, "on the left"),
        ({"prompt_mask_BP": np.zeros((1, 8), int)}, "each row has a token"),
    ],
)
def test_invalid_arguments_are_named(params, given, message):
    with pytest.raises(UserError, match=message):
        generate(DECODER, params, **{"prompts_BP": np.zeros((1, 8), int), "num_new_tokens": 4} | given)


def test_invalid_positions_are_named(params):
    for position in (0, 8):
        with pytest.raises(UserError, match=f"from_position={position}: must be from 1 to 7"):
            score(CONFIG, params, np.zeros((1, 8), int), position)
