"""Compares results on the device with references in float32 on the CPU.

Errors are norms of differences over norms of references. Tolerances: a bf16 product has an error of 1e-3 to 1e-2.
"""

import re
from collections.abc import Iterator
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from EasyLM.flags import Flag, defaults, run
from EasyLM.models.attention import AttentionMask, attention
from EasyLM.models.llama import llama_config, llama_model
from EasyLM.models.llama.llama_decode import LLaMADecoder
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.parallel import batch_sharding, make_mesh, shardings
from EasyLM.training import OPTIMIZER_FLAGS, make_optimizer, make_train_step, model_without_extra
from EasyLM.training.step import init_state, jit_train_step, state_shapes
from gpu_day.measure import emit, on_gpu, reason
from tokenizer.vqgan import Codec

FLAGS = {"tiny": Flag(False, "Use small sizes, for a test on a CPU.")}
HEAD_DIMS = (64, 96, 100, 128)
ATTENTION_ERROR, GRADIENT_ERROR, LOSS_ERROR = 0.02, 0.03, 0.005  # bf16
DECODE_ERRORS = {"float32": 1e-5, "bfloat16": 0.02}
LEAST_EQUAL_CODES = 0.9999  # the order of float32 sums changes a code at the boundary between two
KERNELS = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")


def main(config: ConfigDict) -> None:
    """Runs all checks. A check that raises an error fails, and the others run."""
    length = 200 if config.tiny else 600  # not a multiple of a kernel's tile, and no other dimension
    checks = {
        f"attention, head dimension {head_dim}, {'left-padded' if padded else 'no padding'}": partial(
            check_attention, head_dim, padded, length
        )
        for head_dim in (HEAD_DIMS[:1] if config.tiny else HEAD_DIMS)
        for padded in ((True,) if config.tiny else (False, True))
    }
    dimensions = (100,) if config.tiny else (64, 100)
    checks |= {f"train step, head dimension {dim}": partial(check_training, dim, config.tiny) for dim in dimensions}
    checks |= {
        f"decoding, {dtype}, {rows} rows": partial(check_decoding, dtype, rows)
        for dtype, rows in ((("float32", 1), ("bfloat16", 2)) if config.tiny else product(DECODE_ERRORS, (1, 2)))
    }
    checks |= {"codes of the shipped tokenizer": partial(check_codes, 64 if config.tiny else 256)}
    for name, check in checks.items():
        try:
            emit("correctness", name, **check())
        except Exception as error:  # the other checks are still of use
            emit("correctness", name, ok=False, error=reason(error))


def relative_error(actual: jax.Array, expected: jax.Array) -> float:
    """Returns the norm of the difference over the norm of the reference; NaN if a value is NaN."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def check_attention(head_dim: int, padded: bool, length: int) -> dict:
    """Compares attention and its gradients in bf16, as "auto" selects it, with the plain form in float32."""
    keys = jax.random.split(jax.random.key(head_dim), 4)
    arrays = [np.asarray(jax.random.normal(key, (2, length, 4, head_dim), jnp.bfloat16)) for key in keys]
    valid_BS = np.ones((2, length), np.int32)
    valid_BS[1, : length // 3] = 0
    mask = AttentionMask(valid_BS if padded else None)

    def with_gradients(q, k, v, weight, **how):
        out, pullback = jax.vjp(partial(attention, mask=mask, **how), q, k, v)
        return out, *pullback(weight)

    compiled = jax.jit(with_gradients).lower(*arrays).compile()
    with jax.default_device(jax.devices("cpu")[0]):
        plain = jax.jit(partial(with_gradients, platform="cpu", implementation="xla"))
        expected = plain(*(np.asarray(x, np.float32) for x in arrays))
    results = zip(("output", "dq", "dk", "dv"), compiled(*arrays), expected, strict=True)
    errors = {name: relative_error(x, y) for name, x, y in results}
    values = {"errors": errors, "tolerance": ATTENTION_ERROR, "ok": max_error(errors) <= ATTENTION_ERROR}
    text = compiled.as_text()
    if on_gpu():
        values["kernels"] = [name for name in KERNELS if f'"{name}"' in text]
        values["ok"] &= values["kernels"] == list(KERNELS)
    values["holds_matrix"] = bool(re.search(rf"\[[\d,]*{length},{length}\]", text))
    values["ok"] &= not values["holds_matrix"]
    return values


def max_error(errors: dict[str, float]) -> float:
    """Returns the largest error; infinity if one is NaN."""
    return max(float("inf") if np.isnan(error) else error for error in errors.values())


def check_training(head_dim: int, tiny: bool) -> dict:
    """Trains the same small model on the device in bf16 and on the CPU in float32: first gradients, then losses."""
    config = llama_config.updated(
        llama_config.load_config("vqlm_debug"), f"dict(hidden_size={4 * head_dim}, intermediate_size=1024)"
    )
    rows, length, steps = (2, 64, 2) if tiny else (4, 512, 10)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (steps, 2, rows, length)).astype(np.int32)
    batches = [
        {"input_tokens": x, "target_tokens": y, "loss_masks": np.ones((rows, length), np.float32)} for x, y in tokens
    ]
    device = run_steps(config, batches, jax.devices()[0], jnp.bfloat16)
    reference = run_steps(config, batches, jax.devices("cpu")[0], jnp.float32)
    gradient, losses = next(device), list(device)
    expected_gradient, expected_losses = next(reference), list(reference)
    errors = {name: relative_error(gradient[name], expected_gradient[name]) for name in gradient}
    worst = max(errors, key=lambda name: errors[name])
    loss_error = float(np.max(np.abs(np.array(losses) / expected_losses - 1)))
    return {
        "gradient_error": max_error(errors),
        "worst_gradient": worst,
        "gradient_tolerance": GRADIENT_ERROR,
        "loss_error": loss_error,
        "loss_tolerance": LOSS_ERROR,
        "first_and_last_loss": [losses[0], losses[-1]],
        "ok": max_error(errors) <= GRADIENT_ERROR and loss_error <= LOSS_ERROR,
    }


def run_steps(config: llama_config.LLaMAConfig, batches: list, device: jax.Device, dtype: jnp.dtype) -> Iterator:
    """Yields the first gradients by name, then the loss of each step of the trainer."""
    mesh = make_mesh("1,1,1", [device])
    optimizer_flags = defaults(OPTIMIZER_FLAGS)
    optimizer_flags.adamw_optimizer.update({"lr": 1e-3, "lr_warmup_steps": 4})
    optimizer = make_optimizer(optimizer_flags)
    model = model_without_extra(
        partial(llama_model.init_params, config), llama_model.make_loss_fn(config, dtype, mesh), PARTITION_RULES
    )
    places = shardings(mesh, PARTITION_RULES, state_shapes(model.init, optimizer))
    state = init_state(model.init, optimizer, 0, places)
    batches = [jax.device_put(batch, batch_sharding(mesh)) for batch in batches]

    def gradients(params, batch):
        return model.loss_and_gradients(params, {}, batch, 0, jax.random.key(0))[1]

    gradient = jax.jit(gradients)(state.params, batches[0])
    yield {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(gradient)}
    step = jit_train_step(make_train_step(model.loss_and_gradients, optimizer, 0), places, mesh)
    for batch in batches:
        state, metrics = step(state, batch)
        yield float(metrics["loss"])


def check_decoding(dtype: str, rows: int) -> dict:
    """Compares the logits of the key-value cache, fed with given tokens, with those of a forward pass.

    The last of several rows is padded. A single row has products of its own (`tuning.row_matmul`).
    """
    # With the usual range, attention is nearly uniform and hides wrong positions.
    config = llama_config.updated(
        llama_config.load_config("vqlm_debug"), "dict(hidden_size=256, initializer_range=0.05)"
    )
    params = jax.jit(partial(llama_model.init_params, config))(jax.random.key(0))
    prompt, new = 40, 12
    tokens_BT = jax.random.randint(jax.random.key(1), (rows, prompt + new), 0, config.vocab_size)
    mask_BT = None if rows == 1 else jnp.ones_like(tokens_BT).at[-1, :7].set(0)
    decoder = LLaMADecoder(config, jnp.dtype(dtype))
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        full = jax.jit(partial(llama_model.apply, config, dtype=decoder.dtype))
        expected_BTV = full(params, tokens_BT, attention_mask_BT=mask_BT)[:, prompt - 1 :]
        prefill = jax.jit(decoder.prefill, static_argnums=3)
        mask_BP = None if mask_BT is None else mask_BT[:, :prompt]
        logits_BV, prompt_cache = prefill(params, tokens_BT[:, :prompt], mask_BP, config.vocab_size)
        weights = jax.jit(decoder.prepare, static_argnums=1)(params, config.vocab_size)
        step, cache, logits = jax.jit(decoder.step), decoder.empty_cache(rows, 1, new), [logits_BV]
        for slot in range(new):
            logits_BCV, cache = step(weights, prompt_cache, cache, tokens_BT[:, prompt + slot, None], slot)
            logits.append(logits_BCV[:, 0])
    error = relative_error(jnp.stack(logits, 1), expected_BTV)
    return {"decode_error": error, "tolerance": DECODE_ERRORS[dtype], "ok": error <= DECODE_ERRORS[dtype]}


def check_codes(count: int) -> dict:
    """Compares the codes of an image on the device with those on the CPU, in float32."""
    rng = np.random.default_rng(0)
    coarse = rng.random((count, 4, 4, 3))  # random patches of colour with some noise
    pixels = np.kron(coarse, np.ones((1, 8, 8, 1))) * 0.8 + rng.random((count, 32, 32, 3)) * 0.2
    codes, expected = (
        Codec(batch_size=count, devices=[device]).encode(pixels.astype(np.float32))
        for device in (jax.devices()[0], jax.devices("cpu")[0])
    )
    equal = float(np.mean(codes == expected))
    used = len(np.unique(expected))  # few codes would say little
    return {"equal_share": equal, "tolerance": LEAST_EQUAL_CODES, "used_codes": used, "ok": equal >= LEAST_EQUAL_CODES}


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
