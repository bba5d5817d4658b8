"""The LLaMA against the numbers of the LVM release, and its variants against one another."""

import dataclasses
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from llama_kit import TINY, changed

from EasyLM import checkpoints
from EasyLM.models import losses
from EasyLM.models.attention import AttentionMask
from EasyLM.models.llama import layers, llama_model, rotary
from EasyLM.models.llama.remat_policies import REMAT_POLICIES

BLOCKWISE = {"scan_attention": True, "scan_query_chunk_size": 48, "scan_key_chunk_size": 20}


CHUNKED = BLOCKWISE | {"scan_mlp": True, "scan_mlp_chunk_size": 50}  # none of the sizes divides the 128 tokens


VARIANTS = [  # of how the same is computed
    CHUNKED | {"scan_layers": False, "remat_block": ""},
    {"attention_implementation": "xla", "remat_block": "nothing_saveable"},
    *(
        pytest.param(settings, marks=pytest.mark.slow)
        for settings in (
            {"scan_layers": False},
            BLOCKWISE,
            {"remat_block": "", "remat_attention": "nothing_saveable", "remat_mlp": "dots_saveable"},
            *({"remat_block": name} for name in REMAT_POLICIES),
        )
    ),
]


@pytest.fixture(scope="module")
def reference():
    directory = pathlib.Path(__file__).parents[1] / "golden" / "lvm_tiny"
    params = checkpoints.load(f"trainstate_params::{directory}/final/streaming_train_state")
    return params, dict(np.load(directory / "golden.npz"))


def loss_and_gradients(config, params, numbers, dtype=jnp.float32, key=None):
    batch = {name: numbers[name] for name in ("input_tokens", "target_tokens")}
    batch["loss_masks"] = np.ones(batch["input_tokens"].shape, np.float32)
    step = jax.jit(jax.value_and_grad(llama_model.make_loss_fn(config, dtype), has_aux=True))
    (loss, figures), gradients = step(params, batch, key)
    return loss, figures["accuracy"], gradients


def logits(config, params, tokens_BT, **others):
    return jax.jit(lambda *x: llama_model.apply(config, *x, **others))(params, tokens_BT)


def relative_error(actual, expected) -> float:
    """The largest error over the arrays of a tree, relative to the largest number of each array."""
    errors = jax.tree.map(lambda x, y: np.abs(np.float32(x) - y).max() / np.abs(y).max(), actual, expected)
    return max(jax.tree.leaves(errors))


def golden_gradients(numbers, like):
    """`grad/params/transformer/h/0/...`, stacked as parameters are in memory."""

    def array(path, _):
        names = [key.key for key in path]
        if "h" not in names:
            return numbers["/".join(["grad", *names])]
        at = names.index("h") + 1
        return np.stack([numbers["/".join(["grad", *names[:at], str(i), *names[at:]])] for i in range(2)])

    return jax.tree_util.tree_map_with_path(array, like)


def test_logits_equal_the_release(reference):
    params, numbers = reference
    logits_BTV = logits(TINY, params, numbers["input_tokens"])
    np.testing.assert_allclose(logits_BTV, numbers["logits"], atol=2e-5, rtol=0)
    for mask, end in ((None, ""), (numbers["loss_mask"], "_masked")):
        loss, accuracy = jax.jit(losses.cross_entropy_and_accuracy)(logits_BTV, numbers["target_tokens"], mask)
        np.testing.assert_allclose(loss, numbers[f"loss{end}"], atol=1e-5, rtol=0)
        np.testing.assert_allclose(accuracy, numbers[f"accuracy{end}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [BLOCKWISE, {"attention_implementation": "xla"}], ids=str)
def test_left_padded_logits_equal_the_release(reference, settings):
    params, numbers = reference
    mask_BT = numbers["attention_mask"]
    logits_BTV = logits(changed(**settings), params, numbers["input_tokens"], attention_mask_BT=mask_BT)
    np.testing.assert_allclose(logits_BTV[mask_BT == 1], numbers["logits_leftpad"][mask_BT == 1], atol=2e-5, rtol=0)


def test_gradients_equal_the_release(reference):
    params, numbers = reference
    loss, accuracy, gradients = loss_and_gradients(TINY, params, numbers)
    np.testing.assert_allclose(loss, numbers["loss"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(accuracy, numbers["accuracy"], atol=1e-5, rtol=0)
    assert relative_error(gradients, golden_gradients(numbers, params)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_variants_agree(reference, settings):
    params, numbers = reference
    loss, _, gradients = loss_and_gradients(changed(**settings), params, numbers)
    np.testing.assert_allclose(loss, numbers["loss"], atol=1e-5, rtol=0)
    assert relative_error(gradients, golden_gradients(numbers, params)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, loss_bound, gradient_bound",
    [("bfloat16", 0.01, 0.05), pytest.param("float16", 0.002, 0.02, marks=pytest.mark.slow)],
)
def test_half_precision_is_close_to_float32(reference, dtype, loss_bound, gradient_bound):
    params, numbers = reference
    loss, _, gradients = loss_and_gradients(TINY, params, numbers, dtype)
    assert abs(loss - numbers["loss"]) < loss_bound
    assert {x.dtype.name for x in jax.tree.leaves(gradients)} == {"float32"}
    assert relative_error(gradients, golden_gradients(numbers, params)) < gradient_bound


@pytest.mark.parametrize("at_once", [8192, 60])  # of 256; 60 makes chunks of 30, which do not divide 128
def test_masked_loss_equals_the_release(reference, monkeypatch, at_once):
    params, numbers = reference
    monkeypatch.setattr(llama_model, "LOGITS_TOKENS", at_once)
    batch = {name: numbers[name] for name in ("input_tokens", "target_tokens")} | {"loss_masks": numbers["loss_mask"]}
    loss, figures = jax.jit(llama_model.make_loss_fn(TINY, jnp.float32))(params, batch, None)
    np.testing.assert_allclose(loss, numbers["loss_masked"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(figures["accuracy"], numbers["accuracy_masked"], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_loss_in_chunks_agrees(reference, monkeypatch):
    params, numbers = reference
    monkeypatch.setattr(llama_model, "LOGITS_TOKENS", 60)
    loss, accuracy, gradients = loss_and_gradients(TINY, params, numbers)
    np.testing.assert_allclose((loss, accuracy), (numbers["loss"], numbers["accuracy"]), atol=1e-5, rtol=0)
    assert relative_error(gradients, golden_gradients(numbers, params)) < 1e-5


@pytest.mark.slow
def test_explicit_positions(reference):
    params, numbers = reference
    tokens_BT = numbers["input_tokens"]
    given = np.broadcast_to(np.arange(100, 228), tokens_BT.shape)
    logits_BTV = logits(TINY, params, tokens_BT, position_ids_BT=given)
    np.testing.assert_allclose(logits_BTV, numbers["logits"], atol=1e-4, rtol=0)  # rotary positions are relative
    logits_BTV = logits(TINY, params, tokens_BT, position_ids_BT=given * 2)
    assert np.abs(logits_BTV - numbers["logits"]).max() > 0.01


def test_logits_are_causal(reference):
    params, numbers = reference
    tokens_BT = numbers["input_tokens"]
    other_BT = tokens_BT.copy()
    other_BT[:, 77:] = 5
    apply = jax.jit(lambda *x: llama_model.apply(TINY, *x))
    before, after = apply(params, tokens_BT), apply(params, other_BT)
    np.testing.assert_array_equal(before[:, :77], after[:, :77])
    assert (before[:, 77:] != after[:, 77:]).any()


def test_dropout_is_independent_per_element():
    x_BTD = jnp.ones((4, 50, 60))
    actual_BTD = np.asarray(layers.dropout(x_BTD, jax.random.key(0), 0.2))
    assert set(np.unique(actual_BTD)) == {np.float32(0), np.float32(1.25)}
    assert abs(actual_BTD.mean() - 1) < 0.02
    assert (actual_BTD[:, 0] != actual_BTD[:, 1]).any() and (actual_BTD[0] != actual_BTD[1]).any()


def test_padding_has_position_zero():
    actual = rotary.positions(4, np.array([[0, 0, 1, 1], [1, 1, 1, 1]]))
    np.testing.assert_array_equal(actual, [[0, 0, 0, 1], [0, 1, 2, 3]])


def noisy_loss(config, reference):
    params, numbers = reference
    batch = {name: numbers[name] for name in ("input_tokens", "target_tokens")} | {"loss_masks": np.ones((2, 128))}
    loss = jax.jit(llama_model.make_loss_fn(config, jnp.float32))
    return lambda seed: float(loss(params, batch, jax.random.key(seed))[0])


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["resid_pdrop", "embd_pdrop", "attn_pdrop", "fcm_max_ratio"])
def test_noise_is_a_function_of_the_key(reference, setting):
    loss = noisy_loss(changed(**{setting: 0.4}), reference)
    assert abs(loss(0) - reference[1]["loss"]) > 1e-3
    assert loss(0) == loss(0) != loss(1)


@pytest.mark.slow
def test_noise_is_the_same_in_every_variant(reference):
    noise = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "fcm_max_ratio"), 0.2)
    all_losses = [
        noisy_loss(changed(**noise, **settings), reference)(0)
        for settings in ({}, CHUNKED | {"scan_layers": False, "remat_block": ""}, {"attention_implementation": "xla"})
    ]
    np.testing.assert_allclose(all_losses[1:], all_losses[0], atol=1e-5)


def test_no_noise_without_a_key(reference):
    params, numbers = reference
    noise = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "fcm_max_ratio"), 0.2)
    actual_BTV = logits(changed(**noise), params, numbers["input_tokens"])
    np.testing.assert_allclose(actual_BTV, numbers["logits"], atol=2e-5, rtol=0)


def test_unrolled_layers_keep_the_optimizer_apart_from_the_concatenation_of_their_gradients():
    config = changed(scan_layers=False)
    params = llama_model.init_params(config, jax.random.key(0))
    step = jax.value_and_grad(llama_model.make_loss_fn(config, jnp.bfloat16), has_aux=True)
    batch = {name: np.ones((1, 16), np.int32) for name in ("input_tokens", "target_tokens", "loss_masks")}
    lines = jax.jit(step).lower(params, batch, None).as_text().splitlines()
    stacks = [re.match(r" *(%\w+) = stablehlo.concatenate .*-> tensor<2x\d+", line) for line in lines]
    names = {stack[1] for stack in stacks if stack}
    assert len(names) == 9  # the kernels and norms of a layer
    users = [line for line in lines if names & set(re.findall(r"%\w+", line.partition(" = ")[2]))]
    assert len(users) == 1 and "stablehlo.optimization_barrier" in users[0]


@pytest.mark.slow
def test_tied_embeddings_share_their_gradient():
    config = changed(tie_word_embeddings=True, vocab_size=300)
    params = llama_model.init_params(config, jax.random.key(0))
    assert "lm_head" not in params["params"]
    tokens_BT = np.arange(20).reshape(2, 10)
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    embedding_VD = params["params"]["transformer"]["wte"]["embedding"]
    both = {"params": params["params"] | {"lm_head": {"kernel": embedding_VD.T}}}

    def gradients(config, params):
        return jax.grad(lambda p: llama_model.apply(config, p, tokens_BT).var())(params)["params"]

    parts = gradients(untied, both)
    expected_VD = parts["transformer"]["wte"]["embedding"] + parts["lm_head"]["kernel"].T
    np.testing.assert_allclose(gradients(config, params)["transformer"]["wte"]["embedding"], expected_VD, atol=1e-7)


@pytest.mark.parametrize("policy, runs", [("projections_and_attention_saveable", 1), ("nothing_saveable", 2)])
def test_remat_policy_controls_saving_of_the_attention_kernel(monkeypatch, policy, runs):
    """Traced as on a GPU: cuDNN's forward kernel must not run again in the backward pass."""
    kernel = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(kernel, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(kernel, "check_compute_capability", lambda *_: True)
    monkeypatch.setattr(kernel, "is_cuda_compute_capability_equal", lambda *_: False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = changed(hidden_size=400, remat_block=policy)  # heads of 100, padded to 104
    params = jax.eval_shape(lambda: llama_model.init_params(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    batch = {"input_tokens": tokens, "target_tokens": tokens, "loss_masks": jax.ShapeDtypeStruct((2, 128), jnp.float32)}
    gradient = jax.grad(lambda params, batch: llama_model.make_loss_fn(config, jnp.bfloat16)(params, batch, None)[0])
    text = str(jax.make_jaxpr(gradient)(params, batch))
    assert text.count("= dot_product_attention_fwd") == runs
    assert "bf16[2,128,4,104]" in text and "scale=0.1\n" in text


def test_the_devices_of_the_mesh_select_the_attention(monkeypatch):
    """A step for devices that this process does not have uses their kernels."""
    gpu = types.SimpleNamespace(platform="gpu")
    shape = {"dp": 1, "fsdp": 1, "mp": 1, "sp": 1}
    mesh, platforms = types.SimpleNamespace(devices=np.array([gpu]), shape=shape), []
    monkeypatch.setattr(layers, "constrain", lambda x, *_: x)
    monkeypatch.setattr(layers, "attention", lambda *qkvm, platform, **_: platforms.append(platform) or qkvm[2])

    def step(given):
        context = layers.Context(rotary.rotary_table(TINY, jnp.arange(3)[None]), AttentionMask(), given)
        return layers.Attention(TINY, nnx.Rngs(0))(jnp.ones((1, 3, TINY.hidden_size)), context)

    for given in (mesh, None):
        jax.eval_shape(lambda given=given: step(given))
    assert platforms == ["gpu", None]


@pytest.mark.slow
def test_initial_weights():
    config = changed(initializer_range=0.05)
    params = jax.jit(lambda key: llama_model.init_params(config, key))(jax.random.key(0))["params"]
    blocks = params["transformer"]["h"]
    for kernel in (
        params["lm_head"]["kernel"],
        params["transformer"]["wte"]["embedding"],
        blocks["attention"]["wq"]["kernel"],
    ):
        assert abs(kernel.std() - 0.05) < 0.003 and abs(kernel.mean()) < 0.003
    wq, wk = (blocks["attention"][name]["kernel"] for name in ("wq", "wk"))
    assert (wq[0] != wq[1]).all() and (wq != wk).all()  # each array its own numbers
    assert (blocks["ffn_norm"]["kernel"] == 1).all()
