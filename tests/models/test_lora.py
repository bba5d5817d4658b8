"""Low-rank adapters: their function and gradients, runs that train them, and their export."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_kit import export, torch_logits
from hub_kit import connected_hub
from llama_kit import stacked
from tiny_run import GOLDEN, MODEL_METRICS, assert_close, metrics, train

from EasyLM import checkpoints
from EasyLM.errors import UserError
from EasyLM.models.llama import adapters, hf_layout, llama_model
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.models.llama.lora import LoRAConfig
from EasyLM.models.llama.lora_checkpoint import RecordedLoRA, write_peft
from EasyLM.parallel import make_mesh
from evaluation.prompting import load_model

ORIGIN = f"trainstate_params::{GOLDEN}/final/streaming_train_state"
CONFIG = LLaMAConfig(
    vocab_size=8448, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, remat_block=""
)
LORA = LoRAConfig(rank=4, alpha=6.0, dropout=0.0, targets=("q_proj", "v_proj", "o_proj", "down_proj"))
TOKENS_BT = np.random.default_rng(0).integers(0, 8192, (2, 12))


def frozen(seed: int) -> dict:
    return jax.jit(llama_model.init_params, static_argnums=0)(CONFIG, jax.random.key(seed))


def drawn(seed: int) -> tuple[dict, dict]:
    """Frozen parameters, and adapters of which no matrix is 0."""
    shapes = adapters.adapter_shapes(CONFIG, LORA)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    values = [0.2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return frozen(seed), jax.tree.unflatten(tree, values)


def block(tree: dict, room: str, layer: str) -> dict:
    return tree["params"]["transformer"]["h"][room][layer]


def merged(params: dict, drawn_adapters: dict) -> dict:
    """Frozen parameters with W + 1.5 A B in place of W."""
    params = jax.tree.map(lambda array: array, params)
    for room, layer in (("attention", "wq"), ("attention", "wv"), ("attention", "wo"), ("feed_forward", "w2")):
        matrices = block(drawn_adapters, room, layer)["adapter"]
        added = 1.5 * jnp.einsum("LIR,LRO->LIO", matrices["lora_a"], matrices["lora_b"], precision="highest")
        block(params, room, layer)["kernel"] += added
    return params


@functools.partial(jax.jit, static_argnames="lora")  # one operation at a time, it would take seconds
def logits(params: dict, lora: LoRAConfig | None = None) -> jax.Array:
    return llama_model.apply(CONFIG, params, TOKENS_BT, lora=lora)


@pytest.mark.slow
def test_adapters_add_the_scaled_product_of_their_matrices():
    params, drawn_adapters = drawn(0)
    actual = logits(adapters.with_adapters(params, drawn_adapters), LORA)
    np.testing.assert_allclose(actual, logits(merged(params, drawn_adapters)), atol=2e-5)
    assert np.abs(actual - logits(params)).max() > 0.1


def test_new_adapters_change_nothing_and_have_the_bound_of_peft():
    params, new = frozen(0), jax.jit(adapters.init_adapters, static_argnums=(0, 1))(CONFIG, LORA, jax.random.key(5))
    np.testing.assert_array_equal(logits(adapters.with_adapters(params, new), LORA), logits(params))
    a_LIR = block(new, "feed_forward", "w2")["adapter"]["lora_a"]
    assert a_LIR.shape == (3, 48, 4)
    assert 0.95 / 48**0.5 < np.abs(a_LIR).max() <= 1 / 48**0.5
    assert not np.array_equal(a_LIR[0], a_LIR[1])


@pytest.mark.slow
def test_gradients_are_those_of_the_merged_kernels():
    """With W' = W + s A B: dA = s dW' B^T, and dB = s A^T dW'."""
    params, drawn_adapters = drawn(1)
    batch = {"input_tokens": TOKENS_BT, "target_tokens": TOKENS_BT[:, ::-1], "loss_masks": np.ones((2, 12), np.float32)}
    model = adapters.make_model(CONFIG, LORA, jnp.float32)

    @jax.jit
    def loss_and_gradients(drawn_adapters, params):
        loss, gradients, _, untouched = model.loss_and_gradients(drawn_adapters, params, batch, 0, None)
        assert untouched is params
        return loss, gradients

    loss, gradients = loss_and_gradients(drawn_adapters, params)
    full_loss = llama_model.make_loss_fn(CONFIG, jnp.float32)
    whole = jax.jit(jax.value_and_grad(full_loss, has_aux=True))
    (expected, _), full = whole(merged(params, drawn_adapters), batch, None)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for room, layer in (("attention", "wq"), ("feed_forward", "w2")):
        dw = block(full, room, layer)["kernel"]
        a, b = (block(drawn_adapters, room, layer)["adapter"][name] for name in ("lora_a", "lora_b"))
        actual = block(gradients, room, layer)["adapter"]
        np.testing.assert_allclose(actual["lora_a"], 1.5 * jnp.einsum("LIO,LRO->LIR", dw, b), atol=1e-6)
        np.testing.assert_allclose(actual["lora_b"], 1.5 * jnp.einsum("LIR,LIO->LRO", a, dw), atol=1e-6)


@pytest.mark.slow
def test_dropout_needs_a_key_and_differs_between_layers_with_one_input():
    params, drawn_adapters = drawn(2)
    lora = dataclasses.replace(LORA, dropout=0.5)
    both = adapters.with_adapters(params, drawn_adapters)
    np.testing.assert_array_equal(logits(both, lora), logits(both, LORA))

    noisy = jax.jit(lambda key: llama_model.apply(CONFIG, both, TOKENS_BT, lora=lora, key=key))
    one, other = (noisy(jax.random.key(seed)) for seed in (0, 1))
    assert np.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(noisy(jax.random.key(0)), one)


@pytest.mark.parametrize("targets", ["", "q_proj,query", "all"])
def test_unknown_targets_are_named_with_the_choices(targets):
    with pytest.raises(UserError, match=rf"--lora.targets={targets}: .*; choose from q_proj, .*, up_proj"):
        LoRAConfig.from_flags({"rank": 4, "alpha": 0.0, "dropout": 0.0, "targets": targets})


def test_flags_give_the_defaults_of_the_settings():
    flags = {"rank": 8, "alpha": 0.0, "dropout": 0.0, "targets": "v_proj, q_proj,v_proj"}
    lora = LoRAConfig.from_flags(flags)
    assert lora == LoRAConfig(8, 16.0, 0.0, ("q_proj", "v_proj")) and lora.scale == 2
    assert LoRAConfig.from_flags(flags | {"rank": 0}) is None


def train_adapters(output_dir, **settings):
    data = output_dir / "one_sentence.jsonl"
    data.write_text((GOLDEN / "dataset.jsonl").read_text().partition("\n")[0] + "\n")
    defaults = {
        "load_checkpoint": ORIGIN,
        "lora__rank": 4,
        "load_llama_config": "",
        "update_llama_config": "",
        "total_steps": 20,
        "save_model_freq": 9,
        "optimizer__adamw_optimizer__lr": 2e-2,
        "train_dataset__json_dataset__path": str(data),
    }
    return train(output_dir, **defaults | settings)


def saved_params(run_dir) -> dict:
    return checkpoints.load(f"trainstate_params::{run_dir}/streaming_train_state")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 20 steps."""
    return train_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.mark.slow
def test_a_run_learns_and_saves_the_adapters_alone(trained):
    losses = [loss for (loss,) in metrics(trained, "loss").values()]
    assert losses[-1] < losses[0] - 0.1
    names = {
        entry.key[-1] for entry in checkpoints.open_checkpoint(f"trainstate_params::{trained}/streaming_train_state")
    }
    assert names == {"lora_a", "lora_b"}


@pytest.mark.slow
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(trained, tmp_path):
    train_adapters(tmp_path, total_steps=9)
    run_dir = train_adapters(tmp_path)
    assert metrics(run_dir, *MODEL_METRICS) == metrics(trained, *MODEL_METRICS)
    jax.tree.map(np.testing.assert_array_equal, saved_params(run_dir), saved_params(trained))


@pytest.mark.slow
def test_every_mesh_gives_the_same_losses(trained, tmp_path):
    other = train_adapters(tmp_path, mesh_dim="2,1,4")
    assert_close(metrics(other, *MODEL_METRICS), metrics(trained, *MODEL_METRICS), 1e-4)


@pytest.mark.slow
def test_merged_adapters_are_the_same_model_in_evaluation_and_export(trained, tmp_path):
    spec = f"trainstate_params::{trained}/streaming_train_state"
    config, params = load_model(spec, "", make_mesh("1,1,1", jax.devices()[:1]))
    params = stacked(params)
    exported = export(spec, tmp_path / "hf", merge_lora=True)
    loaded = checkpoints.load(f"huggingface::{exported}", None, hf_layout.CHECKPOINT_FORMATS)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), loaded)
    tokens_BT = TOKENS_BT % config.vocab_size
    recorded = json.loads((trained / "metadata.json").read_text())["llama_config"]["lora"]
    lora = LoRAConfig(**recorded | {"targets": tuple(recorded["targets"])})
    frozen = checkpoints.load(ORIGIN)
    both = adapters.with_adapters(frozen, saved_params(trained))
    expected = llama_model.apply(config, both, tokens_BT, lora=lora)
    np.testing.assert_allclose(llama_model.apply(config, params, tokens_BT), expected, atol=2e-5)


@pytest.mark.slow
def test_the_peft_library_loads_the_exported_adapters(trained, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    from convert_kit import torch_model

    spec = f"trainstate_params::{trained}/streaming_train_state"
    base, directory = export(ORIGIN, tmp_path / "base", model_size=""), export(spec, tmp_path / "adapters")
    merged_directory = export(spec, tmp_path / "merged", merge_lora=True)
    model = peft.PeftModel.from_pretrained(torch_model(base), directory).eval()
    tokens_BT = TOKENS_BT % 512
    with torch.no_grad():
        actual = model(torch.tensor(tokens_BT)).logits.numpy()
    np.testing.assert_allclose(actual, torch_logits(merged_directory, tokens_BT), atol=2e-5)
    assert np.abs(actual - torch_logits(base, tokens_BT)).max() > 1e-2


@pytest.mark.slow
def test_uploaded_adapters_do_not_name_the_folder_of_their_base(trained, tmp_path, monkeypatch):
    """Those on a disk do: PEFT finds the base by its path."""
    spec, card = f"trainstate_params::{trained}/streaming_train_state", "---\nlicense: mit\n---\nmine"
    for directory, push_to_hub, base in (
        ("local", "", ORIGIN.partition("::")[2]),
        ("uploaded", "Owner/adapters", "streaming_train_state"),
    ):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "README.md").write_text(card)
        with connected_hub(monkeypatch, tmp_path) as hub:
            export(spec, tmp_path / directory, push_to_hub=push_to_hub)
        settings = json.loads((tmp_path / directory / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == base
        assert (tmp_path / directory / "README.md").read_text() == card
    assert set(hub.repositories["Owner/adapters"]) >= {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("base", "name", "revision"),
    [
        ("Owner/lvm@v2", "Owner/lvm", "v2"),
        ("Owner/lvm", "Owner/lvm", None),
        ("here/lvm@v2", "here/lvm@v2", None),
        ("/home/me/lvm@v2", "/home/me/lvm@v2", None),
        ("Owner/lvm@v2/small", "Owner/lvm@v2/small", None),  # PEFT knows no folders
    ],
)
def test_peft_is_told_the_revision_of_a_base_on_the_hub(tmp_path, monkeypatch, base, name, revision):
    (tmp_path / "here" / "lvm@v2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    write_peft(str(tmp_path), CONFIG, RecordedLoRA(LORA, f"huggingface::{base}"), [], base)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == (name, revision)


def test_adapters_need_frozen_parameters(tmp_path):
    with pytest.raises(UserError, match=r"--lora.rank=4: needs --load_checkpoint"):
        train_adapters(tmp_path, load_checkpoint="")
    with pytest.raises(UserError, match="use trainstate_params::"):
        train_adapters(tmp_path, load_checkpoint=ORIGIN.replace("trainstate_params", "trainstate"))


@pytest.mark.slow
def test_other_adapters_and_whole_parameters_do_not_resume_a_run(trained):
    with pytest.raises(UserError, match=r"lora=.*'rank': 8.* \(saved: .*'rank': 4"):
        train_adapters(trained.parent, lora__rank=8)
    with pytest.raises(UserError, match=r"--lora.rank=0: .* holds adapters of rank 4"):
        train_adapters(trained.parent, lora__rank=0)


def test_merging_a_checkpoint_without_adapters_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--merge_lora=True: .* holds no adapters"):
        export(ORIGIN, tmp_path / "hf", merge_lora=True)
