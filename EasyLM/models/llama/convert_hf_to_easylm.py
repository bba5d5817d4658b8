"""Imports a Hugging Face LLaMA: `python -m EasyLM.models.llama.convert_hf_to_easylm --hf_model=DIR --output_file=FILE`.

Reads safetensors, or torch's `.bin` (that needs torch). One tensor is in memory at a time. The model's settings are
written beside the file as `metadata.json`, from where training, export and evaluation read them.
"""

import dataclasses
import os

from tqdm import tqdm

from EasyLM import checkpoints, flags
from EasyLM.checkpoints import streaming
from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.models.llama import hf_files, hf_layout
from EasyLM.storage import atomic_file, write_json

FLAGS = {
    "hf_model": Flag("", "Directory of the Hugging Face model: config.json and weights.", required=True),
    "output_file": Flag(
        "", "File to write; it is loaded as params::FILE, or flax_params::FILE if not streaming.", required=True
    ),
    "streaming": Flag(True, "Write a streaming checkpoint; else plain flax msgpack."),
}


def main(config) -> None:
    """Imports as the flags say. The output appears when it is whole."""
    directory = os.path.dirname(os.path.abspath(config.output_file))
    metadata = os.path.join(directory, "metadata.json")
    for path in (config.output_file, metadata):
        if os.path.exists(path):
            raise UserError(f"--output_file={config.output_file}: {path} exists; name a file in a directory of its own")
    model, entries = hf_layout.read_model(config.hf_model)
    facts = checkpoints.make_metadata(0, config.to_dict(), llama_config=dataclasses.asdict(model))

    def write_weights(file):
        with tqdm(total=len(entries), desc="importing", unit="tensor") as bar:
            write(file, [hf_files.counted(entry, bar) for entry in entries], config.streaming)

    os.makedirs(directory, exist_ok=True)
    try:
        with atomic_file(config.output_file) as file:
            write_weights(file)
        write_json(metadata, facts)
    except OSError as error:
        raise UserError(f"--output_file={config.output_file}: could not be written ({error.strerror})") from error
    prefix = "params" if config.streaming else "flax_params"
    print(f"imported; load it as {prefix}::{config.output_file}")


def write(file, entries, as_stream: bool) -> None:
    """Writes parameters as the release does: their paths begin below `params`."""
    entries = (dataclasses.replace(entry, key=entry.key[1:]) for entry in entries)
    if as_stream:
        for entry in entries:
            streaming.write_entry(file, entry.key, entry.read())
    else:
        streaming.write_flax(file, entries)


def cli() -> None:
    """Runs the command with the flags of the command line."""
    flags.run(main, FLAGS)


if __name__ == "__main__":
    cli()
