"""The wsd schedule, the moving average of the weights, the decay mask, and the state of muon on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_kit import assert_equal, make_checkpointer
from jax.sharding import PartitionSpec as P
from llama_kit import changed
from tiny_run import TINY, train

from EasyLM import checkpoints, flags
from EasyLM.errors import UserError
from EasyLM.models.llama import hf_layout, llama_config
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.parallel import SHARD_AXES
from EasyLM.parallel.partition import match_partition_rules
from EasyLM.training import OPTIMIZER_FLAGS, TrainState, make_optimizer


def settings(type="adamw", ema_decay=0.0, accumulate=1, **values):
    config = flags.defaults(OPTIMIZER_FLAGS)
    config.type, config.ema_decay, config.accumulate_gradient_steps = type, ema_decay, accumulate
    config[f"{type}_optimizer"].update({"lr": 0.8, "lr_warmup_steps": 4, "lr_decay_steps": 20} | values)
    return config


@pytest.mark.parametrize("type", ["adamw", "muon"])
def test_wsd_warms_up_stays_and_decays(type):
    optimizer = make_optimizer(settings(type, schedule="wsd", wsd_decay_steps=10, init_lr=0.2, end_lr=0.1))
    expected = [0.2 + 0.15 * t for t in range(4)] + [0.8] * 6 + [0.8 - 0.07 * t for t in range(10)] + [0.1] * 5
    state = optimizer.init({"w": jnp.zeros(2)})
    is_schedule = {"is_leaf": lambda x: isinstance(x, optax.ScaleByScheduleState)}

    def at(t):
        return jax.tree.map(lambda x: x._replace(count=t) if is_schedule["is_leaf"](x) else x, state, **is_schedule)

    rates = [optimizer.learning_rate(at(jnp.int32(t))) for t in range(25)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_a_decay_that_overlaps_the_warm_up_is_refused():
    with pytest.raises(UserError, match=r"muon_optimizer.wsd_decay_steps=17: must be at most 16, lr_decay_steps - lr_"):
        make_optimizer(settings("muon", schedule="wsd", wsd_decay_steps=17))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_follows_the_parameters(accumulate):
    optimizer = make_optimizer(settings(ema_decay=0.75, accumulate=accumulate, clip_gradient=1e6))
    params = {"w": jnp.arange(3.0)}
    state, average = optimizer.init(params), params
    update = jax.jit(optimizer.update)
    for step in range(8):
        updates, state = update({"w": jnp.float32([1, -2, step])}, state, params)
        params = optax.apply_updates(params, updates)
        if (step + 1) % accumulate == 0:  # average = 0.75 average + 0.25 parameters
            average = optax.incremental_update(params, average, 0.25)
        inner = state.inner_opt_state if accumulate > 1 else state
        np.testing.assert_allclose(inner[1].ema_params["w"], average["w"], rtol=1e-6)
    assert np.abs(average["w"] - params["w"]).max() > 0.1


def test_the_average_is_a_checkpoint_of_parameters(tmp_path):
    params = {"params": {"transformer": {"h": {"w": np.ones((2, 3, 4), np.float32)}, "ln_f": np.ones(5, np.float32)}}}
    for name, decay in (("with", 0.5), ("without", 0.0)):
        opt_state = make_optimizer(settings(ema_decay=decay)).init(params)
        state = TrainState(jnp.int32(1), jax.tree.map(lambda x: 3 * x, params), opt_state)
        saver = make_checkpointer(tmp_path / name)
        saver.save(state, 1, {}, {"flags": {}})
        saver.wait()
    path = "streaming_train_state"
    assert_equal(checkpoints.load(f"trainstate_ema::{tmp_path}/with/{path}", params), params)
    with pytest.raises(UserError, match=r"holds no average of the parameters; train with --optimizer.ema_decay"):
        checkpoints.load(f"trainstate_ema::{tmp_path}/without/{path}", params)


def test_the_state_of_muon_is_sharded_like_its_parameters():
    shapes = hf_layout.parameter_shapes(llama_config.load_config("vqlm_debug"))
    state = jax.eval_shape(make_optimizer(settings("muon", ema_decay=0.9)).init, shapes)
    specs = match_partition_rules(PARTITION_RULES, state)
    flat = {jax.tree_util.keystr(path): spec for path, spec in jax.tree_util.tree_leaves_with_path(specs)}
    assert [spec for name, spec in flat.items() if "ns_coeffs" in name] == [P()]
    matrices = [spec for name, spec in flat.items() if "['wq']" in name]
    assert matrices == [P(None, SHARD_AXES, "mp")] * 2  # the momentum and the average; no second moment
    assert len([name for name in flat if "['embedding']" in name]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("type", ["adamw", "palm", "muon"])
@pytest.mark.parametrize("mask", [True, False])
def test_the_decay_mask_spares_the_norms_and_the_embedding_of_a_model(type, mask):
    """Without gradients, an update is the decay alone."""
    config = changed(qk_norm=True)
    options = flags.defaults(OPTIMIZER_FLAGS)
    options.type = type
    decay = 1e-6 if type == "palm" else 0.1  # PaLM's rate is large
    options[f"{type}_optimizer"].update(lr=0.01, lr_warmup_steps=1, weight_decay=decay, weight_decay_mask=mask)
    optimizer, shapes = make_optimizer(options), hf_layout.parameter_shapes(config)

    @jax.jit
    def decayed():
        params, zeros = (jax.tree.map(lambda x, value=value: jnp.full(x.shape, value), shapes) for value in (1.0, 0.0))
        state = optimizer.init(params)
        for _ in range(2):  # adamw starts with a rate of 0
            updates, state = optimizer.update(zeros, state, params)
            params = optax.apply_updates(params, updates)
        return params

    after = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(decayed())}
    spared = {name for name, x in after.items() if (x == 1).all()}
    assert all((x < 1).all() for name, x in after.items() if name not in spared)
    norms = {name for name in after if "norm" in name or "ln_f" in name or "wte" in name}
    assert len(norms) == 6 and len(after) == 14
    assert spared == (norms if mask else set())


def test_an_average_that_would_not_be_saved_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"ema_decay=0.9: .* needs --checkpointer.save_optimizer_state=True"):
        train(tmp_path, optimizer__ema_decay=0.9, checkpointer__save_optimizer_state=False)
    assert TINY["checkpointer.save_optimizer_state"] and not list(tmp_path.iterdir())
