"""What commands print: the progress of long work, as a bar or as one line per minute in a log; and their results."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

from EasyLM.errors import error_line

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


def print_if_possible(text: str) -> None:
    """Prints to standard output. If that fails, the command continues, and its exit code does not change."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # as in `--help | head`
        _discard_output()
    except OSError as error:
        _discard_output()
        logging.warning("standard output cannot be written (%s)", error_line(error))
    except ValueError as error:  # it is closed, or its encoding lacks a character
        logging.warning("standard output cannot be written (%s)", error_line(error))


def _discard_output() -> None:
    """Python flushes standard output again at the exit, which must not fail then."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
