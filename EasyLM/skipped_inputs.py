"""Unusable inputs: reported when they occur, counted, and listed in a build's report.

An `UnavailableError` is not the fault of an input: callers do not add the input here, and let the error through.
"""

import sys
from collections.abc import Mapping

from tqdm import tqdm

from EasyLM.errors import UserError, one_line


class TooManySkippedError(UserError):
    """More inputs cannot be used than `max_errors` allows."""


class SkippedInputs:
    """The skipped inputs of a command, at most `max_errors`.

    Attributes:
      reasons: path -> message of each skipped input.
    """

    def __init__(self, max_errors: int):
        self._max_errors = max_errors
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def copy(self) -> "SkippedInputs":
        """Returns the same inputs, to which others are added independently."""
        copied = SkippedInputs(self._max_errors)
        copied.restore(self.reasons)
        return copied

    def restore(self, reasons: Mapping[str, str]) -> None:
        """Adds the inputs that an interrupted build skipped, without reporting them again."""
        self.reasons |= reasons

    def add(self, path: str, reason: str) -> None:
        """Reports an input on standard error, once. The reason must contain its path.

        Raises:
          TooManySkippedError: with the reason, if `max_errors` other inputs are skipped already.
        """
        if path in self.reasons:
            return
        if len(self) >= self._max_errors:
            earlier = f", after {len(self)} others" if len(self) else ""
            raise TooManySkippedError(
                f"{reason}{earlier} (--max_errors={self._max_errors}; a higher value skips such inputs)"
            )
        self.reasons[path] = reason
        tqdm.write(f"skipped: {one_line(reason)}", file=sys.stderr)
