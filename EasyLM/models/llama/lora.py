"""Settings of low-rank adapters (LoRA, arXiv 2106.09685): small trained matrices beside frozen kernels.

A kernel W [I, O] becomes W + alpha / rank * A B, with A [I, R] and B [R, O], where R = rank. At the start B is 0, and
the model is that of the frozen parameters. The names of the targets are those of the PEFT library.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from EasyLM.errors import UserError
from EasyLM.flags import Flag

# Name of a linear layer in PEFT -> its path in a block.
TARGETS = {
    "q_proj": ("attention", "wq"),
    "k_proj": ("attention", "wk"),
    "v_proj": ("attention", "wv"),
    "o_proj": ("attention", "wo"),
    "gate_proj": ("feed_forward", "w1"),
    "down_proj": ("feed_forward", "w2"),
    "up_proj": ("feed_forward", "w3"),
}

LORA_FLAGS = {
    "rank": Flag(
        0, "Train adapters of this rank beside the frozen parameters of --load_checkpoint; 0: no adapters.", least=0
    ),
    "alpha": Flag(0.0, "The adapters' output is multiplied by alpha / rank; 0: alpha is twice the rank.", least=0),
    "dropout": Flag(0.0, "Share of the adapters' inputs that training drops.", least=0, below=1),
    "targets": Flag(",".join(TARGETS), "Comma list of the linear layers with adapters."),
}


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """The settings of the adapters; see LORA_FLAGS."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """The factor of the adapters' output."""
        return self.alpha / self.rank

    @classmethod
    def from_flags(cls, values: Mapping[str, Any]) -> "LoRAConfig | None":
        """Returns the settings that the flags `--lora.*` give, or None if the rank is 0.

        Raises:
          UserError: if there is no target, or an unknown one.
        """
        if not values["rank"]:
            return None
        names = tuple(name.strip() for name in values["targets"].split(",") if name.strip())
        unknown = [name for name in names if name not in TARGETS]
        if unknown or not names:
            problem = f"unknown {', '.join(unknown)}" if unknown else "empty"
            raise UserError(f"--lora.targets={values['targets']}: {problem}; choose from {', '.join(TARGETS)}")
        targets = tuple(name for name in TARGETS if name in names)  # one order, each once
        return cls(values["rank"], values["alpha"] or 2.0 * values["rank"], values["dropout"], targets)
