"""Doubles the layers of a Hugging Face LLaMA without changing its outputs.

    python scripts/deepen_model.py --hf_model=DIR --output_dir=DIR

Inserts a copy after each layer. The two output matrices of the copy are zero, so it has no effect until it is trained.
Training a shallow model and deepening it takes less time than training the deep one from the start (progressive
stacking: Gong et al., "Efficient Training of BERT by Progressively Stacking", ICML 2019; zero outputs: Chen et al.,
"Net2Net", arXiv 1511.05641).
"""

import json
import pathlib
import re
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from EasyLM.checkpoints.safetensors_file import read_safetensors, tensor_entry, write_safetensors
from EasyLM.errors import prefix_errors
from EasyLM.flags import Flag, run
from EasyLM.storage import atomic_file, path_on_disk, read_json

OUTPUT_MATRICES = ("self_attn.o_proj.weight", "mlp.down_proj.weight")

FLAGS = {
    "hf_model": Flag(
        "",
        "Directory of the model, or its name on the Hub: config.json and one model.safetensors.",
        required=True,
        reads_local_disk=True,
    ),
    "output_dir": Flag("", "Directory of the deeper model.", required=True),
}


def main(config: ConfigDict) -> None:
    """Writes the deeper model."""
    with prefix_errors(f"--hf_model={config.hf_model}"):
        source = pathlib.Path(path_on_disk(config.hf_model, "a Hugging Face model"))
    target = pathlib.Path(config.output_dir)
    settings = read_json(source / "config.json")
    tensors = deepened({tensor.key[0]: tensor.read() for tensor in read_safetensors(source / "model.safetensors")})
    target.mkdir(parents=True, exist_ok=True)
    with atomic_file(target / "model.safetensors") as file:
        write_safetensors(file, [tensor_entry(name, array) for name, array in tensors.items()])
    settings["num_hidden_layers"] *= 2
    (target / "config.json").write_text(json.dumps(settings, indent=2))


def deepened(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors of the deeper model by name."""
    deep = {}
    for name, array in tensors.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if layer is None:
            deep[name] = array
            continue
        number, rest = int(layer[1]), layer[2]
        deep[f"model.layers.{2 * number}.{rest}"] = array
        deep[f"model.layers.{2 * number + 1}.{rest}"] = np.zeros_like(array) if rest in OUTPUT_MATRICES else array
    return deep


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
