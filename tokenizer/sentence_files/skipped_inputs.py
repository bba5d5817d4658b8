"""Inputs that cannot be used: reported as they occur, counted, and listed in a build's report."""

import sys
from collections.abc import Mapping

from tqdm import tqdm

from EasyLM.errors import UserError


class SkippedInputs:
    """Reasons of the unusable inputs by path, at most as many as the flag `--max_errors` allows.

    Attributes:
      reasons: the message of each skipped input by its path.
    """

    def __init__(self, max_errors: int):
        self._max_errors = max_errors
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def restore(self, reasons: Mapping[str, str]) -> None:
        """Adds the inputs that an interrupted build skipped."""
        self.reasons |= reasons

    def add(self, path: str, reason: str) -> None:
        """Reports an input on standard error, once. The reason contains its path.

        Raises:
          UserError: if too many inputs were skipped.
        """
        if path in self.reasons:
            return
        if len(self) >= self._max_errors:
            earlier = f", after {len(self)} others" if len(self) else ""
            raise UserError(f"{reason}{earlier} (--max_errors={self._max_errors}; a higher one skips such inputs)")
        self.reasons[path] = reason
        tqdm.write(f"skipped: {reason}", file=sys.stderr)
