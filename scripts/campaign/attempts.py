"""An attempt: one input with one mutation, or one killed process; and how its outcome is judged.

A kind is a function `prepare(folder) -> attempt`. It makes whole inputs in the folder. `attempt(rng, case)` writes one
bad input into the empty folder `case` and runs the program on it. It returns if the program's result is right, and lets
the program's errors through. Everything random comes from `rng`.
"""

import dataclasses
import importlib
import pathlib
import traceback
from collections.abc import Callable

import numpy as np

from EasyLM.errors import MOST_CHARACTERS, UserError, one_line

RIGHT, REFUSED = "right", "refused"
# The verdicts that are faults.
SILENT, UNCLEAR, TRACEBACK, CRASH, HANG, MEMORY = "silent", "unclear", "traceback", "crash", "hang", "memory"
FAULTS = {
    SILENT: "the output is wrong, and no error says so",
    UNCLEAR: "the error is not one line that names the file or the field",
    TRACEBACK: "an exception that no command turns into a line",
    CRASH: "the process died",
    HANG: "no end within the time limit of the kind",
    MEMORY: "more memory than the limit of the kind",
}
VERDICTS = (RIGHT, REFUSED, *FAULTS)
_MOST_MESSAGE = MOST_CHARACTERS + 20  # of a clear error

Attempt = Callable[[np.random.Generator, pathlib.Path], int | None]  # returns the number of tries, None for 1


class WrongOutputError(Exception):
    """The program ended without an error, and its output is wrong."""


class UnclearError(Exception):
    """The program's error, from another process, is not one line that names the file or the field."""


class RefusedError(Exception):
    """A clear error of the program, from another process."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is tried.

    Attributes:
      module, function: the function `prepare`. Its module is imported in the worker alone, because this takes seconds.
      seconds: time limit of an attempt.
      megabytes: by which an attempt may raise the peak memory of its process.
      runs_processes: attempts start programs as processes, and take seconds. Otherwise they are calls.
      mounts: attempts mount file systems, where that is allowed.
    """

    name: str
    module: str
    function: str
    seconds: float = 30
    megabytes: int = 500
    runs_processes: bool = False
    mounts: bool = False

    def prepare(self, folder: pathlib.Path) -> Attempt:
        """Makes whole inputs in a folder. Returns the function that makes an attempt."""
        return getattr(importlib.import_module(self.module), self.function)(folder)


def judge(attempt: Attempt, rng: np.random.Generator, case: pathlib.Path) -> tuple[str, str, int]:
    """Runs an attempt. Returns its verdict, the error and the number of tries."""
    tries = None
    try:
        tries = attempt(rng, case)
        verdict, message = RIGHT, ""
    except WrongOutputError as error:
        verdict, message = SILENT, str(error)
    except RefusedError as error:
        verdict, message = REFUSED, str(error)
    except UnclearError as error:
        verdict, message = UNCLEAR, str(error)
    except (UserError, OSError) as error:
        message = one_line(str(error))  # as commands print it
        verdict = REFUSED if is_clear(message, str(case)) else UNCLEAR
        if verdict == UNCLEAR:
            message += f"\n{traceback.format_exc()}"
    except MemoryError:
        verdict, message = MEMORY, traceback.format_exc()
    except Exception:
        verdict, message = TRACEBACK, traceback.format_exc()
    return verdict, message, 1 if tries is None else tries


def is_clear(message: str, subject: str) -> bool:
    """Whether an error is one line of readable length that contains the subject."""
    return subject in message and len(message.splitlines()) == 1 and len(message) <= _MOST_MESSAGE


def require(condition: object, message: str) -> None:
    """Raises WrongOutputError unless the condition holds."""
    if not condition:
        raise WrongOutputError(message)


def require_equal(got: object, expected: object, what: str) -> None:
    """Raises WrongOutputError unless the values, or all items of the arrays, are equal."""
    if isinstance(expected, np.ndarray):
        array = np.asarray(got)
        is_equal = array.dtype == expected.dtype and array.shape == expected.shape
        is_equal = is_equal and array.tobytes() == expected.tobytes()
    else:
        is_equal = got == expected
    require(is_equal, f"{what}: {str(got)[:200]} instead of {str(expected)[:200]}")
