"""Rows that are split over the mesh axis sp give the losses and gradients of whole rows."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from llama_kit import changed

from EasyLM import flags
from EasyLM.errors import UserError
from EasyLM.models.attention.sequence_split import heads_to_tokens, tokens_to_heads
from EasyLM.models.llama import costs, llama_model, llama_plan, training_task
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.parallel import BATCH_AXES, HEAD_AXES, batch_sharding, make_mesh, shardings

ROWS, LENGTH = 4, 32
SMALL = {"num_hidden_layers": 1, "attention_implementation": "xla"}  # compiles faster
DROPOUT = {"resid_pdrop": 0.1, "attn_pdrop": 0.1, "fcm_min_ratio": 0.1, "fcm_max_ratio": 0.3}
CHUNKS = {"scan_mlp": True, "scan_mlp_chunk_size": 24}


def batch_of(documents: bool) -> dict:
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, 512, (ROWS, LENGTH + 1)).astype(np.int32)
    masks_BT = (rng.random((ROWS, LENGTH)) < 0.7).astype(np.float32)
    masks_BT[0, :20] = 0  # as of padding
    batch = {"input_tokens": tokens_BT[:, :-1], "target_tokens": tokens_BT[:, 1:], "loss_masks": masks_BT}
    segments_BT = np.sort(rng.integers(0, 5, (ROWS, LENGTH)), axis=1).astype(np.int32)
    return batch | ({"segment_ids": segments_BT} if documents else {})


def params_of(config) -> dict:
    """Random parameters. Numpy needs no compilation."""
    rng, shapes = np.random.default_rng(1), jax.eval_shape(partial(llama_model.init_params, config), jax.random.key(0))
    return jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)


def test_devices_exchange_tokens_for_heads():
    mesh = make_mesh("dp:1,fsdp:2,mp:2,sp:2")
    x_BTHK = np.arange(2 * 6 * 8, dtype=np.float32).reshape(2, 6, 8, 1)
    split = jax.jit(partial(tokens_to_heads, mesh=mesh))(x_BTHK)
    np.testing.assert_array_equal(split, x_BTHK)
    assert split.sharding.is_equivalent_to(NamedSharding(mesh, P(BATCH_AXES, None, HEAD_AXES)), 4)
    np.testing.assert_array_equal(jax.jit(partial(heads_to_tokens, mesh=mesh))(split), x_BTHK)


@pytest.mark.slow
@pytest.mark.parametrize("mesh_dim, settings, documents, logits_tokens", [
    ("dp:1,fsdp:4,mp:1,sp:2", {"attention_implementation": "auto"}, True, 8192),
    ("dp:1,fsdp:2,mp:2,sp:2", {"num_key_value_heads": 2, "z_loss_weight": 1e-3}, False, 5),
    ("sp:4,dp:1,fsdp:2,mp:1", {"tie_word_embeddings": True, "scan_layers": False} | DROPOUT | CHUNKS, False, 8192),
])  # fmt: skip
def test_losses_and_gradients_are_those_of_whole_rows(monkeypatch, mesh_dim, settings, documents, logits_tokens):
    """With masked targets, grouped queries, documents, dropout, and all or few logits in memory."""
    monkeypatch.setattr(llama_model, "LOGITS_TOKENS", logits_tokens)
    config, mesh, batch = changed(**SMALL | settings), make_mesh(mesh_dim), batch_of(documents)
    params = params_of(config)

    def values(mesh, params, batch):
        loss_fn = llama_model.make_loss_fn(config, jnp.float32, mesh)
        return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch, jax.random.key(1))

    expected = values(None, params, batch)
    placed = jax.device_put(params, shardings(mesh, PARTITION_RULES, params))
    actual = values(mesh, placed, jax.device_put(batch, batch_sharding(mesh)))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), actual, expected)


@pytest.mark.slow
def test_logits_of_padded_rows_are_those_of_whole_rows():
    config, mesh = changed(**SMALL, num_key_value_heads=1), make_mesh("dp:1,fsdp:2,mp:1,sp:4")
    params = params_of(config)
    mask_BT = (np.arange(LENGTH) >= np.array([0, 5, 17, LENGTH - 1])[:, None]).astype(np.int32)
    logits_of = jax.jit(partial(llama_model.apply, config, attention_mask_BT=mask_BT), static_argnames="mesh")
    tokens_BT = batch_of(documents=False)["input_tokens"]
    placed = jax.device_put(params, shardings(mesh, PARTITION_RULES, params))
    np.testing.assert_allclose(logits_of(placed, tokens_BT, mesh=mesh), logits_of(params, tokens_BT), atol=1e-5)


@pytest.mark.parametrize("mesh_dim, length, message", [
    ("dp:1,fsdp:4,mp:1,sp:2", 127, "_dataset.json_dataset.seq_length=127: must be a multiple of 2, the mesh's sp"),
    ("dp:1,fsdp:1,mp:1,sp:8", 128, "--mesh_dim: sp=8: sp x mp must divide the model's 4 attention heads; with mp=1, sp "
     "may be 1, 2, 4"),
    ("dp:1,fsdp:1,mp:2,sp:4", 128, "with mp=2, sp may be 1, 2"),
    ("dp:1,fsdp:1,mp:4,sp:2", 128, "with mp=4, sp may be 1"),
])  # fmt: skip
def test_what_sp_does_not_divide_is_named(mesh_dim, length, message):
    config = flags.defaults(training_task.TRAIN_FLAGS).train_dataset
    config.json_dataset.seq_length = length
    with pytest.raises(UserError) as error:
        training_task.check_batch("train_dataset", config, changed(), make_mesh(mesh_dim))
    assert message in str(error.value)


@pytest.mark.slow
def test_the_plan_of_split_rows(tmp_path, capfd):
    """State and activations are split over all devices, which gather kernels and exchange tokens, and nothing else."""
    config = changed(**SMALL, hidden_size=128, intermediate_size=256)
    settings = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "attention_implementation"]
    arguments = [f"--llama.{name}={getattr(config, name)}" for name in settings]
    arguments += ["--topology=cpu:8", "--load_llama_config=vqlm_debug", "--mesh_dim=dp:1,fsdp:4,mp:1,sp:2"]
    arguments += ["--train_dataset.json_dataset.batch_size=8", "--train_dataset.json_dataset.seq_length=64"]
    planned = flags.parse(llama_plan.FLAGS, ["llama_plan", *arguments, f"--output_json={tmp_path / 'plan.json'}"])
    assert llama_plan.main(planned) == 0
    plan, text = json.loads((tmp_path / "plan.json").read_text()), "".join(capfd.readouterr())
    assert "mesh dp=1 fsdp=4 mp=1 sp=2" in text and "Involuntary full rematerialization" not in text
    assert plan["mesh"] == {"dp": 1, "fsdp": 4, "mp": 1, "sp": 2}
    sent = plan["collective_bytes"]
    block = costs.num_matmul_parameters(config) - config.hidden_size * config.vocab_size
    assert plan["state_bytes_per_device"] < 12 * (costs.num_parameters(config) / 8 + 3 * config.hidden_size) + 64
    # Arrays of all heads on a device: queries, keys, values and outputs, and their gradients.
    assert sent["all-to-all"] == 8 * 8 * 64 // 8 * config.hidden_size * 4
    # The block's kernels forward and backward, the head and the embedding once.
    assert sent["all-gather"] == 4 * (2 * block + 2 * config.hidden_size * config.vocab_size)
