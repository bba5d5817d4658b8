"""Writes a tokenizer of another project as a folder of this project: `python -m tokenizer.convert --vqgan=... ...`.

The folder has config.json and model.safetensors (float32) and gives the same codes and images. Every command reads it
with `--vqgan=DIR`. For other programs it has preprocessor_config.json, how an image becomes pixels, and README.md, a
model card.
"""

import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from EasyLM.checkpoints import load_metadata
from EasyLM.errors import UserError, prefix_errors
from EasyLM.flags import Flag, run, to_dataclass
from EasyLM.publishing import (
    CARD_FILE,
    CARD_FLAGS,
    PUSH_FLAG,
    CardTexts,
    card_table,
    card_text,
    keeps_card,
    last_metrics,
    last_part,
    prepare_repository,
    public_name,
    upload_files,
)
from EasyLM.storage import atomic_file, lock_output_folder, split_paths
from tokenizer.vqgan import CODEC_FLAGS, VQGAN, weights

FLAGS = {
    "vqgan": CODEC_FLAGS["vqgan"],
    "resolution": CODEC_FLAGS["resolution"],
    "output_dir": Flag("", "The folder to write, which has no tokenizer yet.", required=True),
    "push_to_hub": PUSH_FLAG,
    "card": CARD_FLAGS,
}
_SUMMARY = (
    "An image tokenizer: a VQGAN that encodes an image as a grid of codes, and decodes codes to an image. The codes of "
    "several images make a visual sentence for a large vision model."
)
_USE = """`--vqgan=OWNER/NAME` in the commands of EasyLM-LVM. `scripts/torch_vqgan.py` of that project loads this folder
with torch and safetensors alone."""


def main(config: ConfigDict) -> None:
    """Converts the tokenizer, and prints its properties."""
    with lock_output_folder(config.output_dir, "output_dir"):
        _convert(config)


def _convert(config: ConfigDict) -> None:
    if os.path.exists(os.path.join(config.output_dir, "config.json")):
        raise UserError(f"--output_dir={config.output_dir}: already holds a model; name another folder")
    with prefix_errors("--card", "."):
        texts = to_dataclass(CardTexts, config.card)
        keeps = keeps_card(config.output_dir, texts)
    with prefix_errors(f"--vqgan={config.vqgan}"):
        model = weights.load(config.vqgan, resolution=config.resolution)
    with prefix_errors(f"--push_to_hub={config.push_to_hub}"):
        parent = prepare_repository(config.push_to_hub) if config.push_to_hub else None
    title = os.path.basename((config.push_to_hub or os.path.abspath(config.output_dir)).rstrip("/"))
    card = "" if keeps else _card(title, texts, model, config.vqgan)
    # config.json makes the folder a tokenizer, and is written last: after a kill, the command can run again.
    os.makedirs(config.output_dir, exist_ok=True)
    if card:
        with atomic_file(os.path.join(config.output_dir, CARD_FILE)) as file:
            file.write(card.encode())
    files = [*weights.save(model, config.output_dir), CARD_FILE]
    print(
        f"{config.output_dir}: {model.config.num_embeddings} codes; images of {model.config.resolution} pixels a side, "
        f"{model.config.tokens_per_image} tokens each"
    )
    with prefix_errors(f"--push_to_hub={config.push_to_hub}"):
        if config.push_to_hub:
            print(f"uploaded to {upload_files(config.push_to_hub, config.output_dir, files, parent)}")


def _card(title: str, texts: CardTexts, model: VQGAN, source: str) -> str:
    """Returns the model card. `source` is the folder `vqgan` of a run of train_vqgan, or a tokenizer of any origin."""
    config, run_directory = model.config, os.path.dirname(os.path.abspath(source))
    low, high = config.pixel_range
    record = _record(run_directory) if os.path.basename(os.path.abspath(source)) == "vqgan" else {}
    metrics = last_metrics(run_directory, record.get("step", 0)) if record else {}
    settings = {
        "side of an image": f"{config.resolution} pixels",
        "tokens of an image": config.tokens_per_image,
        "codes": config.num_embeddings,
        "pixels inside the network": f"{low} to {high}",
        "parameters": sum(array.size for array in weights.parameters(model).values()),
        "name in records and checkpoints": weights.digest(model),
        "converted from": public_name(source),
    }
    input_dirs = str(record.get("flags", {}).get("input_dirs", ""))
    folders = ", ".join(last_part(folder) for folder in split_paths(input_dirs))
    figures = {name: metrics[name] for name in ("step", "psnr", "codes_used") if metrics.get(name) is not None}
    sections = {
        "Tokenizer": card_table(settings),
        "Data": "\n\n".join(text for text in (texts.data, f"Folders: {folders}." if folders else "") if text),
        "Figures": card_table(figures) if figures else "",
        "Use": _USE,
    }
    return card_text(title, _SUMMARY, texts, {"tags": ["image-tokenizer", "vqgan", "easylm-lvm"]}, sections)


def _record(run_directory: str) -> Mapping[str, Any]:
    """Returns the metadata of a run of train_vqgan, or an empty mapping."""
    path = os.path.join(run_directory, "metadata.json")
    record = load_metadata(path) if os.path.isfile(path) else {}
    return record if "vqgan_config" in record else {}


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
