"""Trains a tokenizer: `python -m tokenizer.train_vqgan --input_dirs=D1,D2 --adversary.weight=0.8 ...` (DATASET.md).

The run directory is that of any training run here (metrics.jsonl, checkpoints, resumes by itself); at the end it holds
`vqgan/`, the averaged model as a folder for --vqgan, and `reconstructions.png`, pictures above what the codes keep.
"""

import concurrent.futures
import dataclasses
import logging
import os

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from EasyLM import checkpoints, flags
from EasyLM.data import shuffled_number
from EasyLM.errors import UserError, prefix_errors
from EasyLM.flags import Flag
from EasyLM.parallel import check_batch_size, initialize_distributed, make_mesh
from EasyLM.storage import is_remote, json_digest
from EasyLM.training import (
    RUN_FLAGS,
    Accounting,
    ModelSettings,
    Optimizer,
    RunSettings,
    TrainingData,
    TrainingTask,
    model_without_extra,
    open_run,
    train,
)
from tokenizer.image_quality import lpips
from tokenizer.media import folders, grids, images
from tokenizer.training import losses
from tokenizer.training.discriminator import ADVERSARY_FLAGS, Adversary
from tokenizer.vqgan import COMPUTE_DTYPES, Codec, VQGANConfig, weights

_MODEL_HELP = {
    "resolution": "Side of a picture in pixels.",
    "hidden_channels": "Channels of the finest level.",
    "channel_mult": "Channels of each level, in multiples; each further level halves the side.",
    "num_res_blocks": "Residual blocks of a level in the encoder; the decoder has one more.",
    "attn_resolutions": "Comma list of the sides at which attention follows each residual block.",
    "no_attn_mid_block": "No attention at the coarsest level.",
    "z_channels": "Channels between the network and the codes' projection.",
    "num_embeddings": "Codes of the codebook.",
    "quantized_embed_dim": "Length of a code's vector.",
    "resample_with_conv": "Change the side by convolutions; else by mean and by repetition.",
    "commitment_cost": "Weight of the pull of the encoder towards its codes.",
    "norm_groups": "Groups of the group normalization: 32 in open-muse, fewer for a narrow model.",
}


def _model_flags() -> dict[str, Flag]:
    """The settings of a VQGAN as flags; the defaults are the released tokenizer's."""
    defaults = dataclasses.asdict(VQGANConfig())
    as_text = {name: ",".join(map(str, v)) if isinstance(v, tuple) else v for name, v in defaults.items()}
    return {name: Flag(as_text[name], text) for name, text in _MODEL_HELP.items()}


FLAGS = {
    **RUN_FLAGS,
    "total_steps": Flag(250_000, "Steps to train in total, those before a resume included."),
    "save_model_freq": Flag(1000, "Steps between checkpoints; the model comes from the last one.", least=1),
    "checkpointer": {**checkpoints.CHECKPOINTER_FLAGS, "save_optimizer_state": Flag(True, "So that a run can resume.")},
    "dtype": Flag("fp32", "Type of the computation; parameters and losses are float32.", choices=tuple(COMPUTE_DTYPES)),
    "input_dirs": Flag("", "Comma list of folders of pictures, those below them included.", required=True),
    "eval_dirs": Flag("", "Comma list of folders of held-out pictures, for --eval_steps and reconstructions.png."),
    "batch_size": Flag(64, "Pictures of a step, over all devices.", least=1),
    "lr": Flag(
        1e-4, "Largest learning rate; a cosine takes it to a hundredth at total_steps. Small models want 2e-3.", above=0
    ),
    "lr_warmup_steps": Flag(1000, "Steps of linear warm-up.", least=1),
    "weight_decay": Flag(1e-4, "Decoupled weight decay.", least=0),
    "clip_gradient": Flag(1.0, "The network's gradient is scaled down to at most this norm.", above=0),
    "average_decay": Flag(
        0.999, "A step, of the running mean of the network that is kept in the end.", least=0, below=1
    ),
    "gradient_weight": Flag(
        0.5, "Weight of the error in pixels' differences to neighbours; not used beside LPIPS.", least=0
    ),
    "locality_weight": Flag(0.0, "Weight of codes staying as they are when the picture changes elsewhere.", least=0),
    "perceptual": {
        "vgg_weights": Flag("", "Local file, or two with a comma, of VGG16's and LPIPS' weights: a loss."),
        "weight": Flag(1.0, "Weight of LPIPS.", least=0),
    },
    "adversary": ADVERSARY_FLAGS,
    "vqgan": _model_flags(),
}


class PictureRows:
    """Row source of pictures, `{"pixels": [n,H,W,3]}` float32 in [0, 1], all files in a new order each epoch.

    A broken file ends the run with its path: `rows` raises UserError.
    """

    def __init__(self, directories: str, flag: str, size: int, seed: int):
        names = [name for name in directories.split(",") if name]
        if not names:
            raise UserError(f"--{flag} is missing: a comma list of folders of pictures")
        found = {name: sorted((entry.name, entry.size) for entry in folders.walk(name, flag)) for name in names}
        self._paths = [os.path.join(name, file) for name in names for file, _ in found[name]]
        self._size, self._seed = size, seed
        self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        self.fingerprint = {
            "seed": seed,
            "pictures": len(self._paths),
            "directories": names,
            "names_and_sizes": json_digest(found),  # not when files changed: a copy of them does as well
        }

    def rows(self, start: int, count: int) -> dict[str, np.ndarray]:
        """Rows start..start+count-1."""
        total = len(self._paths)
        order = [shuffled_number(row, total, self._seed) for row in range(start, start + count)]
        pictures = self._pool.map(lambda i: images.load(self._paths[i], self._size), order)
        return {"pixels": np.stack(list(pictures))}

    def metrics(self, rows_consumed: int) -> dict[str, float]:
        """How often all pictures were seen."""
        return {"dataset_epoch": rows_consumed / len(self._paths)}


def main(config) -> None:
    """Trains as the flags say, then writes the model and the picture."""
    logging.getLogger().setLevel(logging.INFO)
    initialize_distributed(config.jax_distributed)
    settings = model_config(config.vqgan)
    _check(config)
    mesh = make_mesh(config.mesh_dim)
    check_batch_size("--batch_size", config.batch_size, mesh)
    run = open_run(RunSettings.from_flags(config), _model_settings(settings))
    data = PictureRows(config.input_dirs, "input_dirs", settings.resolution, config.seed)
    held_out = config.eval_steps or config.eval_dirs
    eval_data = PictureRows(config.eval_dirs, "eval_dirs", settings.resolution, 0) if held_out else None
    train(run, make_task(config, settings, data, eval_data), mesh)
    if jax.process_index() == 0:
        export(run.directory, settings)
        draw_reconstructions(run.directory, eval_data or data)


def _check(config) -> None:
    if is_remote(config.logger.output_dir):
        raise UserError(f"--logger.output_dir={config.logger.output_dir}: must be on a disk; copy the model afterwards")
    if config.total_steps <= config.lr_warmup_steps:
        raise UserError(
            f"--total_steps={config.total_steps}: must be more than lr_warmup_steps={config.lr_warmup_steps}"
        )
    if not config.checkpointer.save_optimizer_state:
        raise UserError("--checkpointer.save_optimizer_state=False: this trainer keeps whole states only")


def model_config(values) -> VQGANConfig:
    """The VQGAN of the flags `vqgan.*`.

    Raises:
      UserError: naming the flag.
    """
    lists = {}
    for name in ("channel_mult", "attn_resolutions"):
        try:
            lists[name] = tuple(int(part) for part in values[name].split(",") if part)
        except ValueError:
            raise UserError(f"--vqgan.{name}={values[name]}: give a comma list of integers, as 1,2,4") from None
    try:
        return VQGANConfig(**{**values.to_dict(), **lists})
    except UserError as error:
        raise UserError(f"--vqgan.{error}") from None


def make_objective(config, settings: VQGANConfig) -> losses.Objective:
    """What the flags ask for: perceptual weights are read here.

    Raises:
      UserError: naming the flag.
    """
    dtype = COMPUTE_DTYPES[config.dtype]
    asked = config.adversary.weight != 0
    vgg_weights = config.perceptual.vgg_weights
    with prefix_errors(f"--perceptual.vgg_weights={vgg_weights}"):
        vgg = lpips.load(vgg_weights) if vgg_weights else None
    return losses.Objective(
        settings,
        dtype,
        gradient_weight=config.gradient_weight,
        perceptual_weight=config.perceptual.weight,
        locality_weight=config.locality_weight,
        vgg=vgg,
        adversary=Adversary(**config.adversary, resolution=settings.resolution, dtype=dtype) if asked else None,
    )


def _model_settings(settings: VQGANConfig) -> ModelSettings:
    return ModelSettings("vqgan_config", dataclasses.asdict(settings), resumable=frozenset({"commitment_cost"}))


def make_task(config, settings: VQGANConfig, data, eval_data) -> TrainingTask:
    """The training task for the loop that all models here share."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.lr, config.lr_warmup_steps, config.total_steps, config.lr / 100
    )
    target = make_objective(config, settings)
    optimizer, learning_rate = target.make_optimizer(
        rate, config.weight_decay, config.clip_gradient, config.average_decay
    )
    return TrainingTask(
        model_without_extra(target.init_params, target.loss, ((".*", P()),)),
        Optimizer(optimizer, learning_rate),
        TrainingData(data, config.batch_size, eval_data, config.batch_size),
        Accounting(unit="images", items_per_row=1, flops_per_row=0.0),
    )


def export(run_dir: str, settings: VQGANConfig) -> None:
    """Writes the averaged model of the newest checkpoint to `run_dir/vqgan`, in float16."""
    state = checkpoints.load(checkpoints.latest_checkpoint(run_dir).spec)
    weights.save(losses.make_model(settings, state["params"]), os.path.join(run_dir, "vqgan"), np.float16)


def draw_reconstructions(run_dir: str, data: PictureRows, count: int = 12) -> None:
    """Writes `reconstructions.png`: rows of pictures, each above what its codes keep of it."""
    codec = Codec(os.path.join(run_dir, "vqgan"))
    pixels = data.rows(0, 3 * count)["pixels"].reshape(3, count, codec.config.resolution, -1, 3)
    rows = [part for row in pixels for part in (row, codec.decode(codec.encode(row)))]
    images.save(os.path.join(run_dir, "reconstructions.png"), grids.grid(images.to_uint8(np.concatenate(rows)), count))


def cli() -> None:
    """Runs the command with the flags of the command line."""
    flags.run(main, FLAGS)


if __name__ == "__main__":
    cli()
