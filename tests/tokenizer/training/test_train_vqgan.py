"""Training a tokenizer through the shared loop: it learns, revives codes, resumes exactly and leaves a usable model."""

import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_run import await_figures, finish
from tokenizer_kit import run_main, write_image

from EasyLM import checkpoints
from EasyLM.errors import UserError
from EasyLM.training import batches
from tokenizer import train_vqgan
from tokenizer.image_quality import lpips
from tokenizer.training import losses
from tokenizer.vqgan import Codec, weights
from tokenizer.vqgan.config import VQGANConfig

SMALLEST = {
    "vqgan__resolution": 8,
    "vqgan__hidden_channels": 4,
    "vqgan__channel_mult": "1",
    "vqgan__num_res_blocks": 1,
    "vqgan__resample_with_conv": False,
    "vqgan__norm_groups": 2,
    "vqgan__z_channels": 4,
    "vqgan__quantized_embed_dim": 4,
    "vqgan__num_embeddings": 16,
}


ADVERSARY = {"weight": 0.5, "start_step": 4, "channels": 4, "layers": 1}
ADVERSARY = {f"adversary__{name}": value for name, value in ADVERSARY.items()}


def train(folder, name, **settings):
    """Figures of each step of a run."""
    defaults = {"total_steps": 12, "lr_warmup_steps": 2, "log_freq": 1, "save_model_freq": 5, "batch_size": 8}
    defaults |= {"input_dirs": str(folder / "pictures"), "lr": 2e-3}
    run_main(
        train_vqgan,
        logger__output_dir=str(folder),
        logger__experiment_id=name,
        **{**defaults, **SMALLEST, **settings},
    )
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows}


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        write_image(tmp_path / "pictures" / f"{i}.png", i, 8)
    return tmp_path


@pytest.mark.slow
def test_learns_resumes_exactly_and_leaves_a_model(folder, monkeypatch):
    whole = train(folder, "whole", **ADVERSARY)
    assert whole[11]["loss"] < 0.8 * whole[0]["loss"]

    original = train_vqgan.run.fit

    def stopped(state, step, batches, settings, **rest):
        return original(state, step, batches, train_vqgan.dataclasses.replace(settings, total_steps=5), **rest)

    monkeypatch.setattr(train_vqgan.run, "fit", stopped)
    train(folder, "parts", **ADVERSARY)
    monkeypatch.undo()
    parts = train(folder, "parts", **ADVERSARY)
    figures = ("loss", "psnr", "gradient_norm", "param_norm", "learning_rate", "code_perplexity", "discriminator")
    assert [{k: whole[i][k] for k in figures} for i in range(12)] == [
        {k: parts[i][k] for k in figures} for i in range(12)
    ]
    one, other = (weights.load(folder / name / "vqgan") for name in ("whole", "parts"))
    for (path, a), (_, b) in zip(weights.flat_parameters(one), weights.flat_parameters(other), strict=True):
        np.testing.assert_array_equal(a.get_value(), b.get_value(), err_msg=str(path))
    pixels = np.zeros((2, 8, 8, 3), np.float32)
    codec = Codec(str(folder / "whole" / "vqgan"))
    assert codec.decode(codec.encode(pixels)).shape == pixels.shape
    assert (folder / "whole" / "reconstructions.png").exists()


def test_rows_are_a_function_of_their_number(folder):
    source = train_vqgan.PictureRows(str(folder / "pictures"), "input_dirs", 8, seed=3)
    rows = source.rows(0, 18)["pixels"]
    np.testing.assert_array_equal(rows[4:9], source.rows(4, 5)["pixels"])
    epochs = [{row.tobytes() for row in rows[start : start + 6]} for start in (0, 6, 12)]
    assert len(epochs[0]) == 6 and epochs[0] == epochs[1] == epochs[2]
    assert not np.array_equal(rows[:6], rows[6:12])


def test_a_run_does_not_resume_on_other_images(folder):
    """The same number of images in the same folder; modification times do not count."""

    def source():
        return train_vqgan.PictureRows(str(folder / "pictures"), "input_dirs", 8, seed=3)

    before = batches.dataset_state(source(), 4)
    file = folder / "pictures" / "2.png"
    data = file.read_bytes()
    os.utime(file, (1, 1))
    assert batches.rows_consumed(before, source()) == 4
    file.write_bytes(data + b"more")
    with pytest.raises(UserError, match="is of other data or another order: names_and_sizes changed"):
        batches.rows_consumed(before, source())
    file.write_bytes(data)
    file.rename(folder / "pictures" / "9.png")
    with pytest.raises(UserError, match="is of other data or another order: names_and_sizes changed"):
        batches.rows_consumed(before, source())


@pytest.mark.slow
def test_lpips_is_a_loss_whose_network_stays(folder, monkeypatch):
    """VGG16 with fewer channels; a resume finds it in the checkpoint."""
    monkeypatch.setattr(lpips, "STAGES", ((4, 4), (6, 6), (8, 8, 8), (8, 8, 8), (8, 8, 8)))
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape, scale=0.5).astype(np.float32) for name, shape in lpips.shapes().items()}
    save_file(
        {name: np.abs(a) if name.startswith("lin") else a for name, a in tensors.items()}, folder / "vgg.safetensors"
    )
    settings = {"perceptual__vgg_weights": str(folder / "vgg.safetensors"), "vqgan__resolution": 16}
    train(folder, "lpips", total_steps=3, **settings)
    rows = train(folder, "lpips", total_steps=5, **settings)
    assert sorted(rows) == list(range(5)) and all(
        row["perceptual"] > 0 and "gradient" not in row for row in rows.values()
    )
    state = checkpoints.load(checkpoints.latest_checkpoint(str(folder / "lpips")).spec)
    expected = lpips.load(settings["perceptual__vgg_weights"])
    assert state["params"]["perceptual"].keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(state["params"]["perceptual"][name], array, err_msg=name)


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(folder):
    values = {"total_steps": 100_000, "lr_warmup_steps": 2, "log_freq": 1, "save_model_freq": 50_000, "batch_size": 8}
    values |= {"input_dirs": folder / "pictures", "logger.output_dir": folder, "logger.experiment_id": "run"}
    values |= {name.replace("__", "."): value for name, value in SMALLEST.items()}

    def start(**changes):
        given = [f"--{name}={value}" for name, value in (values | changes).items()]
        command = [sys.executable, "-m", "tokenizer.train_vqgan", *given]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    path = folder / "run" / "metrics.jsonl"
    process = start()
    await_figures([process], path)
    process.send_signal(signal.SIGTERM)
    said = finish(process)
    assert "to resume" in said, said
    done = len(path.read_text().splitlines())
    said = finish(start(total_steps=done + 2))
    assert f"finished after step {done + 2}" in said
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(done + 2))
    assert weights.load(folder / "run" / "vqgan").config.resolution == 8


def codebook(share, total):
    return {"share": jnp.asarray(share, jnp.float32), "sum": jnp.asarray(total, jnp.float32)}


def step(means, targets):
    """One step of descent at the rate that makes running means."""
    gradient = jax.grad(lambda means: losses.pull(means, targets))(means)
    return jax.tree.map(lambda mean, g: mean - (1 - losses.DECAY) * g, means, gradient)


def test_used_codes_follow_running_means_and_dead_ones_move_at_once():
    vectors = jnp.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    chosen = jnp.asarray([0, 0, 0, 1])
    before = codebook([0.5, 0.5, 0.0], [[0.5, 0.5], [2.0, 2.0], [0.0, 0.0]])
    after = step(before, losses.codebook_targets(before, vectors, chosen, jax.random.key(0)))
    d = losses.DECAY
    np.testing.assert_allclose(after["share"][:2], [d * 0.5 + (1 - d) * 0.75, d * 0.5 + (1 - d) * 0.25], rtol=1e-6)
    np.testing.assert_allclose(after["sum"][0], d * 0.5 + (1 - d) * vectors[:3].sum(0) / 4, rtol=1e-6)
    revived = losses.codes_of(after)[2]
    assert np.min(np.abs(vectors - revived[None, :]).sum(axis=1)) < 1e-4


def test_dead_codes_move_to_what_is_drawn_badly():
    vectors = jnp.concatenate([jnp.full((60, 2), 1.0), jnp.asarray([[9.0, 9.0], [7.0, 8.0]])])
    before = codebook([1.0, *[0.0] * 7], [[1.0, 1.0], *[[0.0, 0.0]] * 7])
    targets = losses.codebook_targets(before, vectors, jnp.zeros(62, int), jax.random.key(0))
    revived = losses.codes_of(step(before, targets))[1:]
    np.testing.assert_array_less(6.9, revived)  # 60 of 62 vectors lie on their code, and none of these is taken


def test_a_part_of_the_next_picture_is_cut_in_and_the_rest_known_to_be_the_same():
    pictures = np.random.default_rng(0).random((64, 16, 16, 3), np.float32)
    cut, same = losses.cut_in(jnp.asarray(pictures), 4, jax.random.key(0))
    cells = np.asarray(cut).reshape(64, 4, 4, 4, 4, 3).swapaxes(2, 3)
    own, other = (array.reshape(64, 4, 4, 4, 4, 3).swapaxes(2, 3) for array in (pictures, np.roll(pictures, 1, axis=0)))
    is_own, is_other = ((cells == whole).all(axis=(3, 4, 5)) for whole in (own, other))
    assert (is_own ^ is_other).all()
    assert 0.05 < is_other.mean() < 0.5
    around = np.pad(is_own, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    shifts = [around[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    changed_B = ~is_own.all(axis=(1, 2))
    np.testing.assert_array_equal(same[changed_B], np.all(shifts, axis=0)[changed_B])


@pytest.mark.slow
def test_codes_are_drawn_to_what_they_are_in_another_picture(folder):
    """The term reaches the encoder only, and its figures are logged."""
    row = train(folder, "local", total_steps=3, locality_weight=1.0)[2]
    assert row["locality"] >= 0 and 0 <= row["codes_kept"] <= 1
    config = VQGANConfig(resolution=8, hidden_channels=4, channel_mult=(1,), norm_groups=2, num_embeddings=16)
    params = losses.Objective(config).init_params(jax.random.key(0))
    params["codebook"] = codebook(np.full(16, 1 / 16), np.random.default_rng(0).normal(size=(16, 64)) / 16)
    batch = {"pixels": jnp.asarray(np.random.default_rng(1).random((4, 8, 8, 3), np.float32))}

    def gradient(weight):
        target = losses.Objective(config, locality_weight=weight)
        return jax.jit(jax.grad(lambda p: target.loss(p, batch, jax.random.key(2))[0]))(params)["model"]

    moved = {name for name, (a, b) in _pairs(gradient(0.0), gradient(1.0)) if not np.array_equal(a, b)}
    assert moved and all(name.startswith(("encoder.", "quant_conv.")) for name in moved)


def _pairs(one: dict, other: dict):
    return ((name, (one[name], other[name])) for name in one)


def test_the_pull_has_no_value():
    means, targets = codebook([0.5, 0.5], np.ones((2, 3))), codebook([0.1, 0.9], np.zeros((2, 3)))
    assert losses.pull(means, targets) == 0


def test_the_outline_term_sees_what_the_mean_error_does_not():
    flat = jnp.full((1, 8, 8, 3), 0.1)
    checks = flat.at[:, ::2, ::2].multiply(-1)
    assert losses.gradient_error(flat) == 0
    assert losses.gradient_error(checks) > 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_dirs": ""}, "--input_dirs is missing"),
        ({"adversary__weight": -1.0}, "--adversary.weight=-1.0: must be at least 0"),
        ({"adversary__start_step": -1}, "--adversary.start_step=-1: must be at least 0"),
        ({"adversary__weight": 0.8}, "--adversary.layers=3: leaves no patch of 8 pixels"),
        ({"perceptual__vgg_weights": "none.pth"}, r"--perceptual.vgg_weights=none\.pth: none\.pth: no such file"),
        ({"vqgan__channel_mult": "1,x"}, "--vqgan.channel_mult=1,x"),
        ({"vqgan__norm_groups": 3}, "--vqgan.hidden_channels=4: .*norm_groups=3"),
        ({"total_steps": 2}, "--total_steps=2: must be more than lr_warmup_steps=2"),
        ({"average_decay": 1.0}, "--average_decay=1.0: must be at least 0 and below 1"),
        ({"save_model_freq": 0}, "--save_model_freq=0"),
        ({"batch_size": 3}, "--batch_size=3: must be a positive multiple of 8"),
    ],
)
def test_bad_settings_are_named(folder, settings, message):
    with pytest.raises(UserError, match=message):
        train(folder, "bad", **settings)


def test_models_are_made_of_average_or_network():
    config = VQGANConfig(resolution=8, hidden_channels=4, channel_mult=(1,), norm_groups=2, num_embeddings=16)
    shapes = jax.eval_shape(lambda: losses.Objective(config).init_params(jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    params["model"] = {name: array + 1 for name, array in params["model"].items()}
    assert np.all(losses.make_model(config, params, "model").encoder.conv_in.kernel[...] == 1)
    assert np.all(losses.make_model(config, params).encoder.conv_in.kernel[...] == 0)
