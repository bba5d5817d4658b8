"""Trains a tokenizer: `python -m tokenizer.train_vqgan --input_dirs=D1,D2 --adversary.weight=0.8 ...` (DATASET.md).

The run directory contains metrics.jsonl and the checkpoints, from which the same command resumes. At the end it also
contains `vqgan/`, the averaged model as a folder for --vqgan, and `reconstructions.png`, images above their
reconstructions.
"""

import dataclasses
import logging
import os
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from EasyLM import checkpoints, flags
from EasyLM.errors import UserError, prefix_errors
from EasyLM.flags import Flag
from EasyLM.parallel import (
    check_batch_size,
    check_whole_sequences,
    fail_together,
    initialize_distributed,
    make_mesh,
)
from EasyLM.storage import is_remote
from EasyLM.training import (
    RUN_FLAGS,
    Accounting,
    Model,
    ModelSettings,
    Optimizer,
    Run,
    RunSettings,
    StopSignals,
    TrainingData,
    TrainingTask,
    open_run,
    train,
)
from tokenizer.image_quality import lpips
from tokenizer.media import grids, images
from tokenizer.training import (
    CODEBOOK_UPDATES,
    DISCRIMINATOR_FLAGS,
    MODEL_FLAGS,
    AdversarialLoss,
    CodeLoss,
    ImageRows,
    Objective,
    config_from_flags,
    learning_rate,
    make_model,
)
from tokenizer.vqgan import COMPUTE_DTYPES, Codec, VQGANConfig, weights

FLAGS = {
    **RUN_FLAGS,
    "total_steps": Flag(250_000, "Steps to train in total, including those before a resume.", least=0),
    "save_model_freq": Flag(1000, "Steps between checkpoints; the last one is exported.", least=1),
    "checkpointer": {
        **checkpoints.CHECKPOINTER_FLAGS,
        "save_optimizer_state": Flag(True, "Save the whole train state. Must be True: a run resumes from it."),
    },
    "dtype": Flag(
        "fp32", "Data type of the computation; parameters and losses are float32.", choices=tuple(COMPUTE_DTYPES)
    ),
    "input_dirs": Flag("", "Comma list of folders of images; subfolders are included.", required=True),
    "eval_dirs": Flag("", "Comma list of folders of held-out images, for --eval_steps and reconstructions.png."),
    "max_errors": Flag(0, "Maximum number of unusable images to skip, in each process; each is reported.", least=0),
    "batch_size": Flag(64, "Images per step, over all devices.", least=1),
    "lr": Flag(
        1e-4,
        "Peak learning rate; decays to a hundredth at total_steps (cosine). A good value for small models is 2e-3.",
        above=0,
    ),
    "lr_warmup_steps": Flag(
        1000,
        "Steps of linear warm-up. With --codebook_update=ema, vectors are not quantized in these steps, nor in the "
        "first 50 (half of total_steps if that is less).",
        least=1,
    ),
    "weight_decay": Flag(1e-4, "Decoupled weight decay.", least=0),
    "clip_gradient": Flag(
        1.0,
        "Maximum norm of the network's gradient, its adversarial part included. The discriminator's is not clipped.",
        above=0,
    ),
    "codebook_update": Flag(
        "ema",
        "How the codes of --vqgan.quantizer=vq are learned: ema, as running means of their vectors, with unused codes "
        "replaced; gradient, by the codebook loss, as in VQGAN and LlamaGen.",
        choices=CODEBOOK_UPDATES,
    ),
    "entropy_weight": Flag(
        None,
        "Weight of the entropy loss, by which all codes are used (vq, lfq); unset: 0.1 with lfq, otherwise 0.",
        type=float,
        least=0,
    ),
    "entropy_temperature": Flag(
        0.01, "Temperature of the entropy loss: how far from the border between two codes it moves vectors.", above=0
    ),
    "average_decay": Flag(0.999, "Decay per step of the running mean of the network.", least=0, below=1),
    "gradient_weight": Flag(
        0.5, "Weight of the error in differences of neighbouring pixels; unused with LPIPS.", least=0
    ),
    "locality_weight": Flag(
        0.0,
        "Weight of the locality loss, which keeps codes unchanged when the image changes elsewhere; it grows from 0 to "
        "this value in the first half of the run.",
        least=0,
    ),
    "perceptual": {
        "vgg_weights": Flag("", "Local weights of VGG16 and LPIPS, one file or a comma list of two; enables LPIPS."),
        "weight": Flag(1.0, "Weight of LPIPS.", least=0),
    },
    "adversary": DISCRIMINATOR_FLAGS,
    "vqgan": MODEL_FLAGS,
}

_UNQUANTIZED_STEPS = 50  # at least: a network first learns the mean image, for up to 40 steps
_LFQ_ENTROPY_WEIGHT = 0.1  # if none is given; that of MaskGIT
_LEAST_VARIANCE = 0.2  # of reconstructions, relative to that of the images; a tokenizer that learns has over 0.7


@StopSignals()
@fail_together()
def main(config: Any) -> int:
    """Trains, then exports the model and its reconstructions. Returns the exit code."""
    logging.getLogger().setLevel(logging.INFO)
    initialize_distributed(config.jax_distributed)

    # Model
    _check_flags(config)
    model = config_from_flags(config.vqgan)
    _check_quantizer(config)
    objective = _objective(config, model)
    mesh = make_mesh(config.mesh_dim)
    check_whole_sequences(mesh)
    check_batch_size("--batch_size", config.batch_size, mesh)

    # Start
    settings = {**dataclasses.asdict(model), "codebook_update": config.codebook_update}
    model_settings = ModelSettings("vqgan_config", settings, resumable=frozenset({"commitment_cost"}))
    formats = {"trainstate": checkpoints.CHECKPOINT_FORMATS["trainstate"]}
    with open_run(RunSettings.from_flags(config), model_settings, formats) as run:
        _check_layout(run)

        # Data
        data = ImageRows(config.input_dirs, "input_dirs", model.resolution, config.seed, config.max_errors)
        held_out = config.eval_steps or config.eval_dirs
        eval_data = None
        if held_out:
            eval_data = ImageRows(config.eval_dirs, "eval_dirs", model.resolution, 0, config.max_errors)

        # Train
        task = TrainingTask(
            Model(objective.init, objective.loss_and_gradients, objective.evaluate, partition_rules=((".*", P()),)),
            _optimizer(config, objective),
            TrainingData(data, config.batch_size, eval_data, config.batch_size),
            Accounting(unit="images", items_per_row=1, flops_per_row=0.0),
        )
        code = train(run, task, mesh)
        if jax.process_index() == 0:
            export(run.directory, model)
            save_reconstructions(run.directory, eval_data or data)
        return code


def _check_flags(config: Any) -> None:
    if is_remote(config.logger.output_dir):
        raise UserError(
            f"--logger.output_dir={config.logger.output_dir}: must be a local directory; copy the model afterwards"
        )
    if config.total_steps <= config.lr_warmup_steps:
        raise UserError(
            f"--total_steps={config.total_steps}: must be more than --lr_warmup_steps={config.lr_warmup_steps}"
        )
    if not config.checkpointer.save_optimizer_state:
        raise UserError(
            "--checkpointer.save_optimizer_state=False: must be True; a run resumes from the whole train state"
        )


def _check_quantizer(config: Any) -> None:
    """Raises UserError for a setting of another quantizer."""
    quantizer = config.vqgan.quantizer
    if quantizer != "vq" and config.codebook_update != "ema":
        raise UserError(f"--codebook_update={config.codebook_update}: {quantizer} has constant codes; choose vq")
    if quantizer == "fsq" and config.entropy_weight:
        raise UserError(f"--entropy_weight={config.entropy_weight}: fsq has no entropy loss; choose vq or lfq")


def _objective(config: Any, model: VQGANConfig) -> Objective:
    dtype = COMPUTE_DTYPES[config.dtype]
    vgg_weights, vgg, adversarial = config.perceptual.vgg_weights, None, None
    if vgg_weights:
        with prefix_errors(f"--perceptual.vgg_weights={vgg_weights}"):
            vgg = lpips.load(vgg_weights)
    if config.adversary.weight:
        try:
            adversarial = AdversarialLoss(**config.adversary, resolution=model.resolution, dtype=dtype)
        except UserError as error:
            raise UserError(f"--adversary.{error}") from None
    entropy_weight = config.entropy_weight
    if entropy_weight is None:
        entropy_weight = _LFQ_ENTROPY_WEIGHT if model.quantizer == "lfq" else 0.0
    return Objective(
        model,
        dtype,
        CodeLoss(config.codebook_update, entropy_weight, config.entropy_temperature),
        gradient_weight=config.gradient_weight,
        perceptual_weight=config.perceptual.weight,
        locality_weight=config.locality_weight,
        average_decay=config.average_decay,
        locality_steps=max(1, config.total_steps // 2),
        unquantized_steps=max(config.lr_warmup_steps, min(_UNQUANTIZED_STEPS, config.total_steps // 2)),
        vgg=vgg,
        adversarial=adversarial,
    )


def _optimizer(config: Any, objective: Objective) -> Optimizer:
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.lr, config.lr_warmup_steps, config.total_steps, config.lr / 100
    )
    transform = objective.make_optimizer(rate, config.weight_decay, config.clip_gradient)
    return Optimizer(transform, partial(learning_rate, rate))


def _check_layout(run: Run) -> None:
    """Raises UserError for the old checkpoint layout, in which the running means are parameters."""
    if any(entry.key[:2] == ("params", "codebook") for entry in run.start.entries):
        raise UserError(
            f"{run.start.files.checkpoint}: written by an older version of this trainer, whose training state cannot "
            "be resumed; start again under another --logger.experiment_id, or export the model with that version"
        )


def export(run_dir: str, model: VQGANConfig) -> None:
    """Writes the averaged model of the latest checkpoint to `run_dir/vqgan`, in float16."""
    latest = checkpoints.latest_checkpoint(run_dir)
    assert latest is not None
    extra = checkpoints.load(latest.spec)["extra"]
    averaged = make_model(model, extra["average"], extra.get("codebook"))
    weights.save(averaged, os.path.join(run_dir, "vqgan"), np.float16)


def save_reconstructions(run_dir: str, data: ImageRows, count: int = 12) -> None:
    """Writes `reconstructions.png`: three rows of images, each above its reconstructions."""
    codec = Codec(os.path.join(run_dir, "vqgan"))
    pixels = data.rows(0, 3 * count)["pixels"].reshape(3, count, codec.resolution, -1, 3)
    reconstructed = codec.decode(codec.encode(pixels.reshape(-1, *pixels.shape[2:]))).reshape(pixels.shape)
    _warn_if_constant(pixels, reconstructed)
    rows = [part for pair in zip(pixels, reconstructed, strict=True) for part in pair]
    images.save(os.path.join(run_dir, "reconstructions.png"), grids.grid(images.to_uint8(np.concatenate(rows)), count))


def _warn_if_constant(pixels: np.ndarray, reconstructed: np.ndarray) -> None:
    """Warns if reconstructions [...,H,W,3] hardly differ from image to image, unlike the images."""
    shape = (-1, *pixels.shape[-3:])
    variance, own = (np.var(array.reshape(shape), axis=0).mean() for array in (reconstructed, pixels))
    if variance < _LEAST_VARIANCE * own:
        logging.warning(
            "the reconstructions hardly depend on the images (they have %.1f%% of the variance): the tokenizer has "
            "learned nothing; train with a lower --lr, more --lr_warmup_steps or more --total_steps",
            100 * variance / own,
        )


def cli() -> None:
    """Runs the command with the flags of the command line."""
    flags.run(main, FLAGS)


if __name__ == "__main__":
    cli()
