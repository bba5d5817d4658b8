"""Turns a streaming checkpoint into a directory of Orbax, or such a directory into a streaming file, and casts it.

    python -m EasyLM.models.llama.convert_checkpoint --load_checkpoint=PREFIX::PATH --output=DIR

The output is a directory with the state, `metadata.json`, `dataset.json`, and for a streaming file `checksums.json`.
The command holds one array in memory at a time while it writes a streaming file, and all of them for Orbax.
"""

import os

from ml_collections import ConfigDict

from EasyLM import checkpoints, flags
from EasyLM.checkpoints import Conversion, is_orbax_state, read_orbax
from EasyLM.errors import UnavailableError, UserError, error_line
from EasyLM.flags import Flag
from EasyLM.storage import flush_to_disk, flush_tree_to_disk, lock_output_folder, scratch_folder

_FORMATS = {**checkpoints.CHECKPOINT_FORMATS, "orbax": read_orbax}  # orbax:: stands for all that is in the directory

FLAGS = {
    "load_checkpoint": Flag(
        "",
        f"PREFIX::PATH, with one of the prefixes {', '.join(_FORMATS)}. trainstate:: reads a streaming file or a "
        "directory of Orbax; orbax:: reads all that the directory holds, a train state or parameters.",
        required=True,
    ),
    "output": Flag("", "New directory for the converted checkpoint.", required=True),
    "format": Flag(
        "",
        "Format of the output. Empty: the other one, orbax for a file and streaming for a directory of Orbax.",
        choices=("", "streaming", "orbax"),
    ),
    "dtype": Flag(
        "",
        "Type of the parameters; the optimizer's state keeps its types. Empty: unchanged.",
        choices=("", *checkpoints.FLOAT_DTYPES),
        aliases=flags.DTYPE_ALIASES,
    ),
}


def main(config: ConfigDict) -> None:
    """Converts the checkpoint. The output directory is created only when its files are complete."""
    with lock_output_folder(config.output, "output"):
        if os.path.lexists(config.output):
            raise UserError(f"--output={config.output}: exists; name a new directory")
        _convert(config)


def _convert(config: ConfigDict) -> None:
    name = f"--load_checkpoint={config.load_checkpoint}"
    prefix, path = checkpoints.parse_spec(config.load_checkpoint, _FORMATS, name)
    spec = f"{prefix}::{path}"
    entries = checkpoints.open_checkpoint(spec, _FORMATS)
    conversion = Conversion(spec, entries, checkpoints.FLOAT_DTYPES.get(config.dtype))
    from_orbax = prefix == "orbax" or is_orbax_state(path)
    to_orbax = config.format == "orbax" or not (config.format or from_orbax)
    try:
        with scratch_folder(config.output) as temporary:
            state = (conversion.write_orbax if to_orbax else conversion.write_streaming)(temporary)
            conversion.write_sidecars(temporary)
            flush_tree_to_disk(temporary)
            os.rename(temporary, config.output.rstrip("/"))
            flush_to_disk(os.path.dirname(os.path.abspath(config.output)))  # now the user may delete the original
    except (OSError, UnavailableError) as error:
        raise UserError(f"--output={config.output}: cannot be written ({error_line(error)})") from error
    print(f"converted; load it as {checkpoints.PREFIX_OF[state]}::{config.output.rstrip('/')}/{state}")


def cli() -> None:
    """Runs `main` with the flags of the command line."""
    flags.run(main, FLAGS)


if __name__ == "__main__":
    cli()
