"""Exports a checkpoint as a Hugging Face LLaMA: `python -m EasyLM.models.llama.convert_easylm_to_hf --flag=value`.

One tensor is in memory at a time, so that a model of any size is exported on a small machine.
"""

import json
import os
import shutil

from tqdm import tqdm

from EasyLM import checkpoints, flags
from EasyLM.checkpoints import Entry
from EasyLM.errors import UserError, choose
from EasyLM.flags import Flag
from EasyLM.models.llama import hf_files, hf_layout
from EasyLM.models.llama.llama_config import PRESETS, LLaMAConfig, config_beside

FLAGS = {
    "load_checkpoint": Flag(
        "", "PREFIX::FILE of the parameters: trainstate_params, params, flax_params, ...", required=True
    ),
    "model_size": Flag("", "Preset of the model; empty: as the metadata beside the checkpoint says."),
    "output_dir": Flag(
        "", "Directory for config.json, generation_config.json and the safetensors shards.", required=True
    ),
    "float_dtype": Flag(
        "", "Type of the exported weights; empty: the checkpoint's.", choices=("", *checkpoints.FLOAT_DTYPES)
    ),
}


def main(config) -> None:
    """Exports as the flags say. The output appears when it is whole."""
    if found := hf_files.holds_model(config.output_dir):
        raise UserError(f"--output_dir={config.output_dir}: already holds a model ({found}); name another directory")
    if config.load_checkpoint.startswith("trainstate::"):
        raise UserError(
            f"--load_checkpoint={config.load_checkpoint}: only parameters are exported: trainstate_params::"
        )
    entries = checkpoints.open_checkpoint(config.load_checkpoint)
    model = _model(config)
    dtype = checkpoints.FLOAT_DTYPES.get(config.float_dtype)
    export(model, hf_layout.hf_tensors(model, entries, config.load_checkpoint, dtype), config.output_dir)
    print(f"exported to {config.output_dir}")


def _model(config) -> LLaMAConfig:
    if config.model_size:
        return PRESETS[choose("--model_size", config.model_size, PRESETS)]
    path = config.load_checkpoint.partition("::")[2]
    found = config_beside(path)
    if found is None:
        raise UserError(
            f"--model_size is empty, and no metadata.json lies beside {path}: give one of {', '.join(PRESETS)}"
        )
    return found


def export(model: LLaMAConfig, tensors: list[Entry], output_dir: str) -> None:
    """Writes a model directory: under a temporary name, then in place; `config.json`, which makes it a model, last."""
    temporary = f"{output_dir.rstrip('/')}.tmp-{os.getpid()}"
    try:
        os.makedirs(temporary)
        with tqdm(total=len(tensors), desc="exporting", unit="tensor") as bar:
            hf_files.write_safetensors(temporary, [hf_files.counted(tensor, bar) for tensor in tensors])
        dtype = tensors[0].dtype
        for name, values in {
            "generation_config.json": hf_layout.generation_config(model),
            "config.json": hf_layout.hf_config(model, dtype),
        }.items():
            with open(os.path.join(temporary, name), "w", encoding="utf-8") as file:
                json.dump(values, file, indent=2)
        if not os.path.exists(output_dir):
            os.rename(temporary, output_dir)
            return
        for name in sorted(os.listdir(temporary), key=lambda name: name == "config.json"):
            os.replace(os.path.join(temporary, name), os.path.join(output_dir, name))
    except OSError as error:
        raise UserError(f"--output_dir={output_dir}: could not be written ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cli() -> None:
    """Runs the command with the flags of the command line."""
    flags.run(main, FLAGS)


if __name__ == "__main__":
    cli()
