"""Writes a tokenizer of another project as a folder of this project: `python -m tokenizer.convert --vqgan=... ...`.

The folder has config.json and model.safetensors (float32) and gives the same codes and images. Every command reads it
with `--vqgan=DIR`.
"""

import os

from ml_collections import ConfigDict

from EasyLM.errors import UserError, prefix_errors
from EasyLM.flags import Flag, run
from EasyLM.storage import lock_output_folder
from tokenizer.vqgan import CODEC_FLAGS, weights

FLAGS = {
    "vqgan": CODEC_FLAGS["vqgan"],
    "resolution": CODEC_FLAGS["resolution"],
    "output_dir": Flag("", "The folder to write, which has no tokenizer yet.", required=True),
}


def main(config: ConfigDict) -> None:
    """Converts the tokenizer, and prints its properties."""
    with lock_output_folder(config.output_dir, "output_dir"):
        _convert(config)


def _convert(config: ConfigDict) -> None:
    if os.path.exists(os.path.join(config.output_dir, "config.json")):
        raise UserError(f"--output_dir={config.output_dir}: already holds a model; name another folder")
    with prefix_errors(f"--vqgan={config.vqgan}"):
        model = weights.load(config.vqgan, resolution=config.resolution)
    weights.save(model, config.output_dir)
    print(
        f"{config.output_dir}: {model.config.num_embeddings} codes; images of {model.config.resolution} pixels a side, "
        f"{model.config.tokens_per_image} tokens each"
    )


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
