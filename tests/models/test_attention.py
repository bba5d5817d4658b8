"""The implementations of attention are the same function, and causal."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from EasyLM.errors import UserError
from EasyLM.models.attention import AttentionMask, attention
from EasyLM.models.attention.splash import causal_mask_class, splash_attention
from EasyLM.parallel import make_mesh
from EasyLM.planning.matmuls import attention_weights

B, T, H, K = 2, 13, 3, 4
VALID = np.ones((B, T), np.int32)
VALID[1, :5] = 0
FORGET = AttentionMask(forget_key=jax.random.key(1), forget_ratios=(0.2, 0.7))
DROPOUT = AttentionMask().with_dropout(jax.random.key(2), 0.3)
MASKS = {
    "plain": AttentionMask(),
    "left-padded": AttentionMask(VALID),
    "forgetful": FORGET,
    "dropout": DROPOUT,
    "all": dataclasses.replace(FORGET, valid_BS=VALID).with_dropout(jax.random.key(2), 0.3),
}

CHUNKED = {"implementation": "blockwise", "query_chunk": 4, "key_chunk": 5}


def inputs(dtype=np.float32, head_dim=K):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, T, H, head_dim)), dtype) for _ in range(4)]


def with_gradients(q_BTHK, k_BSHK, v_BSHK, weight_BTHK, mask, **how):
    out_BTHK, pullback = jax.vjp(lambda *qkv: attention(*qkv, mask, **how), q_BTHK, k_BSHK, v_BSHK)
    return out_BTHK, *pullback(weight_BTHK)


def test_xla_equals_the_definition():
    q_BTHK, k_BSHK, v_BSHK, _ = (np.float64(x) for x in inputs())
    expected_BTHK = np.zeros((B, T, H, K))
    for b in range(B):
        for t in range(T):
            seen = [s for s in range(t + 1) if VALID[b, s] or s == t]  # a padded query sees itself: no empty row
            for h in range(H):
                scores = k_BSHK[b, seen, h] @ q_BTHK[b, t, h] / np.sqrt(K)
                expected_BTHK[b, t, h] = np.exp(scores) / np.exp(scores).sum() @ v_BSHK[b, seen, h]
    attend = jax.jit(lambda *qkv: attention(*qkv, AttentionMask(VALID), implementation="xla"))
    actual_BTHK = attend(*inputs()[:3])
    np.testing.assert_allclose(actual_BTHK, expected_BTHK, atol=1e-6)


@pytest.mark.parametrize(
    "name, chunks",
    [
        ("plain", (4, 5)),
        ("left-padded", (64, 64)),
        ("dropout", (13, 13)),
        ("all", (4, 5)),
        pytest.param("all", (5, 3), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_blockwise_equals_xla(name, chunks):
    mask = MASKS[name]
    how = {"implementation": "blockwise", "query_chunk": chunks[0], "key_chunk": chunks[1]}
    actual = jax.jit(lambda *x: with_gradients(*x, mask, **how))(*inputs())
    expected = jax.jit(lambda *x: with_gradients(*x, mask, implementation="xla"))(*inputs())
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"implementation": "xla"}, CHUNKED], ids=["xla", "blockwise"])
def test_grouped_queries_equal_repeated_keys(how):
    """Two groups of three heads. The gradient of a key is the sum over its group."""
    mask, group = dataclasses.replace(FORGET, valid_BS=VALID), 3
    q_BTHK, weight_BTHK = (jnp.concatenate([x, x[:, ::-1]], axis=2) for x in inputs()[::3])
    k_BSGK, v_BSGK = (x[:, :, :2] for x in inputs()[1:3])
    repeated = [jnp.repeat(x, group, axis=2) for x in (k_BSGK, v_BSGK)]
    actual = jax.jit(lambda *x: with_gradients(*x, mask, **how))(q_BTHK, k_BSGK, v_BSGK, weight_BTHK)
    out, dq, *dkv = jax.jit(lambda *x: with_gradients(*x, mask, implementation="xla"))(q_BTHK, *repeated, weight_BTHK)
    summed = [x.reshape(B, T, 2, group, K).sum(3) for x in dkv]
    for x, y in zip(actual, (out, dq, *summed), strict=True):
        np.testing.assert_allclose(x, y, atol=3e-6)


@pytest.mark.slow
def test_dropout_differs_between_the_heads_of_a_group():
    q_BTHK, k_BSGK, v_BSGK, _ = (x[:, :, :1] for x in inputs())
    equal_BTHK = jnp.repeat(q_BTHK, 3, axis=2)
    xla, blockwise = (
        attention(equal_BTHK, k_BSGK, v_BSGK, DROPOUT, **how) for how in ({"implementation": "xla"}, CHUNKED)
    )
    np.testing.assert_allclose(blockwise, xla, atol=2e-6)
    assert (xla[:, 5:, 0] != xla[:, 5:, 1]).any(axis=-1).all()


@pytest.mark.slow
def test_blockwise_in_bf16_is_close_to_float32():
    how = {"implementation": "blockwise", "query_chunk": 4, "key_chunk": 4}
    actual = jax.jit(lambda *x: with_gradients(*x, AttentionMask(), **how))(*inputs(jnp.bfloat16))
    expected = with_gradients(*inputs(), AttentionMask(), implementation="xla")
    assert {x.dtype.name for x in actual} == {"bfloat16"}
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.float32(x), y, atol=0.05)


@pytest.mark.parametrize("implementation", ["xla", "blockwise"])
def test_causal(implementation):
    q_BTHK, k_BSHK, v_BSHK, _ = inputs()
    changed = [x.at[:, 8:].add(3.0) for x in (q_BTHK, k_BSHK, v_BSHK)]
    attend = jax.jit(lambda *qkv: attention(*qkv, FORGET, implementation=implementation))
    before, after = (attend(*x) for x in ((q_BTHK, k_BSHK, v_BSHK), changed))
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert (before[:, 8:] != after[:, 8:]).any()


def test_forgetful_mask_keeps_the_first_and_the_own_key():
    t = jnp.arange(400)
    allowed_BTS = np.asarray(jax.jit(lambda t: FORGET.allowed(2, t, t))(t))
    assert allowed_BTS[:, :, 0].all() and allowed_BTS[:, t, t].all()
    assert not np.triu(allowed_BTS, 1).any()
    kept_BT = np.array([[allowed_BTS[b, i, 1:i].mean() for i in range(200, 400)] for b in range(2)])
    # A query's share is uniform in its range, so their mean is near the middle and they spread over the range.
    assert abs(kept_BT.mean() - (1 - 0.45)) < 0.03
    assert kept_BT.min() < 0.4 and kept_BT.max() > 0.7
    assert (allowed_BTS[0] != allowed_BTS[1]).any() and (allowed_BTS[0, 300, :200] != allowed_BTS[0, 301, :200]).any()


def test_dropout_keeps_the_mean():
    t = jnp.arange(100)
    factor_BHTS = np.asarray(jax.jit(lambda t: DROPOUT.dropout_factor(B, H, t, t))(t))
    assert set(np.unique(factor_BHTS)) == {np.float32(0), np.float32(1 / 0.7)}
    assert abs(factor_BHTS.mean() - 1) < 0.01
    assert (factor_BHTS[0, 0] != factor_BHTS[0, 1]).any() and (factor_BHTS[0] != factor_BHTS[1]).any()


def test_blockwise_memory_is_linear():
    """Neither pass forms a matrix over all queries and keys."""
    shapes = [jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)] * 4
    both_passes = jax.jit(lambda *x: with_gradients(*x, AttentionMask(), implementation="blockwise"))
    text = both_passes.lower(*shapes).as_text()
    assert "1024x1024x" in text and "4096x4096" not in text


@pytest.mark.parametrize("mask", [AttentionMask(), FORGET], ids=["plain", "forgetful"])
def test_auto_on_a_gpu_never_forms_the_matrix(mask):
    """In float32, or with a mask that cuDNN does not support, "auto" selects blockwise for a GPU's platform."""
    shapes = [jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)] * 4
    text = jax.jit(lambda *x: with_gradients(*x, mask, platform="gpu")).lower(*shapes).as_text()
    assert "1024x1024x" in text and "4096x4096" not in text


def test_cudnn_error_names_its_requirements():
    requirements = "needs a GPU, bf16 or fp16, no dropout .*, no forgetful .* mask and no document mask; here are cpu"
    with pytest.raises(UserError, match=requirements):
        attention(*inputs()[:3], AttentionMask(), platform="cpu", implementation="cudnn")


@pytest.mark.slow
@pytest.mark.parametrize("groups", [H, 1])
@pytest.mark.parametrize("mask", [MASKS["plain"], MASKS["left-padded"]], ids=["plain", "left-padded"])
def test_cudnn_padding_equals_xla(mask, groups, monkeypatch):
    """`cudnn_attention` pads the head dimension and shifts padded rows. Here XLA stands in for the kernel."""
    kernel = jax.nn.dot_product_attention

    def stand_in(*arrays, implementation, **how):
        assert implementation == "cudnn" and arrays[0].shape[-1] % 8 == 0
        return kernel(*arrays, implementation="xla", **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)

    def grouped(q_BTHK, k_BSHK, v_BSHK, weight_BTHK):
        return q_BTHK, k_BSHK[:, :, :groups], v_BSHK[:, :, :groups], weight_BTHK

    actual = with_gradients(*grouped(*inputs(jnp.bfloat16, 12)), mask, platform="gpu")
    expected = with_gradients(*grouped(*inputs(head_dim=12)), mask, implementation="xla")
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == jnp.bfloat16 and x.shape == y.shape
        np.testing.assert_allclose(np.float32(x), y, atol=0.05)


def test_splash_error_names_its_requirements():
    requirements = (
        "needs a TPU, no dropout on the weights and no forgetful causal mask; here are cpu, a dropout rate of 0"
    )
    with pytest.raises(UserError, match=requirements):
        attention(*inputs()[:3], AttentionMask(), platform="cpu", implementation="splash")


@pytest.mark.parametrize("mask", [MASKS["plain"], MASKS["forgetful"]], ids=["plain", "forgetful"])
def test_auto_on_a_tpu_never_forms_the_matrix(mask):
    """ "auto" selects splash for a TPU's platform, and blockwise for a mask that splash does not support."""
    shapes = [jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)] * 4
    traced = jax.jit(lambda *x: with_gradients(*x, mask, platform="tpu")).trace(*shapes)
    assert attention_weights(traced.jaxpr, 4096) == ""
    assert ("splash_mha" in str(traced.jaxpr)) == (mask.forget_key is None)


@pytest.mark.slow
@pytest.mark.parametrize("length, head_dim, groups, masked, mesh_dim", [
    (130, 100, 2, False, ""),
    (130, 100, 2, True, "2,2,2"),
    (130, 64, 1, True, "4,1,2"),  # a group of two heads is not split
    (130, 128, 4, True, "dp:1,fsdp:2,mp:2,sp:2"),
    (1024, 64, 2, False, "2,2,2"),  # several blocks
    (1024, 64, 2, True, ""),
])  # fmt: skip
def test_splash_equals_xla(length, head_dim, groups, masked, mesh_dim):
    """In Pallas' interpreter, with grouped queries, padding and documents."""
    rng, batch, heads = np.random.default_rng(0), 4, max(2, groups)
    shapes = [(batch, length, count, head_dim) for count in (heads, groups, groups, heads)]
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    valid_BS = np.arange(length) >= np.array([0, 7, length // 2, length - 1])[:, None]
    first_BT = np.where(np.arange(length) < length // 3, 0, length // 3).repeat(batch).reshape(length, batch).T
    mask = AttentionMask(valid_BS.astype(np.int32), first_BT=first_BT) if masked else AttentionMask()
    mesh = make_mesh(mesh_dim) if mesh_dim else None

    def both_passes(q_BTHK, k_BSGK, v_BSGK, weight_BTHK):
        attend = partial(splash_attention, mask=mask, mesh=mesh, interpret=True)
        out_BTHK, pullback = jax.vjp(attend, q_BTHK, k_BSGK, v_BSGK)
        return out_BTHK, *pullback(weight_BTHK)

    actual = jax.jit(both_passes)(*arrays)
    expected = jax.jit(lambda *x: with_gradients(*x, mask, implementation="xla"))(*arrays)
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.slow
def test_the_mask_of_splash_is_that_of_its_library():
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def kernel_of(mask_class):
        masks = splash.MultiHeadMask([mask_class((1024, 1024))] * 2)
        blocks = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 128)
        how = {"block_sizes": splash.BlockSizes(**blocks), "head_shards": 1, "q_seq_shards": 1}
        return jax.tree.leaves(splash.make_splash_mha(masks, **how))

    for actual, expected in zip(kernel_of(causal_mask_class()), kernel_of(splash.CausalMask), strict=True):
        np.testing.assert_array_equal(actual, expected)
    mask, block = causal_mask_class()((1024, 1024)), slice(128, 256)
    assert mask[block, slice(256, 384)].size == mask[block, slice(0, 128)].size == 1, "later and earlier keys"
    np.testing.assert_array_equal(mask[block, block], np.tri(128, dtype=bool))
