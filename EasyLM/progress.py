"""Progress of long work: a bar on a terminal, one line per minute in the log of a job."""

import contextlib
import sys
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

LOG_SECONDS = 60.0


class _LogLines(tqdm):
    """Prints each state as a line of its own. tqdm itself rewrites one line, which in a file grows without end."""

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        def print_line(text: str) -> None:
            if text.strip():
                with contextlib.suppress(OSError):  # a log on a full disk does not end the work
                    file.write(f"{text}\n")
                    file.flush()

        return print_line


def progress(*arguments: Any, **options: Any) -> tqdm:
    """Returns a progress bar with tqdm's arguments. If standard error is no terminal, it prints a line per minute."""
    if sys.stderr.isatty():
        return tqdm(*arguments, **options)
    return _LogLines(*arguments, **{"mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS, **options})
