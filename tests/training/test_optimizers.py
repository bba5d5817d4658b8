"""Every optimizer equals a plain optax chain with one tensor per layer; its state has the keys of the release."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from ml_collections import ConfigDict

from EasyLM import flags
from EasyLM.checkpoints.stacking import stacked_arrays
from EasyLM.errors import UserError
from EasyLM.training.optimizers import OPTIMIZER_FLAGS, make_optimizer

LAYERS = 3
MATRICES = {"wq": {"kernel": True}, "norm": {"kernel": False}}  # of a layer
SHAPES = {"wte": {"embedding": (7, 4)}, "h": {"wq": {"kernel": (LAYERS, 4, 4)}, "norm": {"kernel": (LAYERS, 4)}}}


def settings(type="adamw", accumulate=1, **values):
    config = flags.defaults(OPTIMIZER_FLAGS)
    config.type, config.accumulate_gradient_steps = type, accumulate
    small = {"lr": 0.01, "lr_warmup_steps": 2} | ({"lr_decay_steps": 6} if type != "palm" else {})
    config[f"{type}_optimizer"].update(small | values)
    return config


def random_tree(seed):
    rng = np.random.default_rng(seed)
    # Layers of different magnitudes: an optimizer that treats a stack as one tensor scales them alike.
    scale = np.array([0.01, 1.0, 20.0])
    tree = jax.tree.map(lambda shape: rng.normal(size=shape), SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    tree["h"] = jax.tree.map(lambda x: x * scale.reshape(-1, *(1,) * (x.ndim - 1)), tree["h"])
    return jax.tree.map(np.float32, tree)


def per_layer(tree):
    tree = jax.tree.map(np.asarray, tree)
    return {"wte": tree["wte"], "h": {str(i): jax.tree.map(lambda x, i=i: x[i], tree["h"]) for i in range(LAYERS)}}


def scheduled_decay(schedule):
    def update(updates, state, params):
        return jax.tree.map(lambda u, p: u + schedule(state) * p, updates, params), state + 1

    return optax.GradientTransformation(lambda params: jnp.int32(0), update)


def reference(config):
    """Returns the optimizer of the flags in plain optax, and its schedule."""
    c = config[f"{config.type}_optimizer"]
    mu_dtype = jnp.bfloat16 if c.bf16_momentum else jnp.float32
    if config.type == "palm":

        def schedule(t):
            return (c.lr / 0.01) / jnp.sqrt(jnp.maximum(t, c.lr_warmup_steps))

        decay = scheduled_decay(lambda t: -(c.weight_decay / 1e-4) * schedule(t) ** 2)
    else:
        schedule = optax.warmup_cosine_decay_schedule(c.init_lr, c.lr, c.lr_warmup_steps, c.lr_decay_steps, c.end_lr)
        decay = scheduled_decay(lambda t: -schedule(t) * c.weight_decay)
    matrices = {"wte": {"embedding": False}, "h": {str(i): MATRICES for i in range(LAYERS)}}
    if config.type == "muon":
        axes = jax.tree.map(lambda is_matrix: optax.contrib.MuonDimensionNumbers() if is_matrix else None, matrices)
        inner = optax.contrib.muon(
            schedule,
            beta=c.momentum,
            weight_decay=c.weight_decay,
            mu_dtype=mu_dtype,
            adam_b1=c.b1,
            adam_b2=c.b2,
            adam_weight_decay=0 if c.weight_decay_mask else c.weight_decay,
            muon_weight_dimension_numbers=axes,
            consistent_rms=0.2,
        )
        chain = optax.chain(optax.clip_by_global_norm(c.clip_gradient), inner)
    elif config.type == "palm" or c.multiply_by_parameter_scale:
        inner = optax.adafactor(
            schedule,
            multiply_by_parameter_scale=True,
            momentum=c.b1,
            dtype_momentum=mu_dtype,
            decay_rate=c.b2,
            factored=False,
            clipping_threshold=None,
        )
        decay = optax.masked(decay, matrices) if c.weight_decay_mask else decay
        chain = optax.chain(optax.clip_by_global_norm(c.clip_gradient), inner, decay)
    else:
        mask = matrices if c.weight_decay_mask else None
        inner = optax.adamw(schedule, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay, mu_dtype=mu_dtype, mask=mask)
        chain = optax.chain(optax.clip_by_global_norm(c.clip_gradient), inner)
    if config.accumulate_gradient_steps > 1:
        chain = optax.MultiSteps(chain, config.accumulate_gradient_steps)
    return chain, schedule


def compiled_step(optimizer):
    def step(gradients, state, params):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


@pytest.mark.parametrize(
    "config",
    [
        settings(weight_decay=0.1),
        settings(bf16_momentum=True),
        settings(multiply_by_parameter_scale=True, weight_decay=0.1),
        settings("palm", weight_decay=1e-3),
        settings("palm", accumulate=3),
        pytest.param(settings("palm", weight_decay=1e-3, weight_decay_mask=True), marks=pytest.mark.slow),
        settings(accumulate=3, weight_decay=0.1),
        pytest.param(settings(weight_decay=0.1, weight_decay_mask=True), marks=pytest.mark.slow),
        pytest.param(settings("muon", weight_decay=0.1), marks=pytest.mark.slow),
        settings("muon", accumulate=3, weight_decay=0.1, weight_decay_mask=True, bf16_momentum=True),
    ],
    ids=[
        "adamw",
        "adamw-bf16",
        "adamw-scaled",
        "palm",
        "palm-accumulated",
        "palm-mask",
        "adamw-accumulated",
        "adamw-mask",
        "muon",
        "muon-mask",
    ],
)
def test_equals_optax_layer_by_layer(config):
    optimizer = make_optimizer(config)
    expected, schedule = reference(config)
    params = random_tree(0)
    expected_params = per_layer(params)
    state, expected_state = jax.jit(optimizer.init)(params), jax.jit(expected.init)(expected_params)
    step, expected_step, rate = compiled_step(optimizer), compiled_step(expected), jax.jit(optimizer.learning_rate)
    for i in range(9):
        np.testing.assert_allclose(rate(state), schedule(i // config.accumulate_gradient_steps), rtol=1e-6)
        gradients = random_tree(i + 1)
        params, state = step(gradients, state, params)
        expected_params, expected_state = expected_step(per_layer(gradients), expected_state, expected_params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), per_layer(params), expected_params
    )


def keys_of(config):
    tree = {"params": {"transformer": jax.eval_shape(lambda: random_tree(0))}}
    state = jax.eval_shape(make_optimizer(config).init, tree)
    entries = {"/".join(file_key) for leaf in stacked_arrays(state) for file_key in leaf.file_keys}
    return {e.split("/params/")[0] for e in entries}, {leaf.key: leaf.file_shape for leaf in stacked_arrays(state)}


@pytest.mark.parametrize(
    "config, expected",
    [
        (settings(), "1/0/count 1/0/mu 1/0/nu 1/2/count"),
        (
            settings(accumulate=2),
            "mini_step gradient_step acc_grads inner_opt_state/1/0/count inner_opt_state/1/0/mu inner_opt_state/1/0/nu "
            "inner_opt_state/1/2/count",
        ),
        (settings("palm"), "1/0/count 1/0/v_row 1/0/v_col 1/0/v 1/1/count 1/3/count 1/3/ema 2/inner_state/count"),
    ],
    ids=["adamw", "accumulated", "palm"],
)
def test_state_has_the_keys_of_the_release(config, expected):
    keys, shapes = keys_of(config)
    assert keys == set(expected.split())
    assert all(shape == (1,) for key, shape in shapes.items() if "v_row" in key or "v_col" in key)


def test_bf16_momentum_applies_to_the_first_moment_only():
    state = make_optimizer(settings(bf16_momentum=True)).init(random_tree(0))
    assert {x.dtype.name for x in jax.tree.leaves(state[1][0].mu)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(state[1][0].nu)} == {"float32"}


@pytest.mark.parametrize(
    "config, message",
    [
        (
            settings(lr_decay_steps=2),
            "--optimizer.adamw_optimizer.lr_decay_steps=2: must be more than lr_warmup_steps=2",
        ),
        (settings(clip_gradient=0.0), "--optimizer.adamw_optimizer.clip_gradient=0.0: must be above 0"),
        (settings("palm", lr_warmup_steps=0), "--optimizer.palm_optimizer.lr_warmup_steps=0: must be at least 1"),
        (settings(b2=1.0), "--optimizer.adamw_optimizer.b2=1.0: must be above 0 and below 1"),
        (settings(accumulate=0), "--optimizer.accumulate_gradient_steps=0: must be at least 1"),
        (settings(lr=float("nan")), "--optimizer.adamw_optimizer.lr=nan: must be at least 0"),
    ],
)
def test_invalid_settings_are_named(config, message):
    with pytest.raises(UserError) as error:
        flags.validate({"optimizer": OPTIMIZER_FLAGS}, ConfigDict({"optimizer": config}))
        make_optimizer(config)
    assert str(error.value) == message
