"""Models of transformers with each backbone's features: imported, trained and exported, beside torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_kit import make_checkpointer
from convert_kit import export, import_, torch_logits, torch_model
from tiny_run import train

from EasyLM import checkpoints
from EasyLM.models.llama import hf_layout, llama_config, llama_model

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.15}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
MODELS = {  # grouped queries in both
    "Llama": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "Qwen3": {"rope_parameters": {"rope_theta": 500.0}, "tie_word_embeddings": False},  # with QK-norm
}
TOKENS_BT = np.random.default_rng(0).integers(0, 512, (2, 61)).astype(np.int32)


@pytest.fixture(scope="module", params=MODELS)
def theirs(request, tmp_path_factory):
    """The directory of a model of transformers, random, with norms that are not 1."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp(request.param)
    config = getattr(transformers, f"{request.param}Config")(**SIZES, **HEADS, **MODELS[request.param])
    model = getattr(transformers, f"{request.param}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return directory


def loaded(spec):
    """Returns the settings and the parameters of PREFIX::PATH."""
    config = llama_config.recorded_config(*spec.split("::"))
    return config, checkpoints.load(spec, hf_layout.parameter_shapes(config), hf_layout.CHECKPOINT_FORMATS)


def exported_arrays(config, tree, directory) -> dict[str, np.ndarray]:
    """Returns a tree of parameters, or of their gradients, as the arrays of transformers' model."""
    saver = make_checkpointer(directory / "run", "fp32", save_optimizer_state=False)
    metadata = checkpoints.make_metadata(0, {}, llama_config=dataclasses.asdict(config))
    saver.save(type("State", (), {"params": tree}), 0, {}, metadata)
    saver.wait()
    model = torch_model(export(f"params::{directory}/run/streaming_params", directory / "hf"))
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def test_the_loss_and_its_gradients_are_those_of_torch(theirs, tmp_path):
    config, params = loaded(f"huggingface::{theirs}")
    batch = {"input_tokens": TOKENS_BT[:, :-1], "target_tokens": TOKENS_BT[:, 1:]}
    batch["loss_masks"] = np.ones((2, 60), np.float32)
    loss_fn = jax.jit(jax.value_and_grad(llama_model.make_loss_fn(config, jnp.float32), has_aux=True))
    (loss, _), gradients = loss_fn(params, batch, None)
    model, tokens_BT = torch_model(theirs), torch.tensor(TOKENS_BT, dtype=torch.long)
    expected = model(tokens_BT, labels=tokens_BT).loss  # of the next tokens
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), atol=2e-5, rtol=0)
    actual = exported_arrays(config, jax.device_get(gradients), tmp_path)
    assert actual.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        scale = np.abs(parameter.grad.numpy()).max()
        np.testing.assert_allclose(actual[name], parameter.grad.numpy(), atol=2e-5 * scale, rtol=0, err_msg=name)


def test_a_trained_model_has_the_logits_of_transformers(theirs, tmp_path):
    import_(theirs, tmp_path / "ours" / "params")
    run_dir = train(
        tmp_path,
        load_checkpoint=f"params::{tmp_path}/ours/params",
        load_llama_config="",
        update_llama_config="",
        total_steps=4,
        save_model_freq=4,
        train_dataset__json_dataset__seq_length=64,
        optimizer__adamw_optimizer__lr_warmup_steps=0,
    )
    spec = f"trainstate_params::{run_dir}/streaming_train_state"
    directory = export(spec, tmp_path / "hf")
    logits_BTV = llama_model.apply(*loaded(spec), TOKENS_BT)
    expected_BTV = torch_logits(directory, TOKENS_BT)
    assert np.abs(expected_BTV - torch_logits(theirs, TOKENS_BT)).max() > 0.1
    np.testing.assert_allclose(logits_BTV, expected_BTV, atol=2e-5, rtol=0)
