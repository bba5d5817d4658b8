"""Inputs that cannot be used: named as they are met, counted, and listed in the end."""

import sys

from tqdm import tqdm

from EasyLM.errors import UserError


class Problems:
    """Each unusable input once, by its path; more than allowed are an error (so this list is bounded, too)."""

    def __init__(self, allowed: int):
        self.allowed = allowed
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def restore(self, reasons: dict[str, str]) -> None:
        """Those that a stopped build had met."""
        self.reasons |= reasons

    def add(self, path: str, reason: str) -> None:
        """Names the input on standard error, unless it has been; the reason holds the path.

        Raises:
          UserError: if it is one too many.
        """
        if path in self.reasons:
            return
        if len(self) >= self.allowed:
            before = f", after {len(self)} others" if len(self) else ""
            raise UserError(f"{reason}{before} (--max_errors={self.allowed}; a higher one skips such inputs)")
        self.reasons[path] = reason
        tqdm.write(f"skipped: {reason}", file=sys.stderr)
