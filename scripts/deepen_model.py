"""Doubles the layers of a Hugging Face LLaMA that answers as before: `python scripts/deepen_model.py FROM TO`.

After each layer comes a copy of it whose two outputs are zero, so it adds nothing until training says otherwise. To
train a small model and to deepen it takes less time than the deep one from the beginning (progressive stacking: Gong et
al., "Efficient Training of BERT by Progressively Stacking", ICML 2019; outputs of zero: Chen et al., "Net2Net",
arXiv 1511.05641).
"""

import json
import pathlib
import re
import sys

import numpy as np
from safetensors.flax import load_file, save_file

source, target = map(pathlib.Path, sys.argv[1:])
deep = {}
for name, array in load_file(source / "model.safetensors").items():
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if layer is None:
        deep[name] = array
        continue
    number, rest = int(layer[1]), layer[2]
    deep[f"model.layers.{2 * number}.{rest}"] = array
    adds = rest in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
    deep[f"model.layers.{2 * number + 1}.{rest}"] = np.zeros_like(array) if adds else array
config = json.loads((source / "config.json").read_text())
config["num_hidden_layers"] *= 2
target.mkdir(parents=True, exist_ok=True)
save_file(deep, target / "model.safetensors")
(target / "config.json").write_text(json.dumps(config, indent=2))
