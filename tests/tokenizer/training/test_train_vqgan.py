"""Training a tokenizer reduces the loss, resumes exactly, and exports a usable model."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_run import await_metrics, finish
from tokenizer_kit import run_main, write_image

from EasyLM import checkpoints
from EasyLM.checkpoints import streaming
from EasyLM.errors import UserError
from EasyLM.training import run
from tokenizer import train_vqgan
from tokenizer.image_quality import lpips
from tokenizer.media import images
from tokenizer.synthetic import scenes
from tokenizer.vqgan import Codec, weights

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

ADVERSARY = {"adversary__weight": 0.5, "adversary__start_step": 4, "adversary__channels": 4, "adversary__layers": 1}


# Their codebook follows from the levels, or from the number of codes alone.
FSQ = {"vqgan__quantizer": "fsq", "vqgan__fsq_levels": "4,4", "vqgan__num_embeddings": 0}
FSQ["vqgan__quantized_embed_dim"] = 0
LFQ = {"vqgan__quantizer": "lfq", "vqgan__quantized_embed_dim": 0}


def train(folder, name, **settings):
    """Trains; returns the metrics of each step."""
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


def test_more_unusable_images_than_the_allowance_are_refused(folder):
    """tests/tokenizer/training/test_image_rows.py tests what is trained within the allowance."""
    for name in ("8.png", "9.png"):
        os.mkfifo(folder / "pictures" / name)
    with pytest.raises(UserError, match=r"[89]\.png: is a pipe.* .--max_errors=0;"):
        train(folder, "strict")
    with pytest.raises(UserError, match=r"[89]\.png: is a pipe.*, after 1 others .--max_errors=1;"):
        train(folder, "lenient", max_errors=1)


@pytest.mark.slow
def test_training_reduces_the_loss_resumes_exactly_and_exports_a_model(folder, monkeypatch):
    whole = train(folder, "whole", **ADVERSARY)
    assert whole[11]["loss"] < 0.8 * whole[0]["loss"]

    original = run.fit

    def stopped(state, step, batches, settings, report, **rest):
        return original(state, step, batches, dataclasses.replace(settings, total_steps=5), report, **rest)

    monkeypatch.setattr(run, "fit", stopped)
    train(folder, "parts", **ADVERSARY)
    monkeypatch.undo()
    parts = train(folder, "parts", **ADVERSARY)
    names = ("loss", "psnr", "gradient_norm", "param_norm", "learning_rate", "code_perplexity", "discriminator")
    assert [{k: whole[i][k] for k in names} for i in range(12)] == [{k: parts[i][k] for k in names} for i in range(12)]
    one, other = (weights.load(folder / name / "vqgan") for name in ("whole", "parts"))
    for (path, a), (_, b) in zip(weights.flat_parameters(one), weights.flat_parameters(other), strict=True):
        np.testing.assert_array_equal(a.get_value(), b.get_value(), err_msg=str(path))
    pixels = np.zeros((2, 8, 8, 3), np.float32)
    codec = Codec(str(folder / "whole" / "vqgan"))
    assert codec.decode(codec.encode(pixels)).shape == pixels.shape
    assert (folder / "whole" / "reconstructions.png").exists()


@pytest.mark.slow
def test_lpips_is_a_loss_with_constant_weights(folder, monkeypatch):
    """Uses a narrow VGG16. The checkpoint contains its weights."""
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
    assert state["extra"]["perceptual"].keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(state["extra"]["perceptual"][name], array, err_msg=name)


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_resumes(folder):
    values = {"total_steps": 100_000, "lr_warmup_steps": 2, "log_freq": 1, "save_model_freq": 50_000, "batch_size": 8}
    values |= {"input_dirs": folder / "pictures", "logger.output_dir": folder, "logger.experiment_id": "run"}
    values |= {name.replace("__", "."): value for name, value in SMALLEST.items()}

    def start(**changes):
        given = [f"--{name}={value}" for name, value in (values | changes).items()]
        command = [sys.executable, "-m", "tokenizer.train_vqgan", *given]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    path = folder / "run" / "metrics.jsonl"
    process = start()
    await_metrics([process], path)
    process.send_signal(signal.SIGTERM)
    output = finish(process, code=75)
    assert "to resume" in output, output
    done = len(path.read_text().splitlines())
    output = finish(start(total_steps=done + 2))
    assert f"finished after step {done + 2}" in output
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(done + 2))
    assert weights.load(folder / "run" / "vqgan").config.resolution == 8


@pytest.mark.slow
def test_fsq_learns_uses_most_codes_and_is_exported(folder):
    """tests/tokenizer/training/test_code_losses.py trains the other quantizers."""
    rows = train(folder, "run", total_steps=150, save_model_freq=150, average_decay=0.8, lr=1e-2, **FSQ)
    assert rows[149]["psnr"] > rows[0]["psnr"] + 3 and rows[149]["codes_used"] > 0.5
    codec = Codec(str(folder / "run" / "vqgan"))
    assert codec.num_codes == 16
    pixels = np.stack([images.load(path, 8) for path in sorted((folder / "pictures").iterdir())])
    codes = codec.encode(pixels)
    assert len(np.unique(codes)) > 8
    assert np.mean((codec.decode(codes) - pixels) ** 2) < 0.5 * np.var(pixels)
    with pytest.raises(UserError, match=r"model has other settings: .*quantizer='lfq' .saved: 'fsq'."):
        train(folder, "run", **LFQ)


@pytest.mark.slow
def test_a_short_warm_up_does_not_lead_to_constant_reconstructions(folder, tmp_path):
    """With codes from step 5 on, all 100 steps stay at 11.5 to 12.5 dB, and 0.0% of the variance."""
    (tmp_path / "scenes").mkdir()
    views = [scenes.scene(seed, 16)[view] for view in ("image", "depth", "segmentation") for seed in range(48)]
    for number, pixels_SS3 in enumerate(views):
        images.save(str(tmp_path / "scenes" / f"{number:03}.png"), pixels_SS3)
    network = {"resolution": 16, "hidden_channels": 16, "channel_mult": "1,2,3,3", "resample_with_conv": True}
    network |= {"norm_groups": 4, "num_embeddings": 512, "z_channels": 16, "quantized_embed_dim": 8}
    settings = {"input_dirs": str(tmp_path / "scenes"), "average_decay": 0.98, "lr_warmup_steps": 5}
    settings |= {f"vqgan__{name}": value for name, value in network.items()}
    rows = train(folder, "run", total_steps=100, save_model_freq=100, **settings)
    assert np.mean([rows[step]["psnr"] for step in range(90, 100)]) > 14
    pixels = np.stack([images.to_float32(pixels_SS3) for pixels_SS3 in views])
    codec = Codec(str(folder / "run" / "vqgan"))
    assert np.var(codec.decode(codec.encode(pixels)), axis=0).mean() > 0.3 * np.var(pixels, axis=0).mean()


def test_constant_reconstructions_are_reported(caplog):
    images = np.random.default_rng(0).random((2, 3, 8, 8, 3))
    train_vqgan._warn_if_constant(images, 0.6 * images + 0.2)
    assert not caplog.records
    train_vqgan._warn_if_constant(images, np.full_like(images, images.mean()) + 0.1 * images)
    assert "1.0% of the variance" in caplog.text


@pytest.mark.slow
def test_locality_metrics_are_logged(folder):
    row = train(folder, "local", total_steps=3, locality_weight=1.0)[2]
    assert row["locality"] >= 0 and 0 <= row["codes_kept"] <= 1


@pytest.mark.slow
def test_a_checkpoint_of_the_old_layout_is_refused(folder):
    """The old layout has the running means among the parameters."""
    train(folder, "old", total_steps=3)
    path = (folder / "old" / "streaming_train_state").resolve()
    entries = [(entry.key, entry.read()) for entry in streaming.read_streaming(path)]
    with open(path, "wb") as file:
        for key, array in entries:
            key = ("params", *key[1:]) if key[0] == "extra" else key
            streaming.write_entry(file, key, array)
    path.with_name("checksums.json").unlink()  # older versions have none
    with pytest.raises(UserError, match=r"old/.*: written by an older version .*; start again under another --logger"):
        train(folder, "old", total_steps=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_dirs": ""}, "--input_dirs is missing"),
        ({"adversary__weight": -1.0}, "--adversary.weight=-1.0: must be at least 0"),
        ({"adversary__start_step": -1}, "--adversary.start_step=-1: must be at least 0"),
        ({"adversary__weight": 0.8}, "--adversary.layers=3: too many for images of 8 pixels"),
        ({"perceptual__vgg_weights": "none.pth"}, r"--perceptual.vgg_weights=none\.pth: none\.pth: no such file"),
        ({"vqgan__channel_mult": "1,x"}, "--vqgan.channel_mult=1,x"),
        ({"vqgan__attn_resolutions": "8,5"}, "--vqgan.attn_resolutions=8,5: the sides of the levels are 8$"),
        ({"vqgan__norm_groups": 3}, "--vqgan.hidden_channels=4: .*norm_groups=3"),
        ({"total_steps": 2}, "--total_steps=2: must be more than --lr_warmup_steps=2"),
        ({"average_decay": 1.0}, "--average_decay=1.0: must be at least 0 and below 1"),
        ({"save_model_freq": 0}, "--save_model_freq=0"),
        ({"batch_size": 3}, "--batch_size=3: must be a positive multiple of 8"),
        ({"vqgan__quantizer": "rq"}, "--vqgan.quantizer='rq': choose one of 'vq', 'fsq', 'lfq'"),
        ({"vqgan__fsq_levels": "4,4"}, r"--vqgan.fsq_levels=\(4, 4\): is for quantizer=fsq"),
        ({"vqgan__quantizer": "fsq"}, r"--vqgan.fsq_levels=\(\): quantizer=fsq needs levels"),
        ({**FSQ, "vqgan__num_embeddings": 20}, "--vqgan.num_embeddings=20: must be 16, the product of fsq_levels"),
        ({**FSQ, "vqgan__normalize_codes": True}, "--vqgan.normalize_codes=True: is for quantizer=vq"),
        ({**FSQ, "entropy_weight": 0.1}, "--entropy_weight=0.1: fsq has no entropy loss; choose vq or lfq"),
        ({**LFQ, "codebook_update": "gradient"}, "--codebook_update=gradient: lfq has constant codes; choose vq"),
        ({**LFQ, "vqgan__num_embeddings": 12}, "--vqgan.num_embeddings=12: must be 8, two to the power"),
    ],
)
def test_invalid_settings_are_named(folder, settings, message):
    with pytest.raises(UserError, match=message):
        train(folder, "bad", **settings)
