"""Exports a checkpoint as a Hugging Face LLaMA: `python -m EasyLM.models.llama.convert_easylm_to_hf --flag=value`.

A checkpoint of LoRA adapters becomes a directory for the PEFT library, or a whole model with --merge_lora=True. The
command holds one tensor in memory at a time, so the model may be larger than the machine's memory.
"""

import contextlib
import json
import os
from collections.abc import Callable
from functools import partial

import numpy as np
from ml_collections import ConfigDict

from EasyLM import checkpoints, flags
from EasyLM.checkpoints import Entry
from EasyLM.data.tokenizer_names import TOKENIZER_KEY
from EasyLM.errors import UserError, choose, prefix_errors
from EasyLM.flags import Flag, to_dataclass
from EasyLM.models.llama import hf_files, hf_layout
from EasyLM.models.llama.checkpoint_record import recorded_tokenizer
from EasyLM.models.llama.exported_card import exported_card
from EasyLM.models.llama.llama_config import PRESETS, LLaMAConfig, check_recorded, recorded_config
from EasyLM.models.llama.lora_checkpoint import open_merged, recorded_lora, write_peft
from EasyLM.progress import progress
from EasyLM.publishing import (
    CARD_FILE,
    CARD_FLAGS,
    PUSH_FLAG,
    CardTexts,
    keeps_card,
    prepare_repository,
    public_name,
    upload_files,
)
from EasyLM.storage import lock_output_folder, read_json, scratch_folder, write_json

FLAGS = {
    "load_checkpoint": Flag(
        "", "PREFIX::PATH of the parameters: trainstate_params, params, flax_params, ...", required=True
    ),
    "model_size": Flag("", "Preset, for a checkpoint without metadata. Metadata, if any, must have the same settings."),
    "output_dir": Flag(
        "", "Directory for config.json, generation_config.json and the safetensors shards.", required=True
    ),
    "max_shard_mb": Flag(
        hf_files.MAX_SHARD_MB, "Largest size of a weight file in MB; a larger tensor has its own file.", above=0
    ),
    "float_dtype": Flag(
        "",
        "Type of the exported weights; empty: the checkpoint's.",
        choices=("", *checkpoints.FLOAT_DTYPES),
        aliases=flags.DTYPE_ALIASES,
    ),
    "push_to_hub": PUSH_FLAG,
    "card": CARD_FLAGS,
    "merge_lora": Flag(False, "Export adapters merged into their frozen parameters; False: the adapters, for PEFT."),
}
_MODEL_FILES = ("config.json", "adapter_config.json")  # each makes its directory a model, and is moved last
_UNFINISHED = "unfinished_export.json"  # names the files that are being moved into an existing directory


def main(config: ConfigDict) -> None:
    """Exports the checkpoint. The output directory is created only when its files are complete."""
    with lock_output_folder(config.output_dir, "output_dir"):
        _export(config)


def _export(config: ConfigDict) -> None:
    existing = hf_files.model_file(config.output_dir)
    if existing and not os.path.exists(os.path.join(config.output_dir, _UNFINISHED)):
        raise UserError(f"--output_dir={config.output_dir}: already holds a model ({existing}); name another directory")
    if config.load_checkpoint.startswith("trainstate::"):
        raise UserError(
            f"--load_checkpoint={config.load_checkpoint}: only parameters are exported: use trainstate_params::"
        )
    prefix, path = checkpoints.parse_spec(
        config.load_checkpoint, checkpoints.CHECKPOINT_FORMATS, f"--load_checkpoint={config.load_checkpoint}"
    )
    lora = recorded_lora(prefix, path)
    if config.merge_lora and not lora:
        raise UserError(f"--merge_lora=True: {path} holds no adapters")
    with prefix_errors("--card", "."):
        texts = to_dataclass(CardTexts, config.card)
        keeps = keeps_card(config.output_dir, texts)
    entries = checkpoints.open_checkpoint(config.load_checkpoint)
    model = _model_config(config.model_size, prefix, path)
    title = os.path.basename((config.push_to_hub or os.path.abspath(config.output_dir)).rstrip("/"))
    make_card = partial(exported_card, title, texts, model, (prefix, path))
    parent = None
    if config.push_to_hub:
        with prefix_errors(f"--push_to_hub={config.push_to_hub}"):
            parent = prepare_repository(config.push_to_hub)
    if lora and not config.merge_lora:
        card = make_card(np.dtype(np.float32), lora)
        base = public_name(lora.origin) if config.push_to_hub else lora.origin.partition("::")[2]
        write = partial(write_peft, base=base, config=model, lora=lora, entries=entries)
        files = _write_directory(config.output_dir, "" if keeps else card, write)
    else:
        entries = open_merged(config.load_checkpoint, lora) if lora else entries
        dtype = checkpoints.FLOAT_DTYPES.get(config.float_dtype)
        tensors = hf_layout.hf_tensors(model, entries, config.load_checkpoint, dtype)
        tokenizer, card = recorded_tokenizer(prefix, path), make_card(tensors[0].dtype, None)
        files = export(model, tensors, config.output_dir, config.max_shard_mb, tokenizer, "" if keeps else card)
    print(f"exported to {config.output_dir}")
    if config.push_to_hub:
        with prefix_errors(f"--push_to_hub={config.push_to_hub}"):
            print(f"uploaded to {upload_files(config.push_to_hub, config.output_dir, {*files, CARD_FILE}, parent)}")


def _model_config(model_size: str, prefix: str, path: str) -> LLaMAConfig:
    """Returns the settings that the checkpoint `prefix::path` records, or without a record those of the preset."""
    model = recorded_config(prefix, path)
    if model_size:
        preset = PRESETS[choose("--model_size", model_size, PRESETS)]
        if model is None:
            return preset
        check_recorded(preset, model, f"--model_size={model_size}", path)
    if model is None:
        presets = ", ".join(PRESETS)
        raise UserError(f"--model_size is empty, and there is no metadata.json beside {path}: choose one of {presets}")
    return model


def export(
    model: LLaMAConfig,
    tensors: list[Entry],
    output_dir: str,
    max_shard_mb: float = hf_files.MAX_SHARD_MB,
    tokenizer: str | None = None,
    card: str = "",
) -> list[str]:
    """Writes a new model directory atomically. If the directory exists, moves the files into it, `config.json` last.

    Args:
      tokenizer: the image tokenizer that config.json names.
      card: the model card, which replaces one that is in the directory; empty: none is written.

    Returns:
      The names of the files.

    Raises:
      UserError: if the directory cannot be written.
    """

    def write(directory: str) -> None:
        with progress(total=len(tensors), desc="exporting", unit="tensor") as bar:
            hf_files.write_shards(directory, [hf_files.with_progress(tensor, bar) for tensor in tensors], max_shard_mb)
        for name, values in {
            "generation_config.json": hf_layout.generation_config(model),
            "config.json": hf_layout.hf_config(model, tensors[0].dtype)
            | ({TOKENIZER_KEY: tokenizer} if tokenizer else {}),
        }.items():
            with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
                json.dump(values, file, indent=2)

    return _write_directory(output_dir, card, write)


def _write_directory(output_dir: str, card: str, write: Callable[[str], None]) -> list[str]:
    """Calls `write` with a temporary directory, and moves its files to `output_dir`. Returns their names."""
    try:
        with scratch_folder(output_dir) as temporary:
            write(temporary)
            if card:
                with open(os.path.join(temporary, CARD_FILE), "w", encoding="utf-8") as file:
                    file.write(card)
            names = sorted(os.listdir(temporary), key=lambda name: name in _MODEL_FILES)
            if not os.path.exists(output_dir):
                os.rename(temporary, output_dir.rstrip("/"))
                return names
            _move_files(temporary, output_dir, names)
            return names
    except OSError as error:
        raise UserError(f"--output_dir={output_dir}: cannot be written ({error.strerror})") from error


def _move_files(source: str, directory: str, names: list[str]) -> None:
    """Moves files into an existing directory. First deletes those of an export that was killed here."""
    marker = os.path.join(directory, _UNFINISHED)
    if os.path.exists(marker):
        for name in read_json(marker, {"files": [str]})["files"]:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(directory, os.path.basename(name)))
    # Without the card, which its author may have edited since.
    write_json(marker, {"files": [name for name in names if name != CARD_FILE]})
    for name in names:
        os.replace(os.path.join(source, name), os.path.join(directory, name))
    os.remove(marker)


def cli() -> None:
    """Runs `main` with the flags of the command line."""
    flags.run(main, FLAGS)


if __name__ == "__main__":
    cli()
