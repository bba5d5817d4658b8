"""Doubles the layers of a Hugging Face LLaMA that answers as before: `python scripts/deepen_model.py FROM TO`.

After each layer comes a copy of it whose two outputs are zero, so it adds nothing until training says otherwise. To
train a small model and to deepen it takes less time than the deep one from the beginning (progressive stacking: Gong et
al., "Efficient Training of BERT by Progressively Stacking", ICML 2019; outputs of zero: Chen et al., "Net2Net",
arXiv 1511.05641).
"""

import argparse
import json
import pathlib
import re

import numpy as np
from safetensors.flax import load_file, save_file

_OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=pathlib.Path, help="folder of config.json and one model.safetensors")
    parser.add_argument("target", type=pathlib.Path, help="folder to write")
    arguments = parser.parse_args()
    config = json.loads((arguments.source / "config.json").read_text())
    tensors = deepened(load_file(arguments.source / "model.safetensors"))
    arguments.target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, arguments.target / "model.safetensors")
    config["num_hidden_layers"] *= 2
    (arguments.target / "config.json").write_text(json.dumps(config, indent=2))


def deepened(tensors: dict) -> dict:
    """The tensors of the deeper model, by their names."""
    deep = {}
    for name, array in tensors.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if layer is None:
            deep[name] = array
            continue
        number, rest = int(layer[1]), layer[2]
        deep[f"model.layers.{2 * number}.{rest}"] = array
        deep[f"model.layers.{2 * number + 1}.{rest}"] = np.zeros_like(array) if rest in _OUTPUTS else array
    return deep


if __name__ == "__main__":
    main()
