"""Dataclass fields that are settings: their metadata holds the flag that sets them."""

import dataclasses
from typing import Any

from EasyLM.flags import Flag
from EasyLM.models.llama.remat_policies import AUTO, REMAT_POLICIES


def setting(default: Any, help: str, **limits: Any) -> Any:
    """Returns a dataclass field. Its metadata holds the flag that sets the field."""
    return dataclasses.field(default=default, metadata={"flag": Flag(default, help, **limits)})


def size(default: float, help: str, **limits: Any) -> Any:
    """Returns the field of a number above 0."""
    return setting(default, help, above=0, **limits)


def rate(help: str) -> Any:
    """Returns the field of a probability or a share, 0 by default."""
    return setting(0.0, help, least=0, below=1)


def remat(part: str) -> Any:
    """Returns the field of a rematerialization policy for a part of the model."""
    help = f"What {part} saves for its backward pass, which recomputes the rest."
    return setting("", help, choices=tuple(REMAT_POLICIES))


def automatic_remat(part: str) -> Any:
    """Returns the field of a rematerialization policy that follows from the devices' memory by default."""
    help = (
        f"What {part} saves for its backward pass, which recomputes the rest. auto: as much as fits into the memory of "
        "the devices."
    )
    return setting(AUTO, help, choices=(AUTO, *REMAT_POLICIES))
