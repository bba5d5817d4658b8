"""The settings that `gpu_day.train` tries for each preset, for a card with 80 GB.

The candidates of a preset are in the order of XLA's plan of their memory, because a process can only measure a peak
that rises.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from EasyLM.flags import defaults
from EasyLM.models.llama.lora import LORA_FLAGS, LoRAConfig

# Bytes per parameter of a float32 state with its optimizer (12), and of copies and gradients in bf16 (4). vqlm_7b needs
# more than a card with 80 GB has. Adapters fit, and half of the layers, which have the same rates per layer.
STATE_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings of one measurement.

    Attributes:
      rows: rows of a batch.
      settings: changes to the preset.
      lora_rank: train adapters of this rank beside frozen parameters; 0: train all parameters.
    """

    rows: int
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lora_rank: int = 0

    @property
    def name(self) -> str:
        """The settings as text."""
        changes = [f"{name}={value}" for name, value in self.settings.items()]
        adapters = [f"LoRA of rank {self.lora_rank}"] if self.lora_rank else []
        return ", ".join([f"{self.rows} rows", *adapters, *changes])

    @property
    def lora(self) -> LoRAConfig | None:
        """The settings of the adapters, those of the trainer's flags with this rank."""
        return LoRAConfig.from_flags({**defaults(LORA_FLAGS), "rank": self.lora_rank})


_PROJECTIONS = {"remat_block": "projections_and_attention_saveable"}
_LEAST = {"remat_block": "nothing_saveable"}
_UNROLLED = {"scan_layers": False}
_HALF = {"num_hidden_layers": 16}
CANDIDATES = {
    "vqlm_debug": [Candidate(2), Candidate(2, lora_rank=4)],
    "vqlm_100m": [Candidate(16, _PROJECTIONS | _UNROLLED), Candidate(16, _PROJECTIONS)],
    "vqlm_1b": [Candidate(4, _PROJECTIONS | _UNROLLED), Candidate(4, _PROJECTIONS)],
    "vqlm_3b": [Candidate(2, _PROJECTIONS), Candidate(3, _PROJECTIONS | _UNROLLED)],
    "vqlm_7b": [
        Candidate(2, _LEAST, lora_rank=16),
        Candidate(1, _PROJECTIONS, lora_rank=16),
        Candidate(2, _HALF | _PROJECTIONS | _UNROLLED),
        Candidate(2, _HALF | _PROJECTIONS),
    ],
}
