"""Imports a Hugging Face LLaMA: `python -m EasyLM.models.llama.convert_hf_to_easylm --hf_model=DIR --output_file=FILE`.

The command reads safetensors files, or `.bin` files without torch. It holds one tensor in memory at a time. It writes
the model's settings to `metadata.json` beside the output file, and a checksum of each array to `checksums.json`.
Training, export and evaluation read these files.
"""

import dataclasses
import os
from typing import BinaryIO

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from EasyLM import checkpoints, flags
from EasyLM.checkpoints import Entry, checksums, streaming
from EasyLM.data.tokenizer_names import TOKENIZER_KEY
from EasyLM.errors import UserError, prefix_errors
from EasyLM.flags import Flag
from EasyLM.models.llama import hf_files, hf_layout
from EasyLM.models.llama.checkpoint_record import recorded_tokenizer
from EasyLM.storage import atomic_file, lock_output_folder, path_on_disk, write_json

FLAGS = {
    "hf_model": Flag(
        "", "Hugging Face model: a directory, or a name on the Hub.", required=True, reads_local_disk=True
    ),
    "output_file": Flag(
        "", "File to write; it is loaded as params::FILE, or flax_params::FILE if not streaming.", required=True
    ),
    "streaming": Flag(True, "Write a streaming checkpoint; else plain flax msgpack."),
}


def main(config: ConfigDict) -> None:
    """Imports the model. The output file is created only when it is complete."""
    directory = os.path.dirname(os.path.abspath(config.output_file))
    with lock_output_folder(directory, "output_file"):
        _import(config, directory)


def _import(config: ConfigDict, directory: str) -> None:
    metadata_path = os.path.join(directory, "metadata.json")
    checksums_path = os.path.join(directory, "checksums.json")
    taken = [path for path in (config.output_file, metadata_path, checksums_path) if os.path.exists(path)]
    if taken and (config.output_file in taken or not _left_by_a_kill(metadata_path, config.output_file)):
        raise UserError(f"--output_file={config.output_file}: {taken[0]} exists; name a file in a directory of its own")
    with prefix_errors(f"--hf_model={config.hf_model}"):
        source = path_on_disk(config.hf_model, "a Hugging Face model")
    model, entries = hf_layout.read_model(source)
    tokenizer = recorded_tokenizer("huggingface", source)
    sections = {"llama_config": dataclasses.asdict(model)} | ({TOKENIZER_KEY: tokenizer} if tokenizer else {})
    metadata = checkpoints.make_metadata(0, config.to_dict(), **sections)
    os.makedirs(directory, exist_ok=True)
    try:
        with atomic_file(config.output_file) as file, tqdm(total=len(entries), desc="importing", unit="tensor") as bar:
            arrays = _write(file, [hf_files.with_progress(entry, bar) for entry in entries], config.streaming)
            table = checksums.make_table(os.path.basename(config.output_file), file.tell(), arrays)
            # Before the output has its name: after a kill, the same command can run again.
            write_json(metadata_path, metadata)
            write_json(checksums_path, table)
    except OSError as error:
        raise UserError(f"--output_file={config.output_file}: cannot be written ({error.strerror})") from error
    prefix = "params" if config.streaming else "flax_params"
    print(f"imported; load it as {prefix}::{config.output_file}")


def _left_by_a_kill(metadata_path: str, output_file: str) -> bool:
    """Returns whether an import to the same output has written the metadata."""
    record = checkpoints.load_metadata(metadata_path) if os.path.exists(metadata_path) else {}
    return "hf_model" in record.get("flags", {}) and record["flags"].get("output_file") == output_file


def _write(file: BinaryIO, entries: list[Entry], as_stream: bool) -> dict[tuple[str, ...], str]:
    """Writes parameters as the LVM release does, with keys that lack the leading `params`. Returns their checksums."""
    arrays: dict[tuple[str, ...], str] = {}

    def with_checksum(entry: Entry) -> Entry:
        def read_into(out: np.ndarray) -> None:
            entry.read_into(out)
            arrays[entry.key] = checksums.array_checksum(entry.key, out)

        return dataclasses.replace(entry, read_into=read_into)

    below_params = [with_checksum(entry.renamed(entry.key[1:])) for entry in entries]
    if as_stream:
        for entry in below_params:
            streaming.write_entry(file, entry.key, entry.read())
    else:
        streaming.write_flax(file, below_params)
    return arrays


def cli() -> None:
    """Runs `main` with the flags of the command line."""
    flags.run(main, FLAGS)


if __name__ == "__main__":
    cli()
