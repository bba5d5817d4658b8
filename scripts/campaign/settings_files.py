"""Kinds: JSON files and pickles of settings. The reference is `json` of the standard library."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from campaign.attempts import Attempt, require_equal
from campaign.mutations import mutated, mutated_json
from EasyLM import checkpoints
from EasyLM.models.llama import hf_layout, llama_config
from EasyLM.storage import read_json
from EasyLM.vocab import SPECIAL_IDS
from tokenizer.vqgan import VQGANConfig

_GOLDEN = pathlib.Path(__file__).parents[2] / "tests" / "golden" / "lvm_tiny" / "step15"
_MODEL = llama_config.PRESETS["vqlm_debug"]


def settings(folder: pathlib.Path) -> Attempt:
    """Mutated metadata, data states, and configurations of models and tokenizers."""
    metadata = checkpoints.make_metadata(7, {"seed": 3, "optimizer": {"accumulate_gradient_steps": 2}})
    files: dict[str, tuple[dict, Callable[[str], Any]]] = {
        "metadata.json": (
            {**metadata, "llama_config": dataclasses.asdict(_MODEL), "started_from": [""]},
            checkpoints.load_metadata,
        ),
        "dataset.json": ({"rows_consumed": 56, "source": {"seq_length": 8}}, checkpoints.load_dataset_state),
        "llama.json": (dataclasses.asdict(_MODEL), _llama_config),
        "hugging_face.json": (hf_layout.hf_config(_MODEL, np.dtype("float32")), _llama_config),
        "config.json": (dataclasses.asdict(VQGANConfig()), _vqgan_config),
    }

    def attempt(rng: np.random.Generator, case: pathlib.Path) -> None:
        name = str(rng.choice([*files]))
        value, load = files[name]
        path = case / name
        path.write_bytes(
            mutated_json(rng, value) if rng.random() < 0.7 else mutated(rng, json.dumps(value, indent=2).encode())
        )
        got = load(str(path))
        written = json.loads(path.read_bytes())
        for key, item in got.items():
            if written.get(key) is not None:  # null stands for the default, 1 for 1.0
                require_equal(json.dumps(item), json.dumps(type(item)(written[key])), key)

    return attempt


def _llama_config(path: str) -> dict:
    """Returns the settings of a model under their names in the file, without those that may be replaced."""
    config = dataclasses.asdict(llama_config.load_config(f"json::{path}"))
    if config["num_key_value_heads"] == 0:  # as many as there are heads
        del config["num_key_value_heads"]
    return {name: value for name, value in config.items() if name not in (*SPECIAL_IDS, "rope_scaling")}


def _vqgan_config(path: str) -> dict:
    return dataclasses.asdict(VQGANConfig.from_dict(read_json(path), path))


def pickles(folder: pathlib.Path) -> Attempt:
    """Mutated pickles of the LVM release. They have no reference: their content must be plain values."""
    whole = {path.name: path.read_bytes() for path in _GOLDEN.glob("*.pkl")}

    def attempt(rng: np.random.Generator, case: pathlib.Path) -> None:
        name = str(rng.choice([*whole]))
        path = case / name
        path.write_bytes(mutated(rng, whole[name]))
        load = checkpoints.load_metadata if name.startswith("metadata") else checkpoints.load_dataset_state
        _require_plain(load(str(path)))

    return attempt


def _require_plain(value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _require_plain(key)
            _require_plain(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _require_plain(item)
    else:
        require_equal(type(value) in (str, int, float, bool, bytes, type(None)), True, f"a plain value ({type(value)})")
