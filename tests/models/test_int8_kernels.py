"""int8 kernels: their error, their memory, and the perplexity of models that have them."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_kit import random_params

from EasyLM.models import generate
from EasyLM.models.llama import inference_model, int8_kernels, llama_model
from EasyLM.models.llama.llama_config import PRESETS, LLaMAConfig
from EasyLM.models.llama.llama_decode import LLaMADecoder, score
from EasyLM.models.sampling import Sampling
from EasyLM.parallel import make_mesh
from evaluation.prompting import Prompter, PrompterSettings, load_model
from evaluation.tasks import metrics
from tokenizer.media import images
from tokenizer.synthetic import scenes

DEMO = str(pathlib.Path(__file__).parents[2] / "evaluation" / "demo_model")
CONFIG = LLaMAConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)


def quantized(params):
    """Parameters with separate layers, whose kernels are int8."""

    def of(tree):
        if set(tree) == {"kernel"} and tree["kernel"].ndim == 2:
            return dict(zip(("kernel", "scale"), int8_kernels.quantize(np.asarray(tree["kernel"])), strict=True))
        return {name: of(branch) if isinstance(branch, dict) else branch for name, branch in tree.items()}

    transformer = params["params"]["transformer"]
    return {"params": {**params["params"], "transformer": {**transformer, "h": of(transformer["h"])}}}


def dequantized(params):
    def of(tree):
        if "scale" in tree:
            return {"kernel": tree["kernel"].astype(np.float32) * tree["scale"]}
        return {name: of(branch) if isinstance(branch, dict) else branch for name, branch in tree.items()}

    return of(params)


def test_each_output_has_its_scale():
    kernel_IO = np.random.default_rng(0).normal(size=(1100, 6)).astype(np.float32) * [1, 10, 1e-3, 5, 0, 1e4]
    integers_IO, scale_O = int8_kernels.quantize(kernel_IO.astype(np.float32))
    assert integers_IO.dtype == np.int8 and scale_O.dtype == np.float32
    assert np.abs(integers_IO.astype(int)).max(0).tolist() == [127, 127, 127, 127, 0, 127]
    assert (np.abs(integers_IO * scale_O - kernel_IO) <= 0.501 * scale_O).all()


@pytest.mark.slow
def test_every_path_computes_with_the_rounded_kernels(tmp_path):
    """Prompt, decoding and scores, loaded from a file, equal those of a float32 model with the rounded kernels."""
    random_params(tmp_path, CONFIG)
    mesh = make_mesh("2,2,2")
    config, params = load_model(f"params::{tmp_path}/streaming_params", "", mesh, jnp.float32, int8=True)
    expected = dequantized(jax.device_get(params))
    kernels = params["params"]["transformer"]["h"]["1"]["feed_forward"]
    assert kernels["w1"]["kernel"].dtype == jnp.int8 and params["params"]["lm_head"]["kernel"].dtype == jnp.float32
    rows_BT = np.random.default_rng(0).integers(0, 500, (8, 40))
    got, want = (score(config, p, rows_BT, 16, mesh=m)[0] for p, m in ((params, mesh), (expected, None)))
    np.testing.assert_allclose(got, want, atol=1e-4)
    how = {"num_new_tokens": 12, "num_candidates": 2, "temperature": 0.0, "allowed_ids": 500}
    got, want = (
        generate.generate(LLaMADecoder(config, mesh=m), p, rows_BT[:, :24], **how)
        for p, m in ((params, mesh), (expected, None))
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_perplexity_of_the_demonstration_model_is_within_1_percent_of_bf16():
    """Of depths after their images, with two examples before."""
    rendered = [scenes.scene(seed, 32) for seed in range(24)]
    images_BPSS3 = np.stack([image for scene in rendered for image in (scene["image"], scene["depth"])])
    images_BPSS3 = images.to_float32(images_BPSS3.reshape(8, 6, 32, 32, 3))
    perplexities = []
    for weights in ("dtype", "int8"):
        prompter = Prompter.load(PrompterSettings(DEMO, dtype="bf16", weights=weights, mesh_dim="8,1,1"))
        tokens_BPN = prompter.encode(images_BPSS3)
        log_p_BT = prompter.log_likelihoods(tokens_BPN[:, :5], tokens_BPN[:, 5:])
        perplexities.append(float(metrics.perplexity(log_p_BT).mean()))
    bf16, int8 = perplexities
    assert 2 < bf16 < 200, "the model knows the task"
    assert int8 != bf16 and int8 == pytest.approx(bf16, rel=0.01)


@pytest.mark.slow
def test_perplexity_of_a_random_model_is_within_1_percent_of_bf16():
    """vqlm_100m, of full depth; of tokens that the float32 model draws."""
    config = PRESETS["vqlm_100m"]
    params = inference_model.separate_layers(
        jax.jit(llama_model.init_params, static_argnums=0)(config, jax.random.key(0)), config.num_hidden_layers
    )
    params["params"]["lm_head"]["kernel"] *= 5  # otherwise all tokens are almost equally likely
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 64), 0, 8192)

    @functools.partial(jax.jit, static_argnums=1)
    def log_p_BTV(params, dtype):
        model = inference_model.with_params(config, params, dtype)
        hidden_BTD = model(tokens_BT, None, None).hidden
        return jax.nn.log_softmax(llama_model.logits(hidden_BTD, model.head).astype(jnp.float32))

    p_BTV = jnp.exp(log_p_BTV(params, jnp.float32))
    bf16, int8 = (
        float(jnp.exp(-(p_BTV * log_p_BTV(weights, jnp.bfloat16)).sum(-1).mean()))
        for weights in (params, quantized(params))
    )
    assert 2 < bf16 < 1000, "the model prefers some tokens"
    assert int8 != bf16 and int8 == pytest.approx(bf16, rel=0.01)


@pytest.mark.slow
def test_decoding_holds_the_kernels_as_int8():
    """No copy of all kernels in another type lies before the loop over tokens."""
    config = LLaMAConfig(
        vocab_size=64, hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=4
    )
    params = inference_model.parameter_shapes(config, jnp.float32, int8=True)
    decoder, prompt = LLaMADecoder(config), jax.ShapeDtypeStruct((1, 8), jnp.int32)
    weights = jax.eval_shape(lambda params: decoder.prepare(params, 64), params)
    _, prompt_cache = jax.eval_shape(lambda *x: decoder.prefill(*x, None, 64), params, prompt)
    cache = jax.eval_shape(lambda: decoder.empty_cache(1, 1, 16))
    tokens = jax.ShapeDtypeStruct((1, 1, 16), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (1, 1)))
    compiled = generate._decode.lower(
        decoder, weights, prompt_cache, cache, tokens, 1, 9, Sampling(1.0), keys
    ).compile()
    kernels = sum(x.size for x in jax.tree.leaves(weights) if x.dtype == jnp.int8)
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes < 1.2 * kernels
    assert memory.temp_size_in_bytes < 0.5 * 4 * kernels, "most kernels are in float32"
