"""A row of several documents equals the documents run one by one."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_kit import random_params
from llama_kit import changed

from EasyLM.errors import UserError
from EasyLM.models.attention import AttentionMask, attention
from EasyLM.models.llama import adapters, llama_model, rotary
from EasyLM.models.llama.lora import LoRAConfig
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.parallel import batch_sharding, make_mesh, shardings

# Two rows of 100 tokens: the ends of their documents.
ENDS = ([1, 40, 41, 100], [64, 73, 100])
SEGMENTS_BT = np.array([np.searchsorted(ends, np.arange(100), side="right") for ends in ENDS], np.int32)
CHUNKED = {"scan_attention": True, "scan_query_chunk_size": 16, "scan_key_chunk_size": 12}
CONFIG = changed(num_key_value_heads=2, qk_norm=True)


@pytest.fixture(scope="module")
def batch():
    tokens_BT = np.random.default_rng(0).integers(0, 512, (2, 101)).astype(np.int32)
    is_last_BT = np.diff(SEGMENTS_BT, axis=1, append=-1) != 0
    return {
        "input_tokens": tokens_BT[:, :-1],
        "target_tokens": tokens_BT[:, 1:],
        "loss_masks": np.float32(~is_last_BT),
        "segment_ids": SEGMENTS_BT,
    }


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    return random_params(tmp_path_factory.mktemp("run"), CONFIG)


def documents():
    for row, ends in enumerate(ENDS):
        for begin, end in zip([0, *ends[:-1]], ends, strict=True):
            yield row, slice(begin, end)


def loss_and_gradients(config, params, batch):
    return jax.jit(jax.value_and_grad(llama_model.make_loss_fn(config, jnp.float32), has_aux=True))(params, batch, None)


def test_first_tokens_and_positions():
    first_BT = np.asarray(rotary.first_tokens(SEGMENTS_BT))
    for row, part in documents():
        assert (first_BT[row, part] == part.start).all()
    positions_BT = rotary.positions(100, None, first_BT)
    expected_BT = [np.concatenate([np.arange(n) for n in np.diff([0, *ends])]) for ends in ENDS]
    np.testing.assert_array_equal(positions_BT, expected_BT)


@pytest.mark.parametrize("implementation", ["xla", "blockwise"])
def test_attention_equals_that_of_each_document(implementation):
    q_BTHK, k_BTHK, v_BTHK = np.random.default_rng(0).normal(size=(3, 2, 100, 2, 4)).astype(np.float32)
    how = {"implementation": implementation, "query_chunk": 16, "key_chunk": 12}
    first_BT = rotary.first_tokens(SEGMENTS_BT)
    actual_BTHK = jax.jit(lambda *x: attention(*x, AttentionMask(first_BT=first_BT), **how))(q_BTHK, k_BTHK, v_BTHK)
    for row, part in documents():
        scores_HTS = np.einsum("THK,SHK->HTS", q_BTHK[row, part], k_BTHK[row, part]) / 2
        weights_HTS = np.tril(np.exp(scores_HTS))
        weights_HTS /= weights_HTS.sum(-1, keepdims=True)
        expected_THK = np.einsum("HTS,SHK->THK", weights_HTS, v_BTHK[row, part])
        np.testing.assert_allclose(actual_BTHK[row, part], expected_THK, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"attention_implementation": "xla"}, CHUNKED], ids=["xla", "blockwise"])
def test_logits_equal_those_of_each_document(params, batch, settings):
    config = dataclasses.replace(CONFIG, **settings)
    apply = jax.jit(lambda params, tokens, segments: llama_model.apply(config, params, tokens, segment_ids_BT=segments))
    logits_BTV = apply(params, batch["input_tokens"], SEGMENTS_BT)
    assert logits_BTV.std() > 0.8
    alone = changed(num_key_value_heads=2, qk_norm=True, attention_implementation="xla")
    for row, part in list(documents())[1::2] if settings == CHUNKED else documents():
        expected_BTV = llama_model.apply(alone, params, batch["input_tokens"][row : row + 1, part])
        np.testing.assert_allclose(logits_BTV[row, part], expected_BTV[0], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"attention_implementation": "xla"}, CHUNKED], ids=["auto", "xla", "blockwise"]
)
def test_gradients_equal_those_of_each_document(params, batch, settings):
    (loss, _), gradients = loss_and_gradients(dataclasses.replace(CONFIG, **settings), params, batch)
    # Each document as a row, padded at the end, where no earlier token attends to it.
    parts = list(documents())
    rows = {name: np.zeros((len(parts), 64), batch[name].dtype) for name in batch if name != "segment_ids"}
    for number, (row, part) in enumerate(parts):
        for name in rows:
            rows[name][number, : part.stop - part.start] = batch[name][row, part]
    tokens_per_row = batch["loss_masks"].sum(axis=1)
    weights = [rows["loss_masks"][number].sum() / tokens_per_row[row] / 2 for number, (row, _) in enumerate(parts)]
    loss_fn = llama_model.make_loss_fn(CONFIG, jnp.float32)

    def weighted(params):
        losses = jax.vmap(lambda row: loss_fn(params, jax.tree.map(lambda x: x[None], row), None)[0])(rows)
        return (losses * jnp.asarray(weights)).sum()

    expected, expected_gradients = jax.jit(jax.value_and_grad(weighted))(params)
    np.testing.assert_allclose(loss, expected, atol=1e-5, rtol=0)
    for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1, np.abs(y).max()), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("mesh_dim, settings", [
    ("2,1,4", {"scan_layers": False, "scan_mlp": True, "scan_mlp_chunk_size": 24, "attention_implementation": "xla"}),
    ("dp:1,fsdp:2,mp:2,sp:2", {"tie_word_embeddings": True, "rope_scaling": "{'rope_type': 'llama3', 'factor': 8.0}"}),
])  # fmt: skip
def test_logits_with_adapters_on_a_mesh_equal_those_of_each_document(batch, mesh_dim, settings):
    """Also with layers that are not scanned, chunks of the feed-forward network, scaled rotation and split rows."""
    config, mesh = changed(num_hidden_layers=2, num_key_value_heads=2, **settings), make_mesh(mesh_dim)
    lora, rng = LoRAConfig(4, 8.0, 0.0, ("k_proj", "down_proj")), np.random.default_rng(1)
    shapes = jax.eval_shape(partial(llama_model.init_params, config), jax.random.key(0))
    shapes = adapters.with_adapters(shapes, adapters.adapter_shapes(config, lora))
    params = jax.tree.map(lambda x: rng.normal(0, 0.15, x.shape).astype(np.float32), shapes)
    placed = jax.device_put(params, shardings(mesh, PARTITION_RULES, params))
    rows = jax.device_put({name: batch[name] for name in ("input_tokens", "segment_ids")}, batch_sharding(mesh))

    def logits(params, tokens_BT, segments_BT=None, mesh=None):
        return llama_model.apply(config, params, tokens_BT, segment_ids_BT=segments_BT, lora=lora, mesh=mesh)

    actual_BTV = jax.jit(partial(logits, mesh=mesh))(placed, rows["input_tokens"], rows["segment_ids"])
    parts = list(documents())
    alone_BT = np.zeros((len(parts), 64), np.int32)  # padded at the end
    for number, (row, part) in enumerate(parts):
        alone_BT[number, : part.stop - part.start] = batch["input_tokens"][row, part]
    expected_BTV = jax.jit(logits)(params, alone_BT)
    assert expected_BTV.std() > 0.1
    for number, (row, part) in enumerate(parts):
        expected_TV = expected_BTV[number, : part.stop - part.start]
        np.testing.assert_allclose(actual_BTV[row, part], expected_TV, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_one_document_changes_nothing(params, batch):
    whole = {name: batch[name] for name in ("input_tokens", "target_tokens", "loss_masks")}
    one = whole | {"segment_ids": np.full((2, 100), 7, np.int32)}
    losses = [jax.jit(llama_model.make_loss_fn(CONFIG, jnp.float32))(params, each, None)[0] for each in (whole, one)]
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_the_forgetful_mask_keeps_the_first_key_of_each_document():
    first_BT = rotary.first_tokens(SEGMENTS_BT)
    mask = AttentionMask(forget_key=jax.random.key(0), forget_ratios=(0.9, 0.9), first_BT=first_BT)
    allowed_BTS = np.asarray(mask.allowed(2, jnp.arange(100), jnp.arange(100)))
    for row, part in documents():
        assert allowed_BTS[row, part, part.start].all()
        assert not allowed_BTS[row, part, : part.start].any()
    assert allowed_BTS[0, 99, 41:].mean() < 0.3


def test_the_kernel_of_a_gpu_is_refused():
    """It would attend to other documents."""
    shape = jax.ShapeDtypeStruct((1, 64, 1, 8), jnp.bfloat16)
    mask = AttentionMask(first_BT=np.zeros((1, 64), np.int32))
    attend = partial(attention, mask=mask, platform="gpu", implementation="cudnn")
    with pytest.raises(UserError, match=r"no document mask; here are gpu, bfloat16, .* and a document mask"):
        jax.eval_shape(attend, shape, shape, shape)


def test_the_kernel_of_a_tpu_gets_the_documents():
    """`test_splash_equals_xla` compares its results."""
    shape = jax.ShapeDtypeStruct((1, 128, 1, 128), jnp.float32)

    def attend(q_BTHK, first_BT):
        return attention(q_BTHK, q_BTHK, q_BTHK, AttentionMask(first_BT=first_BT), platform="tpu")

    jaxpr = jax.make_jaxpr(attend)(shape, jax.ShapeDtypeStruct((1, 128), jnp.int32))
    assert "splash_mha_fwd_segmented" in str(jaxpr)


def test_a_gpu_does_not_form_the_matrix():
    """It uses blockwise attention, because cuDNN's interface has no such mask."""
    shape = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.bfloat16)
    first = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def loss(q_BTHK, first_BT):
        return attention(q_BTHK, q_BTHK, q_BTHK, AttentionMask(first_BT=first_BT), platform="gpu").sum()

    text = jax.jit(jax.grad(loss)).lower(shape, first).as_text()
    assert "1024x1024x" in text and "4096x4096" not in text
