"""Checkpoints of low-rank adapters: merged with their frozen parameters, or in the format of the PEFT library."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from EasyLM import checkpoints
from EasyLM.checkpoints import Entry
from EasyLM.checkpoints.safetensors_file import tensor_entry, write_safetensors
from EasyLM.errors import UserError
from EasyLM.models.llama import hf_layout
from EasyLM.models.llama.checkpoint_record import record_path
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.models.llama.lora import LoRAConfig
from EasyLM.storage import split_revision


@dataclasses.dataclass(frozen=True)
class RecordedLoRA:
    """What the metadata of a checkpoint says about its adapters.

    Attributes:
      settings: rank, alpha, dropout and targets.
      origin: PREFIX::PATH of the frozen parameters.
    """

    settings: LoRAConfig
    origin: str


def recorded_lora(prefix: str, path: str) -> RecordedLoRA | None:
    """Returns what the checkpoint `prefix::path` records about its adapters, or None if it holds whole parameters.

    Raises:
      UserError: if its metadata is broken.
    """
    source = record_path(prefix, path)
    metadata = checkpoints.load_metadata(source) if source else {}
    values = metadata.get("llama_config", {}).get("lora")
    if not values:
        return None
    try:
        settings = LoRAConfig(**{**values, "targets": tuple(values["targets"])})
        return RecordedLoRA(settings, metadata["started_from"][0])
    except (TypeError, KeyError, IndexError) as error:
        raise UserError(f"{source}: lora: not the settings of adapters ({type(error).__name__}: {error})") from None


def open_merged(spec: str, lora: RecordedLoRA) -> list[Entry]:
    """Returns the parameters of a checkpoint of adapters as entries of whole kernels, W + scale * A B.

    Raises:
      UserError: if the frozen parameters cannot be read, or do not fit the adapters.
    """
    adapters = {entry.key: entry for entry in checkpoints.open_checkpoint(spec)}
    try:
        frozen = checkpoints.open_checkpoint(lora.origin, hf_layout.CHECKPOINT_FORMATS)
    except UserError as error:
        raise UserError(f"{spec}: holds adapters of {lora.origin}: {error}") from None
    opened = []
    for entry in frozen:
        a, b = (adapters.pop((*entry.key[:-1], "adapter", name), None) for name in ("lora_a", "lora_b"))
        opened.append(entry if a is None or b is None else _merged(entry, a, b, lora.settings.scale))
    if adapters:
        raise UserError(f"{spec}: its adapters do not belong to {lora.origin}: {'/'.join(next(iter(adapters)))}")
    return opened


def _merged(kernel: Entry, a: Entry, b: Entry, scale: float) -> Entry:
    def read_into(out: np.ndarray) -> None:
        added_IO = scale * (a.read().astype(np.float32) @ b.read().astype(np.float32))
        np.copyto(out, kernel.read().astype(np.float32) + added_IO, casting="unsafe")

    return dataclasses.replace(kernel, read_into=read_into)


def write_peft(directory: str, config: LLaMAConfig, lora: RecordedLoRA, entries: Sequence[Entry], base: str) -> None:
    """Writes adapter_model.safetensors and adapter_config.json, as `peft.PeftModel.from_pretrained` reads them.

    Args:
      base: the path or name of the frozen parameters, for PEFT.
    """
    tensors = []
    for entry in entries:
        *path, _, matrix = entry.key  # ..., "wq", "adapter", "lora_a"
        name = hf_layout.hf_name((*path, "kernel"))
        array = entry.read().astype(np.float32)
        # The rotary order of a head concerns the outputs alone.
        array = hf_layout.to_hf(name, array, config.head_dim) if matrix == "lora_b" else array.T
        module = name.removesuffix(".weight")
        letter = "A" if matrix == "lora_a" else "B"
        tensors.append(tensor_entry(f"base_model.model.{module}.lora_{letter}.weight", array))
    with open(os.path.join(directory, "adapter_model.safetensors"), "wb") as weights:
        write_safetensors(weights, tensors)
    with open(os.path.join(directory, "adapter_config.json"), "w", encoding="utf-8") as file:
        json.dump(_peft_config(lora, base), file, indent=2)


def _peft_config(lora: RecordedLoRA, base: str) -> dict[str, Any]:
    name, revision = split_revision(base)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "r": lora.settings.rank,
        "lora_alpha": lora.settings.alpha,
        "lora_dropout": lora.settings.dropout,
        "target_modules": list(lora.settings.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
